"""The image is built of pins and of nothing that is not copied by name; who runs it is not root."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from tests.infra.commands import simple_commands
from tests.infra.manifests import INFRA, ROOT

DOCKERFILE = INFRA / "docker" / "Dockerfile"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) in order, with comments left out and lines that go on joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def copied() -> list[str]:
    return [source for rest in of("COPY") for source in rest.split()[:-1]]


def let_through(path: str) -> bool:
    """Whether .dockerignore lets a path into the build: the last rule that matches decides."""
    found = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        rule = line.strip().lstrip("!")
        parts = Path(path).parts
        prefixes = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if rule and not rule.startswith("#"):
            inner = rule.removeprefix("**/")
            names = parts if inner != rule else prefixes
            if any(fnmatch.fnmatchcase(name, inner) for name in names):
                found = line.strip().startswith("!")
    return found


def test_the_base_is_a_python_that_we_support_by_its_full_version() -> None:
    (base,) = of("FROM")
    major, minor = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-\w+", base).groups()  # type: ignore[union-attr]
    assert PROJECT["project"]["requires-python"] == f">={major}.{minor}"


def test_what_is_copied_is_there_and_all_that_the_build_is_shown() -> None:
    assert copied() == [
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "repsep_model",
        "pipelines",
        "jobs",
    ]
    for source in copied():
        assert (ROOT / source).exists(), source
        assert let_through(source), source
    packages = {package.partition(".")[0] for package in PROJECT["tool"]["setuptools"]["packages"]}
    assert packages <= set(copied())
    assert PROJECT["project"]["readme"] in copied()


def test_the_build_is_shown_no_history_data_secret_or_test() -> None:
    for path in (".git/config", ".env", "infra/.env", ".venv/bin/python", "tests/conftest.py", ".repsep/mlflow.db"):
        assert not let_through(path), path
    assert not let_through("jobs/__pycache__/train.pyc")
    assert let_through("pipelines/recipes/demo.yaml")
    rules = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert set(rules) == set(copied()), "nothing is let through that is not copied"


def test_dependencies_are_pinned_and_in_a_layer_before_the_code() -> None:
    order = [rest for name, rest in instructions() if name in ("COPY", "RUN")]
    install = next(n for n, rest in enumerate(order) if "-r /tmp/requirements.txt" in rest)
    assert "-c constraints.txt" in order[install]
    assert order[install - 1] == "pyproject.toml constraints.txt ./"
    code = ("README", "jobs", "pipelines", "repsep_model", "-e .")
    assert all(any(name in rest for name in code) for rest in order[install + 1 :])
    assert not any(name in rest for name in code for rest in order[: install + 1])
    assert "--no-deps -e ." in order[-1], "the code brings no dependency that is not pinned"


def test_what_is_installed_are_the_projects_dependencies_and_those_of_the_image() -> None:
    """The Dockerfile's own line, run here."""
    run = next(rest for rest in of("RUN") if "tomllib" in rest)
    code = next(words[2] for words in simple_commands(run.partition(" ")[2].strip()) if words[:2] == ["python", "-c"])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    more = PROJECT["project"]["optional-dependencies"]
    assert done.stdout.splitlines() == [*PROJECT["project"]["dependencies"], *more["infra"], *more["sweep-tpe"]]
    pins = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {re.split(r"[\[<>=!~]", name)[0].lower() for name in done.stdout.splitlines()} <= pins, "each has a pin"


def test_a_build_with_wheels_that_were_not_asked_for_fails() -> None:
    """The check in the Dockerfile: CUDA's wheels unless an index of CPU wheels is named."""
    run = next(rest for rest in of("RUN") if "torch.version.cuda" in rest)
    code = re.search(r'python -c "(import sys, torch; [^"]*)"', run)[1]  # type: ignore[index]
    for cuda, index, fails in (("13.0", "", 0), (None, "address", 0), (None, "", 1), ("13.0", "address", 1)):
        fake = f"import types; torch = types.SimpleNamespace(version=types.SimpleNamespace(cuda={cuda!r}))\n"
        script = fake + code.replace("import sys, torch", "import sys").replace("$TORCH_INDEX", index)
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == fails


def test_whoever_runs_it_is_not_root_and_finds_the_jobs_in_the_working_folder() -> None:
    assert instructions()[-1][0] == "CMD"
    assert instructions()[-2] == ("USER", "1000:1000")
    assert of("WORKDIR") == ["/repsep"]
    assert "jobs jobs" in of("COPY")
    assert json.loads(of("CMD")[0]) == ["repsep", "--help"]


def test_no_build_argument_or_variable_is_a_secret() -> None:
    names = {word.partition("=")[0] for rest in (*of("ENV"), *of("ARG")) for word in rest.split()}
    assert names >= {"TORCH_INDEX", "HOME", "REPSEP_HOME"}
    assert not any(re.search("(?i)token|secret|passw|key", name) for name in names)


def test_what_rays_launcher_works_with_is_installed() -> None:
    """Its head reaches its workers by ssh and rsync, which it runs inside the container."""
    packages = re.search(r"apt-get install --no-install-recommends -y (.*?) &&", of("RUN")[0])[1]  # type: ignore[index]
    assert set(packages.split()) == {"openssh-client", "rsync", "wget"}
