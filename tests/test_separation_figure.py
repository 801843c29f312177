"""The figure that sets two models side by side shows what was measured, in forward order."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.separation import PANELS, figure, main, merged, table
from repsep_model import save_segmentor
from repsep_model.diagnostics import MEASURES, MapMeasures
from tests.model.tiny import tiny_segmentor

PNG = b"\x89PNG"


def rows(*names: str, start: float = 0.0) -> dict[str, MapMeasures]:
    """Another value in every cell."""
    values = {name: start + 10 * i for i, name in enumerate(names)}
    return {
        name: MapMeasures(stride=8, **{m: value + j for j, m in enumerate(MEASURES)}) for name, value in values.items()
    }


HEAD = rows("block 1", "block 2", "block 3", "F")
WHOLE = rows("block 1", "block 2", "P0", "P1", "F", "F'", "embed", start=0.5)
NAMES = ["block 1", "block 2", "block 3", "P0", "P1", "F", "F'", "embed"]


def test_every_measure_has_a_panel_in_the_order_of_the_table() -> None:
    assert tuple(PANELS) == MEASURES


@pytest.mark.parametrize("pair", [(HEAD, WHOLE), (WHOLE, HEAD)], ids=["shorter first", "longer first"])
def test_maps_of_both_models_are_merged_in_forward_order(pair: tuple[dict[str, MapMeasures], ...]) -> None:
    assert merged(*pair) == NAMES


def test_the_table_sets_the_models_beside_each_other_and_marks_what_one_lacks() -> None:
    lines = [line.split() for line in table({"one": HEAD, "two": WHOLE}).splitlines()]
    assert lines[0] == ["one", "|", "two"]
    assert lines[1] == ["map", *MEASURES]
    assert [line[0] for line in lines[2:]] == ["block", "block", "block", *NAMES[3:]]
    assert lines[2][2:8] == ["0.000", "|", "0.500", "1.000", "|", "1.500"]
    assert lines[4][2:5] == ["20.000", "|", "-"]
    assert lines[5][1:4] == ["-", "|", "20.500"]


def test_a_panel_shows_each_models_values_at_the_places_of_the_maps() -> None:
    drawn = figure({"one": HEAD, "two": WHOLE}, "title")
    for measure, axis in zip(MEASURES, drawn.axes, strict=False):
        places = dict(zip(NAMES, axis.get_xticks(), strict=True))
        assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "3", "P0", "P1", "F", "F'", "E"]
        for label, model in (("one", HEAD), ("two", WHOLE)):
            lines = [line.get_xydata() for line in axis.get_lines() if line.get_label() == label]
            found = {(x, y) for line in lines for x, y in np.asarray(line).tolist() if not math.isnan(y)}
            assert found == {(places[name], getattr(row, measure)) for name, row in model.items()}
    legend = drawn.axes[-1].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]


def test_two_saved_models_are_compared(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = json.loads((scenes / "classes.json").read_text())
    number = len(classes["classes"])
    save_segmentor(tiny_segmentor(num_classes=number), tmp_path / "whole", classes=classes)
    deeper = {"depth": 6, "embed_dim": 48, "num_heads": 3}
    lacking = {"local_pathway": False, "separation": "none", "cross_attention": 0}
    head = tiny_segmentor(num_classes=number, backbone_args=deeper, **lacking)
    save_segmentor(head, tmp_path / "head", classes=classes)
    out = tmp_path / "figure.png"
    models = [str(tmp_path / "head"), str(tmp_path / "whole")]
    main(["--data", str(scenes), "--models", *models, "--every", "4", "--out", str(out)])
    assert out.read_bytes()[:4] == PNG
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("A: head (mIoU ")
    assert "B: whole (mIoU " in lines[0]
    names = [*(f"block {m}" for m in range(1, 7)), "P0", "P1", "P2", "P3", "P4", "F", "F'", "embed"]
    assert [line[:10].strip() for line in lines[2:]] == names


def test_without_models_two_are_trained(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figure.png"
    main(["--data", str(scenes), "--steps", "1", "--every", "8", "--out", str(out)])
    assert out.read_bytes()[:4] == PNG
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("A: backbone + linear head (mIoU ")
    assert [line[:10].strip() for line in lines[2:6]] == [f"block {m}" for m in range(1, 5)]
