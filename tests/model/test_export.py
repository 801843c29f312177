"""Exported files against the eager model: every family, any batch, one window; and what is left when it goes wrong.

Shapes: B batch, K classes, S pixels of the window's side.
"""

import contextlib
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from torch import Tensor

from repsep_model import Segmentor, export_onnx, export_program
from repsep_model import export as export_module
from repsep_model.export import ExportError, ExportReport
from repsep_model.inference import window_side
from tests.model.tiny import FAMILIES, K, family_segmentor, random_images, tiny_segmentor

Run = Callable[[Tensor], Tensor]

SIDE = 32
BASELINE = {"local_pathway": False, "separation": "none", "cross_attention": 0}
CLASSES: dict[str, Any] = {
    "classes": [{"id": k, "name": f"Straße {k}", "color": [k, 2 * k, 3 * k]} for k in range(K)],
    "ignore_index": 255,
}
FAST_WITH_ONNX = ("ViT", "Swin", "PVTv2", "BEiT")


class Format(NamedTuple):
    """How a kind of file is written and run."""

    name: str
    write: Callable[..., ExportReport]
    read: Callable[[Path], Run]


def read_program(file: Path) -> Run:
    return torch.export.load(file).module()


def read_onnx(file: Path) -> Run:
    session = session_of(file)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def session_of(file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


PROGRAM = Format("model.pt2", export_program, read_program)
ONNX = Format("model.onnx", export_onnx, read_onnx)
formats = pytest.mark.parametrize("kind", [PROGRAM, ONNX], ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both files of one model."""
    folder = tmp_path_factory.mktemp("exported") / "new"
    for kind in (PROGRAM, ONNX):
        kind.write(tiny_segmentor(**BASELINE), folder / kind.name, window=SIDE, classes=CLASSES)
    return folder


@torch.no_grad()
def assert_equal_to_eager(run: Run, model: Segmentor, side: int) -> None:
    model = model.for_inference()
    for batch in (1, 2, 5):
        images = random_images(batch, side, side, seed=batch)
        torch.testing.assert_close(run(images), model(images).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_program_of_each_family_agrees_with_the_eager_model(family: str, tmp_path: Path) -> None:
    report = export_program(family_segmentor(family, window=64), tmp_path / "model.pt2")
    assert report.absolute <= 1e-4


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in FAST_WITH_ONNX else pytest.mark.slow) for name in FAMILIES]
)
def test_onnx_of_each_family_gives_eager_logits_for_any_batch(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = family_segmentor(family, window=64)
    report = export_onnx(model, tmp_path / "model.onnx")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert logging.getLogger("onnxscript.optimizer").level == logging.NOTSET
    assert_equal_to_eager(read_onnx(tmp_path / "model.onnx"), model, report.window)


@pytest.mark.parametrize(
    ("kind", "separation", "layers"),
    [(PROGRAM, "local", 1), (PROGRAM, "region", 0), (ONNX, "local", 0), (ONNX, "region", 0)],
    ids=["program-local-1", "program-region-0", "onnx-local-0", "onnx-region-0"],
)  # the families have region separation with one layer
def test_each_separation_with_and_without_cross_attention_gives_eager_logits_for_any_batch(
    kind: Format, separation: str, layers: int, tmp_path: Path
) -> None:
    model = tiny_segmentor(separation=separation, cross_attention=layers, local_pathway=False)
    kind.write(model, tmp_path / kind.name, window=SIDE)
    assert_equal_to_eager(kind.read(tmp_path / kind.name), model, SIDE)


@formats
def test_another_window_than_the_files_is_refused(kind: Format, exported: Path) -> None:
    run = kind.read(exported / kind.name)
    with pytest.raises(Exception, match=r"(?s)images.*32"):
        run(random_images(1, SIDE, 2 * SIDE))


def test_onnx_takes_images_in_bytes_and_gives_logits_at_their_size(exported: Path) -> None:
    session = session_of(exported / "model.onnx")
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", 3, SIDE, SIDE])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", K, SIDE, SIDE])


@formats
def test_file_says_what_its_logits_mean(kind: Format, exported: Path) -> None:
    found = {"config": ""}
    if kind is PROGRAM:
        torch.export.load(exported / kind.name, extra_files=found)
    else:
        found = session_of(exported / kind.name).get_modelmeta().custom_metadata_map
    config = tiny_segmentor(**BASELINE).config.to_dict()
    assert {name: json.loads(text) for name, text in found.items()} == {
        "config": json.loads(json.dumps(config)),
        "window": SIDE,
        "stride": 8,
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "classes": CLASSES,
    }


@formats
def test_file_does_not_name_the_folders_of_who_made_it(kind: Format, exported: Path) -> None:
    content = (exported / kind.name).read_bytes()
    assert str(Path(export_module.__file__).parents[1]).encode() not in content
    assert str(Path(torch.__file__).parents[1]).encode() not in content
    assert str(exported).encode() not in content


def test_folder_is_made_and_holds_nothing_else(exported: Path) -> None:
    assert {file.name for file in exported.iterdir()} == {"model.pt2", "model.onnx"}


def test_exporting_leaves_a_model_in_training_as_it_was(tmp_path: Path) -> None:
    model = tiny_segmentor(**BASELINE).train()
    names = list(model.state_dict())
    export_program(model, tmp_path / "model.pt2", window=SIDE)
    assert model.training
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", ["BEiTv2 at 64", "EVA-02", "ViT"])
def test_window_is_the_sliding_windows_by_default(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(export_module, "_traced", lambda model, side: seen.append(side) or pytest.fail("traced"))
    model = family_segmentor(family, window=130)
    with pytest.raises(pytest.fail.Exception):
        export_program(model, tmp_path / "model.pt2")
    assert seen == [window_side(model)]
    assert seen[0] % model.multiple == 0


@pytest.mark.parametrize(("family", "side"), [("ViT", 50), ("BEiTv2 at 64", 100)])
def test_any_other_window_is_padded_inside_and_seen_in_tiles_where_the_backbone_needs_them(
    family: str, side: int, tmp_path: Path
) -> None:
    model = family_segmentor(family, **BASELINE)
    assert export_onnx(model, tmp_path / "model.onnx", window=side).window == side
    assert_equal_to_eager(read_onnx(tmp_path / "model.onnx"), model, side)


@formats
def test_report_holds_the_largest_difference_of_all_batches(kind: Format, tmp_path: Path) -> None:
    """Against a graph that is off by a known amount: the hook is only there while the graph is traced."""
    model = tiny_segmentor(**BASELINE)
    model.classifier.register_forward_hook(lambda _, __, out: out + 1e-3 if torch.compiler.is_exporting() else None)
    report = kind.write(model, tmp_path / kind.name, window=SIDE, tolerance=1e-2)
    assert report.file == tmp_path / kind.name
    assert report.absolute == pytest.approx(1e-3, abs=1e-5)
    assert report.relative == pytest.approx(1e-3, abs=1e-5)
    assert len(set(report.batches) - {export_module.TRACED_BATCH}) >= 2


@formats
def test_what_differs_from_the_eager_model_is_not_written(kind: Format, tmp_path: Path) -> None:
    model = tiny_segmentor(**BASELINE)
    model.classifier.register_forward_hook(lambda _, __, out: out + 2e-4 if torch.compiler.is_exporting() else None)
    (tmp_path / kind.name).write_text("the last good one")
    with pytest.raises(ExportError, match=rf"{kind.name} is not written: .* differ .* 2\.0e-04 .* 0\.0001 is allowed"):
        kind.write(model, tmp_path / kind.name, window=SIDE)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {kind.name: "the last good one"}


def test_logits_that_are_no_numbers_never_agree(tmp_path: Path) -> None:
    model = tiny_segmentor(**BASELINE)
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    with pytest.raises(ExportError, match="nan"):
        export_program(model, tmp_path / "model.pt2", window=SIDE)
    assert list(tmp_path.iterdir()) == []


def test_large_difference_of_a_large_logit_is_small(tmp_path: Path) -> None:
    model = tiny_segmentor(**BASELINE)
    with torch.no_grad():
        model.classifier.bias.fill_(1e4)
    model.classifier.register_forward_hook(lambda _, __, out: out + 0.1 if torch.compiler.is_exporting() else None)
    report = export_program(model, tmp_path / "model.pt2", window=SIDE)
    assert report.absolute == pytest.approx(0.1, rel=0.05)
    assert report.relative == pytest.approx(1e-5, rel=0.05)


def test_weights_too_large_for_one_file_lie_beside_it_and_move_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "ONE_FILE_BYTES", 1000)
    model = tiny_segmentor(**BASELINE)
    made, moved = tmp_path / "made", tmp_path / "moved"
    made.mkdir()
    (made / "model.onnx").write_text("an older one")
    export_onnx(model, made / "model.onnx", window=SIDE)
    made.rename(moved)
    assert {file.name for file in moved.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert (moved / "model.onnx.data").stat().st_size > (moved / "model.onnx").stat().st_size
    assert_equal_to_eager(read_onnx(moved / "model.onnx"), model, SIDE)


def test_old_model_never_stands_beside_new_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, replace = tmp_path / "model.onnx", Path.replace
    file.write_text("old")

    def killed_at_the_model(part: Path, target: Path) -> None:
        if part.name == file.name:
            raise KeyboardInterrupt
        replace(part, target)

    monkeypatch.setattr(Path, "replace", killed_at_the_model)
    with contextlib.suppress(KeyboardInterrupt), export_module._replaced_at_the_end(file) as draft:
        draft.write_text("new")
        draft.with_name("model.onnx.data").write_text("new weights")
    assert [found.name for found in tmp_path.iterdir()] == ["model.onnx.data"]


@pytest.mark.parametrize("absent", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_is_named_with_the_way_to_install_it(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else found(name))
    with pytest.raises(ExportError, match=rf"for ONNX {absent} must be installed: pip install 'repsep\[export\]'"):
        export_onnx(tiny_segmentor(), tmp_path / "model.onnx")


@formats
def test_wrong_arguments_are_refused_before_anything_is_written(kind: Format, tmp_path: Path) -> None:
    file = tmp_path / "new" / kind.name
    with pytest.raises(ValueError, match="2 classes given for a model of 5"):
        kind.write(tiny_segmentor(), file, classes={"classes": CLASSES["classes"][:2]})
    with pytest.raises(ValueError, match="at least 1, got 0"):
        kind.write(tiny_segmentor(), file, window=0)
    with pytest.raises(ValueError, match=r"end in \.pt2, got model\.bin"):
        export_program(tiny_segmentor(), "model.bin")
    assert list(tmp_path.iterdir()) == []
