"""What a person types and what comes back: help without waiting, errors in one paragraph, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs import cli, options
from jobs.segment import command as segment_command
from pipelines.config import RECIPES

ROOT = Path(__file__).parents[2]


def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """`repsep ARGUMENTS` as its entry point runs it: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["repsep", *arguments])
    with pytest.raises(SystemExit) as stop:
        options.main(cli.repsep)
    out, err = capfd.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, out, err


def test_help_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from jobs import cli\n"
        "sys.argv = ['repsep', '--help']\n"
        "try:\n    cli.main()\n"
        "finally:\n    print('heavy:', sorted({'torch', 'ray', 'mlflow', 'pyarrow'} & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "heavy: []" in found.stdout
    assert "segment" in found.stdout


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help_that_says_what_it_does(name: str) -> None:
    found = CliRunner().invoke(cli.repsep, [name, "--help"])
    assert found.exit_code == 0
    assert len(found.output.splitlines()) > 8


def test_help_of_segment_teaches_uris_outputs_and_exit_codes() -> None:
    text = CliRunner().invoke(segment_command, ["--help"]).output
    for word in (
        "s3://",
        "models:/",
        "masks/KEY.png",
        "results/",
        "AWS_ENDPOINT_URL",
        "Exit codes: 0 done, 1 failed, 2",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "--set", "train.stpes=3"], 2, "train.stpes: there is no such key; did you mean steps?"),
        (["train", "--set", "train.lr=fast"], 2, "train.lr: input should be a valid number"),
        (["train", "--set", "nonsense"], 2, "write section.key=value"),
        (["train", "--config", "no-such.yaml"], 2, "there is no recipe no-such.yaml"),
        (["segment"], 2, "segment needs an input and an output"),
        (["segment", "in", "in"], 2, "masks need a prefix of their own"),
        (["segment", "in", "out", "--model", "models:/a/b/c"], 2, "models:/name@alias"),
        (
            ["segment", "in", "out", "--model", "models:/nobody@champion"],
            1,
            "models:/nobody@champion is not in the registry",
        ),
        (["segment", "in", "out", "--model", "nowhere"], 1, "model.safetensors is missing"),
        (["segment", "in", "out", "--limit", "many"], 2, "'many' is not a valid integer"),
        (["evaluate"], 1, "run `repsep prepare`"),
        (["prepare", "--set", "prepare.source=no/such/folder"], 1, "there is nothing there"),
        (["prepare", "--set", "prepare.source=gopher://x/y"], 2, "no filesystem for this kind of URI"),
        (["nonsense"], 2, "No such command"),
        (["train", "--set", "tracking.uri=file:///tmp/mlruns"], 2, "file store is not supported"),
    ],
)
def test_bad_input_gets_one_paragraph_and_an_exit_code(
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPSEP_HOME", str(tmp_path / "home"))
    found, _, err = run(capfd, monkeypatch, *arguments)
    assert said in err
    assert found == code
    assert "Traceback" not in err


def test_a_missing_bucket_and_a_mask_out_of_range_are_named(
    s3: str, scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capfd, monkeypatch, "prepare", "--set", "prepare.source=s3://no-such-bucket/data")
    assert code == 1
    assert "there is no bucket 'no-such-bucket'" in err
    assert "http://127.0.0.1" in err
    classes = json.loads((scenes / "classes.json").read_text())
    classes["classes"] = classes["classes"][:3]
    for name in ("images", "masks"):
        (tmp_path / name).symlink_to(scenes / name)
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    code, _, err = run(capfd, monkeypatch, "prepare", "--set", f"prepare.source={tmp_path}")
    assert code == 1
    assert "ids out of range" in err
    assert "masks/train/" in err


def test_debug_shows_the_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, err = run(capfd, monkeypatch, "prepare", "--debug", "--set", f"prepare.source={tmp_path}/none")
    assert "Traceback" in err


def test_json_prints_one_object_on_stdout(
    scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--set", f"prepare.source={scenes}", "--set", f"workspace={tmp_path}")
    code, out, _ = run(capfd, monkeypatch, "prepare", "--json", *given)
    receipt = json.loads(out)
    assert code == 0
    assert receipt["results"]["images"] == {"train": 24, "val": 8}
    assert json.loads(run(capfd, monkeypatch, "prepare", "--json", *given)[1])["cached"]


def recipe_file(folder: Path, source: Path) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"workspace": str(folder / "work"), "prepare": {"source": str(source)}}))
    return file


@pytest.mark.parametrize(
    "arguments", [["workflow"], ["workflow", "--plan"], ["workflow", "--plan", "--verify"], ["prepare"]]
)
def test_an_altered_receipt_stops_what_would_rest_on_it(
    arguments: list[str],
    scenes: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ("--config", str(recipe_file(tmp_path, scenes)))
    assert run(capfd, monkeypatch, "prepare", *given)[0] == 0
    (file,) = tmp_path.glob("work/prepare/*/_SUCCESS.json")
    file.write_text(file.read_text().replace('"train": 24', '"train": 25'))
    code, _, err = run(capfd, monkeypatch, *arguments, *given)
    assert code == 1
    assert f"{file} does not match its own digest; delete that folder to run the stage again" in err
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["prepare"], "no later stage was begun"


@pytest.mark.parametrize("verify", [False, True])
def test_a_shard_of_the_same_size_that_was_altered_is_found_by_verify_alone(
    verify: bool, scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--config", str(recipe_file(tmp_path, scenes)))
    assert run(capfd, monkeypatch, "prepare", *given)[0] == 0
    (shard,) = tmp_path.glob("work/prepare/*/dataset/val/part-00000.parquet")
    data = shard.read_bytes()
    shard.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    code, out, _ = run(capfd, monkeypatch, "workflow", "--plan", *(["--verify"] if verify else []), *given)
    assert code == 0
    expected = "runs: changed or missing: dataset/val/part-00000.parquet" if verify else "cached: "
    assert expected in out.splitlines()[0]


@pytest.mark.parametrize("name", [*cli.COMMANDS])
def test_every_job_file_runs_alone(name: str) -> None:
    file = ROOT / "jobs" / f"{name}.py"
    assert file.read_text().startswith("#!/usr/bin/env python3\n")
    assert file.stat().st_mode & 0o111 == 0o111


def test_the_recipes_that_come_along_are_named_when_one_is_not_found(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, err = run(capfd, monkeypatch, "train", "--config", "demoo")
    assert all(path.stem in err for path in RECIPES.glob("*.yaml"))
