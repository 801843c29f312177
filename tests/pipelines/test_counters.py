"""Counters of images, bytes and waiting: right in number and name, and nothing at all where no Ray runs."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.util.metrics

from pipelines import counters
from pipelines.bulk.commits import FAILED, OK
from pipelines.bulk.job import SegmentJob
from pipelines.bulk.shard_step import SegmentShards
from pipelines.bulk.steps import CommitMasks, CommitSettings, ReadImages, Row, worker_id
from pipelines.bulk.tally import Tally
from pipelines.config import SegmentConfig, TrainConfig
from pipelines.storage import Folder
from pipelines.training.telemetry import Telemetry
from tests.pipelines.layout import encoded, picture

ROOT = Path(__file__).parents[2]
COLOURS = ((255, 0, 0), (0, 255, 0))
ALL = {counted.name: counted for counted in vars(counters).values() if isinstance(counted, counters.Counted)}


class Recorded:
    """Stands for Ray's own counters: what was added, by name, or by name and label."""

    def __init__(self) -> None:
        self.sums: Counter[tuple[str, ...]] = Counter()

    def counter(self, counted: counters.Counted) -> Any:
        def inc(amount: float, tags: dict[str, str]) -> None:
            self.sums[counted.name, *tags.values()] += amount  # type: ignore[assignment]

        return type("Inc", (), {"inc": staticmethod(inc)})


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(counters, "_counter", found.counter)
    return found


def settings(source: Path, target: Path) -> CommitSettings:
    return CommitSettings(str(source), str(target), COLOURS, confidence=True, model_version="v", threads=2)


def labelled(row: Row) -> Row:
    """As the model's step leaves it."""
    labels = np.zeros((row["height"], row["width"]), np.uint8)
    return row | {"labels": labels, "confidence_map": labels, "confidence": 1.0, "segment_s": 0.1, "segmenter": 1}


def size_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_importing_the_counters_imports_no_ray() -> None:
    code = "import sys, pipelines.counters; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("absent", [True, False])
