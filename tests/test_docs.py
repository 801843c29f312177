"""The documentation is true: what pages name exists, what they quote is said, and their commands run as they stand.

Pages are walked top to bottom: a block that is headed by a file's name becomes that file, commands are run, and a
`text` block below them is what they print, `...` standing for anything. GUIDES are walked in an empty folder,
IN_CHECKOUT where `make` is, with SMALL laid over what their recipes ask for. What another test runs is named in
ELSEWHERE. What needs a cluster, a cloud or a GPU says so in the line below and is only parsed.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from pydantic import BaseModel

from pipelines.config import Recipe, load_recipe
from pipelines.storage import Folder
from tests.checkout import checkout
from tests.conftest import answers
from tests.infra.commands import UnknownProgramError, check, shown, simple_commands
from tests.pages import ROOT, Block, Page, pages
from tests.pipelines.conftest import TINY_MODEL
from tests.ports import free_ports
from tests.processes import kill_tree

GUIDES = ("your-data.md", "operating.md")
"""Walked in this order in one folder: the second goes on with what the first has made."""
IN_CHECKOUT = ("README.md", "one-gpu-box.md")
IN_REPOSITORY = ("new-backbone.md", "new-loss.md")
"""For developers: their commands run in the repository."""
SHORT = {"steps": 4, "validate_every": 2}
SMALL: dict[str, Any] = {
    "train": SHORT
    | {
        "model": TINY_MODEL,
        "batch_size": 4,
        "micro_batch": 2,
        "warmup_steps": 1,
        "augment": {"crop": 64},
        "runtime": {"workers": 1, "cpus_per_worker": 1, "loader_threads": 1},
    },
    "sweep": SHORT | {"trials": 2, "confirm_seeds": 0},
}
"""Laid over the recipes of IN_CHECKOUT: what they ask for are GPUs and days."""
JOBS = ("tests/test_whole.py", "test_training_is_submitted_as_a_ray_job_both_ways")
SERVICES = ("tests/test_stack.py", "test_train_register_and_segment_through_jobs_and_the_command_line")
ELSEWHERE = {
    "make demo": ("tests/test_whole.py", "test_the_demo_runs_and_the_second_time_every_stage_is_cached"),
    "make test": (".ci/run", "make test"),
    "make stack-up": SERVICES,
    ". .repsep/stack/env.sh": SERVICES,
    "make stack-down": SERVICES,
    "ray start --head": JOBS,
    "ray job submit": JOBS,
    "ray job list": JOBS,
    "mlflow models serve": (
        "tests/pipelines/test_serving.py",
        "test_each_image_of_a_request_is_answered_with_the_labels_of_the_registered_model",
    ),
}
"""What a command begins with, and who runs it: (file, test or text)."""
LASTING = "mlflow ui"
"""Runs until it is ended, in a block of its own; a walk waits for its answer."""
NEED_A_CLUSTER = ("aws.md", "kuberay.md")
PAGES = pages()
BLOCKS = [(page, block) for page in PAGES for block in page.blocks]
KINDS = {"sh", "python", "yaml", "json", "text"}
SECTIONS = "|".join(field.alias or name for name, field in Recipe.model_fields.items())
FOLDERS = "|".join(("benchmarks", "docs", "infra", "jobs", "pipelines", "repsep_model", "tests"))
NOT_IN_GIT = {"infra/.env"}


def where(page: Page, block: Block) -> str:
    return f"{page.name}-{block.line}"


def of_kind(*kinds: str) -> Any:
    found = [(page, block) for page, block in BLOCKS if block.kind in kinds]
    return pytest.mark.parametrize(("page", "block"), found, ids=[where(*both) for both in found])


every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands() -> Iterator[tuple[str, str]]:
    """(where, script) of each block of commands, and of each indented line in pages that have theirs so."""
    for page, block in BLOCKS:
        if block.kind == "sh":
            yield where(page, block), block.text
    for page in PAGES:
        for number, command in enumerate(shown(page.prose, page=True)):
            yield f"{page.name}-indented-{number}", re.sub(r"\s# .*", "", command)


COMMANDS = list(commands())


@pytest.mark.parametrize(("place", "script"), COMMANDS, ids=[place for place, _ in COMMANDS])
def test_a_command_is_one_that_the_installed_programs_understand(place: str, script: str) -> None:
    assert list(simple_commands(script))
    for context in check(script):
        for setting in context.params.get("settings") or ():
            load_recipe(None, [setting.replace("...", "x")])


@pytest.mark.parametrize("script", ["make demmo", "make test-stak SWEEP=x", "repsep segmnt a b"])
def test_a_command_that_is_wrong_is_found(script: str) -> None:
    with pytest.raises((UnknownProgramError, click.UsageError)):
        check(script)


@every_page
def test_verbs_of_make_that_are_named_exist(page: Page) -> None:
    lines = [*page.names, *re.findall(r"^ {4,}(\S.*)$", page.prose, re.MULTILINE)]
    for line in lines:
        if line.startswith("make "):
            check(re.sub(r"<[^>]*>", "x", re.sub(r"\s#.*", "", line)))


@every_page
def test_commands_are_run_or_say_that_they_are_not(page: Page) -> None:
    assert {block.kind for block in page.blocks} <= KINDS
    walked = page.path.name in (*GUIDES, *IN_CHECKOUT, *IN_REPOSITORY)
    for block in page.blocks:
        if block.kind == "sh" and block.parsed_only:
            programs = {words[0] for words in simple_commands(block.text)}
            assert not programs & {"repsep", "make", "mlflow"}, f"{page.name}:{block.line}: can be run here"
            assert "ray" not in programs or page.path.name in NEED_A_CLUSTER, f"{page.name}:{block.line}"
        elif block.kind == "sh":
            assert walked or not here(block), f"{page.name}:{block.line}: nobody runs {here(block)}"
    indented = [command for command in shown(page.prose, page=True) if "python benchmarks/" not in command]
    assert not indented, f"{page.name}: a walk reads blocks that are fenced"


def here(block: Block) -> list[str]:
    """The commands of a block that no other test runs."""
    lines = [line for line in block.text.splitlines() if line]
    return [line for line in lines if not line.startswith(tuple(ELSEWHERE))]


@pytest.mark.parametrize("begin", ELSEWHERE)
def test_a_command_that_another_test_runs_is_in_that_test_and_on_a_page(begin: str) -> None:
    file, name = ELSEWHERE[begin]
    source = (ROOT / file).read_text()
    assert name in source
    if file.endswith(".py"):
        constants = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
        typed = " ".join(value for value in constants if isinstance(value, str) and value != name)
        assert [word for word in begin.split() if word != "make" and word not in typed] == []
    assert any(line.startswith(begin) for _, block in BLOCKS for line in block.text.splitlines())


@pytest.mark.parametrize(
    ("command", "typed"),
    [
        ("make demo", "repsep demo"),
        ("make demo DATA=photos", "repsep demo --data photos"),
        ("make sweep SWEEP=recipe.yaml", "repsep sweep --config recipe.yaml"),
        ("make sweep DATA=camvid", "repsep sweep --config sweep-camvid --set prepare.source=camvid"),
    ],
)
def test_make_types_a_command_that_we_have(command: str, typed: str, tmp_path: Path) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # we may be under make
    done = subprocess.run(
        [*command.split(), "--dry-run"], cwd=checkout(tmp_path), env=own, capture_output=True, text=True, check=True
    )
    (line,) = done.stdout.splitlines()
    assert shlex.split(line.removeprefix(".venv/bin/")) == typed.split()
    assert check(typed)


@of_kind("python")
def test_python_is_python(page: Page, block: Block) -> None:
    ast.parse(block.text)


@of_kind("json")
def test_json_is_json(page: Page, block: Block) -> None:
    json.loads(block.text)


@of_kind("yaml")
def test_a_recipe_has_keys_and_values_that_there_are(page: Page, block: Block, tmp_path: Path) -> None:
    if "apiVersion" in yaml.safe_load(block.text):
        return
    (tmp_path / "recipe.yaml").write_text(block.text)
    load_recipe(tmp_path / "recipe.yaml")


@every_page
def test_links_lead_somewhere(page: Page) -> None:
    for link in page.links:
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = Page((page.path.parent / file).resolve()) if file else page
        assert target.path.exists(), link
        assert not anchor or anchor in target.anchors, link


@every_page
def test_files_that_are_named_exist(page: Page) -> None:
    named = {name for names in page.names for name in re.findall(rf"(?<![\w/.<])(?:{FOLDERS})/[\w./*-]*[\w*/]", names)}
    named |= {word for _, script in of_page(page) for word in re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w./-]+", script)}
    for name in named - NOT_IN_GIT:
        assert list(ROOT.glob(name)), f"{page.name}: there is no {name}"


def of_page(page: Page) -> list[tuple[str, str]]:
    return [(place, script) for place, script in COMMANDS if place.startswith(f"{page.name}-")]


def key_exists(dotted: str) -> bool:
    """Whether a recipe has this key; below a free mapping any name will do."""
    model: type[BaseModel] | None = Recipe
    for part in dotted.split("."):
        if model is None:
            return True
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        if part not in fields:
            return False
        annotation = fields[part].annotation
        members = [annotation, *getattr(annotation, "__args__", ())]
        model = next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), None)
    return True


@every_page
def test_keys_that_are_named_exist(page: Page) -> None:
    for name in page.names:
        found = re.fullmatch(rf"((?:{SECTIONS})\.[a-z_.]+)(=.*|: .*)?", name)
        if found and not found[1].endswith((".py", ".sh", ".yaml")):
            assert key_exists(found[1]), f"{page.name}: a recipe has no key {found[1]}"


def test_a_key_that_is_not_there_is_found() -> None:
    assert key_exists("segment.runtime.model_actors")
    assert key_exists("register.class_floors.road")
    assert not key_exists("segment.runtime.actors")


def messages() -> list[str]:
    """Every text in the source, with \0 for what is filled in."""
    found = []
    for package in ("repsep_model", "pipelines", "jobs"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def quoted(page: Page) -> list[str]:
    """The messages in the first column of a page's tables."""
    rows = re.findall(r"^\| `([^`|]+)` \|", page.prose, re.MULTILINE)
    return [row for row in rows if " " in row]


