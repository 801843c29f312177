"""Command lines inside manifests and pages, parsed by the command line interfaces that they are for; nothing is run.

A script is split into its simple commands. Programs of ours, of Ray and of MLflow go through their own click commands:
an unknown option, a value of the wrong type or a missing argument raises. Of other programs the names are known, so
that a misspelt one of ours does not pass for somebody else's.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

import click
from mlflow.cli import cli as mlflow
from ray.scripts.scripts import cli as ray

from jobs.cli import repsep
from tests.infra.manifests import ROOT

SEPARATORS = "();<>|&\n"
OTHERS = (
    *(".", "[", "argo", "aws", "docker", "export", "helm", "kubectl", "mkdir", "nvidia-smi", "openssl", "pg_isready"),
    *("pytest", "set", "sleep", "umask", "wget"),
)
VERBS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
SCRIPTS = "/etc/repsep/"
"""Where pods find the scripts of settings.yaml."""


class UnknownProgramError(Exception):
    """Neither one of ours nor one that the manifests are known to use."""


def simple_commands(script: str) -> Iterator[list[str]]:
    """The words of each simple command, those inside $( ) first; what a redirection names is no command."""
    while (start := script.find("$(")) >= 0:
        inside = script[start + 2 : _closing(script, start + 2)]
        yield from simple_commands(inside)
        script = script.replace(f"$({inside})", "substituted", 1)
    doubled = script.replace("\n", "\n\n")  # a comment takes the end of its line with it
    lexer = shlex.shlex(doubled, posix=True, punctuation_chars=SEPARATORS)
    lexer.whitespace, lexer.whitespace_split = " \t", True
    words: list[str] = []
    target = False
    for word in lexer:
        if set(word) <= set(SEPARATORS):
            if words and not target:
                yield words
            words, target = [], word.strip() in ("<", ">", ">>")
        elif words or not re.fullmatch(r"\w+=.*", word):  # an assignment before the command
            words.append(word)
    if words and not target:
        yield words


def _closing(script: str, position: int) -> int:
    """Where the parenthesis closes that was opened before `position`."""
    depth = 1
    while depth:
        depth += {"(": 1, ")": -1}.get(script[position], 0)
        position += 1
    return position - 1


def parsed(words: Sequence[str]) -> list[click.Context]:
    """What click made of it: nothing of somebody else's program, two contexts where Ray is handed a command of ours."""
    program, *rest = words
    if program.startswith("jobs/"):  # executable, with a shebang
        program, rest = "python", list(words)
    if program in ("python", "python3"):
        if rest[0] == "-c":
            compile(rest[1], "python -c", "exec")
            return []
        folder, _, file = rest[0].rpartition("/")
        if folder not in ("jobs", "benchmarks") or not (ROOT / rest[0]).is_file():
            raise UnknownProgramError(f"{rest[0]} is no file of jobs/ or benchmarks/")
        if folder == "benchmarks":
            return []
        return [_parse(repsep, [file.removesuffix(".py"), *rest[1:]], "repsep")]
    if program == "make":
        if unknown := {word for word in rest if "=" not in word} - VERBS:
            raise UnknownProgramError(f"make has no verb {', '.join(sorted(unknown))}")
        return []
    if program == "bash":
        if not rest[0].startswith(SCRIPTS):
            raise UnknownProgramError(f"{rest[0]} is not among the scripts in {SCRIPTS}")
        return []
    if program in ("repsep", "mlflow"):
        return [_parse({"repsep": repsep, "mlflow": mlflow}[program], rest, program)]
    if program == "ray":
        context = _parse(ray, rest, program)
        inner = context.params.get("entrypoint") or ()
        return [context, *(parsed(list(inner)) if inner else [])]
    if program not in OTHERS:
        raise UnknownProgramError(" ".join(words))
    return []


def check(script: str) -> list[click.Context]:
    """All contexts of a script. Raises click.UsageError or UnknownProgramError."""
    return [context for words in simple_commands(script) for context in parsed(words)]


def _parse(command: click.Command, words: Sequence[str], program: str) -> click.Context:
    path = [program]
    while isinstance(command, click.Group):
        inner = command.get_command(click.Context(command), words[0]) if words else None
        if inner is None:
            raise click.UsageError(f"{' '.join(path)} has no command {words[:1]}")
        path.append(words[0])
        command, words = inner, words[1:]
    return command.make_context(" ".join(path), list(words))


def shown(text: str, *, page: bool) -> Iterator[str]:
    """Commands of ours, of Ray and of MLflow that indented lines of a page, or of comments, show to a reader."""
    lines = re.findall(r"^ {4,}(\S.*)$" if page else r"^# {2,}(\S.*)$", text, re.MULTILINE)
    for command in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines():
        if re.match(r"([A-Z_]+=\S* )*(ray|repsep|mlflow|python) ", command):
            yield command