def test_nothing_is_made_or_counted_where_no_ray_runs(absent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[counters.Counted] = []
    monkeypatch.setattr(counters, "_counter", made.append)
    if absent:
        monkeypatch.delitem(sys.modules, "ray")
    else:
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
    counters.IMAGES_DONE.add()
    assert made == []


def test_rays_counter_is_made_once_at_the_first_count_and_takes_every_counters_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray refuses amounts that are not positive and labels that it was not told of: so this is its own class."""
    made: list[tuple[str, str]] = []
    taken: Counter[str] = Counter()

    class Spy(ray.util.metrics.Counter):
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            super().__init__(name, description, tag_keys)
            made.append((name, description))

        def _record(self, value: float, tags: dict[str, str] | None = None) -> None:
            self._validate_tags(self._get_final_tags(tags))
            taken[self.info["name"]] += value  # type: ignore[assignment]

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.util.metrics, "Counter", Spy)
    counters._counter.cache_clear()
    try:
        for counted in ALL.values():
            for amount in (0, 2.5, 1):
                counted.add(amount, **dict.fromkeys(counted.labels, "read"))
    finally:
        counters._counter.cache_clear()
    assert taken == dict.fromkeys(ALL, 3.5)
    assert sorted(made) == sorted((c.name, c.description) for c in ALL.values())


def test_bytes_are_those_that_were_read_and_put(recorded: Recorded, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for n in range(3):
        (source / f"{n}.png").write_bytes(encoded(picture(n, 40 + n, 60), "PNG"))
    listed = [
        {"key": entry.key, "etag": entry.etag, "size": entry.size, "n": n}
        for n, entry in enumerate(Folder(str(source)).list())
    ]
    gone = {"key": "gone.png", "etag": "0-0", "size": 7, "n": 3}
    rows = list(ReadImages(str(source), SegmentConfig())([*listed, gone]))
    assert [row["stage"] for row in rows] == [None, None, None, "read"]
    assert recorded.sums == {("repsep_bytes_read",): size_below(source)}
    CommitMasks(settings(source, target))([labelled(row) if row["stage"] is None else row for row in rows])
    written = sum(size_below(target / name) for name in ("masks", "confidence"))
    assert recorded.sums[("repsep_bytes_written",)] == written > 0


def test_the_masks_of_a_shard_count_as_written(recorded: Recorded, tmp_path: Path) -> None:
    step: Any = object.__new__(SegmentShards)
    step.output, step.settings = CommitMasks(settings(tmp_path, tmp_path / "out")).output, settings(tmp_path, tmp_path)
    row = {"name": "a", "mask": b"png", "confidence_png": b"png", "height": 1, "width": 1, "error": None}
    step._put({"key": "shard.parquet"}, [row])
    assert recorded.sums == {("repsep_bytes_written",): size_below(tmp_path / "out" / "masks")}


def test_images_are_counted_as_done_or_by_the_stage_in_which_they_failed(recorded: Recorded) -> None:
    job: Any = object.__new__(SegmentJob)
    job.tally, job.done, job.parts, job.refused_since = Tally(), np.zeros(8, bool), [], None
    job.progress = type("Bar", (), {"advance": lambda *_: None})
    base: Row = {"height": 4, "width": 4, "part": None, "error": "", "reader": worker_id(), "read_s": 0.1}
    for n, stage in enumerate([None, "decode", None, "decode", "worker", None]):
        job._count(base | {"n": n, "status": FAILED if stage else OK, "stage": stage})
    job._count(base | {"n": 6, "status": None, "stage": "read", "error": "not committed, it comes again"})
    assert recorded.sums == {
        ("repsep_images_done",): 3,
        ("repsep_images_failed", "decode"): 2,
        ("repsep_images_failed", "worker"): 1,
    }


def test_training_counts_the_global_batch_once_and_the_wait_of_every_worker(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig.model_validate({"batch_size": 8})
    ranks = [
        Telemetry(None, config, rank=rank, world_size=2, classes=[], done=0, total=4, driver_bar=False)
        for rank in range(2)
    ]
    for view in ranks:
        monkeypatch.setattr(view.clock, "now", ticks())
        for step in (1, 2, 3):
            with view.waiting():
                pass
            with view.paused():
                pass
            view.step({"loss": 1.0}, step)
    assert recorded.sums == {("repsep_train_images",): 3 * 8, ("repsep_train_data_wait_seconds",): 2 * 3 * 1.0}


def ticks() -> Callable[[], float]:
    """A clock that goes on by a second each time it is read."""
    seconds = iter(range(10_000))
    return lambda: float(next(seconds))


def test_ray_exports_a_counter_as_ray_name_total() -> None:
    """Through the recorder of Ray's agent, in a process of its own: it sets OpenTelemetry up for good."""
    code = (
        "import prometheus_client\n"
        "from pipelines import counters\n"
        "from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder\n"
        "recorder = OpenTelemetryMetricRecorder()\n"
        "for counted in counters.ALL:\n"
        "    recorder.register_counter_metric(counted.name, counted.description)\n"
        "    recorder.set_metric_value(counted.name, dict.fromkeys(counted.labels, 'read'), 3)\n"
        "print(prometheus_client.generate_latest().decode())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    exported = {line.partition("{")[0]: line for line in done.stdout.splitlines() if line.startswith("ray_")}
    assert set(exported) == {f"ray_{name}_total" for name in ALL}
    assert 'stage="read"' in exported["ray_repsep_images_failed_total"]
    assert all(line.endswith(" 3.0") for line in exported.values())


def test_the_list_of_all_counters_is_complete_and_their_names_say_whose_they_are() -> None:
    assert {counted.name for counted in counters.ALL} == set(ALL)
    assert all(name.startswith("repsep_") and not name.endswith("_total") for name in ALL)