def said(quotation: str, texts: list[str]) -> bool:
    """Whether one text holds all that is between the dots, in order."""
    pattern = re.compile(r".*".join(re.escape(part.strip()) for part in quotation.split("...")), re.DOTALL)
    return any(pattern.search(text) for text in texts)


@pytest.mark.parametrize(("name", "least"), [("operating.md", 30), ("your-data.md", 6)])
def test_messages_that_are_quoted_are_those_of_the_program(name: str, least: int) -> None:
    texts, quotations = messages(), quoted(Page(ROOT / "docs" / name))
    assert len(quotations) >= least
    assert [quotation for quotation in quotations if not said(quotation, texts)] == []
    assert not said("the model is ... too good", texts)


def test_the_index_leads_to_every_page() -> None:
    linked = {link.partition("#")[0] for link in Page(ROOT / "docs/README.md").links}
    assert {page.path.name for page in PAGES if page.path.parent.name == "docs"} - {"README.md"} <= linked


# ------------------------------------------------------------------------------------------------------- run as read


class Walk:
    """Follows pages in a folder as a reader would."""

    def __init__(
        self, folder: Path, overlay: dict[str, Any] | None = None, store: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.overlay = overlay
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "REPSEP_", "MLFLOW_TRACKING"))
        }
        bin_folder = Path(sys.executable).parent
        self.environment |= {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "RAY_ADDRESS": "local"}
        self.environment |= {"PYTHONPATH": str(ROOT)} | (store or {})

    def follow(self, page: Page) -> int:
        """The number of blocks that were run. Files are there from the beginning: the README shows its recipe late."""
        ran, printed = 0, ""
        for block in page.blocks:
            if block.file is not None:
                (self.folder / block.file).write_text(self._overlaid(block))
        for block in page.blocks:
            if block.kind == "sh" and not block.parsed_only:
                lines = here(block)
                if lines and lines[0].startswith(LASTING):
                    self._wait_for_answer(lines[0], page, block)
                elif lines:
                    printed = self._run(["bash", "-euo", "pipefail", "-c", "\n".join(lines)], page, block)
                ran += bool(lines)
            elif block.kind == "python" and self.overlay is None:
                printed, ran = self._run([sys.executable, "-c", block.text], page, block), ran + 1
            elif block.kind == "text" and block.above == "":
                for line in block.text.splitlines():
                    assert said(line, [printed]), f"{page.name}:{block.line}: {line!r} was not printed:\n{printed}"
        return ran

    def _overlaid(self, block: Block) -> str:
        if block.kind != "yaml" or self.overlay is None:
            return block.text
        recipe = yaml.safe_load(block.text)
        for stage, keys in self.overlay.items():
            given = recipe.setdefault(stage, {})
            nested = {key: given[key] | value for key, value in keys.items() if key in ("augment", "runtime")}
            recipe[stage] = given | keys | nested
        return str(yaml.safe_dump(recipe))

    def _wait_for_answer(self, command: str, page: Page, block: Block) -> None:
        """Start a server beside those that may run here, ask until it answers, end it."""
        (port,) = free_ports(1)
        with tempfile.TemporaryFile() as log:
            server = subprocess.Popen(
                ["bash", "-c", f"exec {command} --port {port}"],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
            )
            try:
                deadline = time.monotonic() + 300
                while not answers(port, "/"):
                    assert server.poll() is None, f"{page.name}:{block.line} ended by itself"
                    assert time.monotonic() < deadline, f"{page.name}:{block.line} does not answer"
                    time.sleep(0.2)
            finally:
                kill_tree(server.pid)
                server.wait()

    def _run(self, arguments: list[str], page: Page, block: Block) -> str:
        done = subprocess.run(
            arguments, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=1800
        )
        printed = done.stdout + done.stderr
        assert done.returncode == 0, f"{page.name}:{block.line} ended with {done.returncode}:\n{printed[-5000:]}"
        return printed


