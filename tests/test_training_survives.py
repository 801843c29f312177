"""Training goes on after what happens to real clusters, with the same result. Minutes: run with -m slow.

Four kinds of the failure table in benchmarks/; `make prove-training` runs them all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from benchmarks.training_bench import Bench, Line
from benchmarks.training_cluster import SETUP
from benchmarks.training_damage import half_written, nan_loss
from benchmarks.training_faults import driver_killed, worker_killed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETUP.items():  # what `Place` sets is undone with this
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        bench = Bench(tmp_path_factory.mktemp("survives"), random.Random(0))
        yield bench
        bench.close()


def holds(lines: Iterator[Line]) -> bool:
    found = list(lines)
    assert found
    for line in found:
        assert line.held, f"{line.what}: {line.injected}: {line.outcome}"
    return True


def test_a_killed_worker_leaves_the_weights_of_an_undisturbed_run(bench: Bench) -> None:
    assert holds(worker_killed(bench))


def test_a_job_whose_driver_was_killed_goes_on_when_submitted_again(bench: Bench) -> None:
    assert holds(driver_killed(bench))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(bench: Bench) -> None:
    assert holds(half_written(bench))


def test_a_loss_that_is_not_finite_stops_training_with_step_images_and_last_good_checkpoint(bench: Bench) -> None:
    assert holds(nan_loss(bench))
