"""Every command that a manifest runs, or shows to a reader, is one that the installed programs understand."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from ray.scripts.scripts import start

from pipelines.config import load_recipe
from tests.infra.commands import SCRIPTS, UnknownProgramError, check, parsed, shown, simple_commands
from tests.infra.manifests import IMAGE, INFRA, ROOT, argo_jobs, of_kind, pods, ray_clusters, ray_jobs

COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
AWS = yaml.safe_load((INFRA / "aws" / "cluster.yaml").read_text())
SHELLS = (["/bin/bash", "-c"], ["bash", "-c"], ["sh", "-c"])


def of_container(container: dict[str, Any]) -> Iterator[list[str]]:
    """What Kubernetes runs in a container: its command, its probes, its hooks."""
    words = [*container.get("command", []), *container.get("args", [])]
    probes = [container.get(name, {}) for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    hooks = container.get("lifecycle", {}).values()
    yield from (w for w in [words, *(c["exec"]["command"] for c in [*probes, *hooks] if "exec" in c)] if w)


def scripts() -> Iterator[tuple[str, str]]:
    """(where it is, script) of all that is run; a list of words as the script that a shell would read as them."""
    for pod in pods():
        for container in pod.containers:
            for words in of_container(container):
                script = words[2] if words[:2] in SHELLS else "".join(f"'{word}' " for word in words)
                yield f"{pod.name}/{container['name']}", script
    for name, job in ray_jobs().items():
        yield name, job["entrypoint"]
    for name, text in of_kind("ConfigMap")["repsep-recipe"]["data"].items():
        if name.endswith(".sh"):
            yield f"settings/{name}", text
    for name, service in COMPOSE["services"].items():
        if service["image"] == IMAGE:
            yield f"compose/{name}", "".join(f"'{word}' " for word in service["command"])
        if "healthcheck" in service:
            yield f"compose/{name}/healthcheck", "".join(f"'{word}' " for word in service["healthcheck"]["test"][1:])
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for number, script in enumerate(AWS[key]):
            yield f"aws/{key}/{number}", script


def examples() -> Iterator[tuple[str, str]]:
    """(file, command) of all that a comment or a page shows."""
    for file in sorted(INFRA.rglob("*")):
        if file.is_file() and file.parent.name != "dev" and file.suffix != ".json":
            for command in shown(file.read_text(), page=file.suffix == ".md"):
                yield str(file.relative_to(INFRA)), command


RUN, SHOWN = list(scripts()), list(examples())


def programs(where: str) -> list[str]:
    return [context.command_path for place, script in RUN if place == where for context in check(script)]


@pytest.mark.parametrize(("where", "script"), RUN, ids=[where for where, _ in RUN])
def test_a_command_that_is_run_is_understood(where: str, script: str) -> None:
    assert list(simple_commands(script)), "there is a command"
    check(script)


@pytest.mark.parametrize(("file", "command"), SHOWN, ids=[f"{file}-{n}" for n, (file, _) in enumerate(SHOWN)])
def test_a_command_that_is_shown_is_understood(file: str, command: str) -> None:
    assert check(command)


def test_nothing_is_overlooked() -> None:
    """Each of our stages, Ray's and MLflow's start, the hook of spot machines."""
    contexts = [context for _, script in RUN for context in check(script)]
    found = {context.command_path for context in contexts}
    assert found == {
        *(f"repsep {stage}" for stage in ("prepare", "train", "sweep", "evaluate", "register", "segment", "report")),
        *(f"ray {verb}" for verb in ("start", "stop", "health-check", "drain-node")),
        "mlflow server",
    }
    assert len(contexts) >= 20
    assert len(SHOWN) >= 4
    assert {context.command_path for _, command in SHOWN for context in check(command)} >= {
        "ray job submit",
        "repsep train",
    }


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("repsep trian --config x", click.UsageError),
        ("repsep train --confg x", click.NoSuchOption),
        ("repsep segment a b --limit many", click.BadParameter),
        ("repsep segment a b c", click.UsageError),
        ("python jobs/trian.py", UnknownProgramError),
        ("python jobs/train.py --steps 3", click.NoSuchOption),
        ("set -e\npython jobs/train.py --config", click.BadOptionUsage),
        ("repsepp train", UnknownProgramError),
        ("ray start --head --dashbord-host 0.0.0.0", click.NoSuchOption),
        ("ray stop && ray start --head --port http", click.BadParameter),
        ("ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION", click.MissingParameter),
        ("ray drain-node --reason SPOT --reason-message x", click.BadParameter),
        ("ray job submit --adress http://x -- python jobs/train.py", click.NoSuchOption),
        ("ray job submit -- python jobs/train.py --confg x", click.NoSuchOption),
        ("ray job submit", click.MissingParameter),
        ("mlflow server --allowed-host x", click.NoSuchOption),
        ("mlflow sever", click.UsageError),
        ("A=b python -c 'import x, '", SyntaxError),
        ("bash /etc/other/train.sh", UnknownProgramError),
    ],
)
def test_a_command_that_is_wrong_is_found(script: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        check(script)


def test_a_script_is_split_as_a_shell_does_it() -> None:
    script = "A=b repsep x 'c; d' >f || [ $? -eq 3 ] # a comment\nset -e; (e | f) # g\n"
    assert list(simple_commands(script)) == [
        ["repsep", "x", "c; d"],
        ["[", "$?", "-eq", "3", "]"],
        ["set", "-e"],
        ["e"],
        ["f"],
    ]


def test_what_ray_pods_are_started_with_are_options_of_ray_start() -> None:
    known = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
    for name, cluster in ray_clusters().items():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert set(group["rayStartParams"]) <= known, name
            assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay takes strings"


def test_recipes_and_settings_in_commands_load(etc_repsep: Path) -> None:
    """`--config` where the file can be seen from here, and each `--set`."""
    loaded = 0
    for script in [script for _, script in [*RUN, *SHOWN]]:
        for context in check(script):
            if "settings" in context.params:
                given = context.params["config"] or ""
                config = str(etc_repsep / given.removeprefix(SCRIPTS)) if given.startswith(SCRIPTS) else None
                load_recipe(config, context.params["settings"])
                loaded += config is not None
    assert loaded >= 10


def test_the_scripts_that_are_called_exist() -> None:
    called = {
        words[1].removeprefix(SCRIPTS) for _, script in RUN for words in simple_commands(script) if words[0] == "bash"
    }
    assert called == {name for name in of_kind("ConfigMap")["repsep-recipe"]["data"] if name.endswith(".sh")}


@pytest.mark.parametrize("name", ["train.sh", "segment.sh"])
@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_script_fails_as_its_command_does_but_for_images_that_could_not_be_read(
    name: str, code: int, etc_repsep: Path, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    script = f'echo "$@" >>{tmp_path}/called\n[ "$1" = jobs/report.py ] || exit {code}\n'
    python.write_text(f"#!/bin/sh\n{script}")
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", str(etc_repsep / name)], env=environment, check=False)
    assert done.returncode == (0 if name == "segment.sh" and code == 3 else code)
    called = (tmp_path / "called").read_text().splitlines()
    stages = {"train.sh": 5, "segment.sh": 2}[name]
    assert len(called) == (stages if done.returncode == 0 else 1), "the first failure ends it"
    assert done.returncode != 0 or called[-1].startswith("jobs/report.py")


def test_the_argo_stages_run_the_same_commands_as_the_jobs() -> None:
    alone = [words for _, script in RUN if "train.sh" in _ for words in simple_commands(script) if words[0] == "python"]
    staged = [next(simple_commands(doc["spec"]["entrypoint"])) for doc in argo_jobs().values()]
    assert staged[:-1] == alone
    assert staged[-1] == ["bash", "/etc/repsep/segment.sh"]
    assert (ROOT / "jobs").is_dir()
    assert all(parsed(words) for words in alone)


def test_files_that_the_page_names_exist() -> None:
    page = (INFRA / "README.md").read_text()
    named = set(re.findall(r"\binfra/[\w./-]+", page)) - {"infra/.env"}
    named |= {f"infra/{name}" for name in re.findall(r"`((?:aws|dev|docker|kuberay|monitoring)/[\w./-]*)`", page)}
    assert len(named) >= 12
    assert all((ROOT / name).exists() for name in named), named
    told = {line for line in page.splitlines() if line.startswith("## ") and "not run here" in line}
    assert len(told) == 5, "nobody takes for tried what was not"