@pytest.mark.slow
def test_the_guides_run_as_they_stand(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    for name in GUIDES:
        assert walk.follow(Page(ROOT / "docs" / name)) >= 3, name


@pytest.mark.slow
def test_the_readme_runs_in_a_checkout_and_on_an_object_store(
    tmp_path: Path, scenes: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Folder(f"s3://{s3}").fs
    for bucket in ("team", "photos", "masks"):
        store.mkdir(bucket)
    store.put(f"{scenes}/", "team/labelled/", recursive=True)
    for photos in ("team/photos/", "photos/2026/"):
        store.put(f"{scenes}/unlabelled/", photos, recursive=True)
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    walk = Walk(checkout(tmp_path), SMALL, variables)
    assert walk.follow(Page(ROOT / "README.md")) >= 1
    assert len(store.glob("masks/2026/masks/**/*.png")) == 6


@pytest.mark.slow
def test_the_guide_to_one_machine_runs_in_a_checkout(tmp_path: Path, scenes: Path) -> None:
    folder = checkout(tmp_path)
    shutil.copytree(scenes, folder / "labelled")
    shutil.copytree(scenes / "unlabelled", folder / "photos")
    assert Walk(folder, SMALL).follow(Page(ROOT / "docs/one-gpu-box.md")) >= 4
    assert len(list((folder / "labels/masks").rglob("*.png"))) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_REPOSITORY)
def test_the_guides_for_developers_run_in_the_repository(name: str) -> None:
    assert Walk(ROOT).follow(Page(ROOT / "docs" / name)) >= 2
