#!/usr/bin/env python3
"""Command: the registered versions of a model."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from jobs.options import main, read_recipe, recipe_options


@click.group("models")
def command() -> None:
    """List, compare, promote and roll back the versions of the model register.name."""


@command.command("list")
@recipe_options
def list_versions(config: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """All versions, newest first."""
    from pipelines.registry import versions

    recipe, _ = read_recipe(config, settings)
    for found in versions(recipe):
        if as_json:
            click.echo(json.dumps(asdict(found)))
            continue
        miou = "-" if found.miou is None else f"{found.miou:.4f}"
        click.echo(f"{found.version:>4}  mIoU {miou:7} {', '.join(found.aliases) or '-':22} {found.reason}")


@command.command("compare")
@click.argument("first")
@click.argument("second")
@recipe_options
def compare(first: str, second: str, config: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Whether version FIRST is better than SECOND, on the evaluations that they were registered with."""
    from pipelines.registry import compare_versions

    recipe, _ = read_recipe(config, settings)
    decision = compare_versions(recipe, first, second)
    if as_json:
        click.echo(json.dumps(asdict(decision)))
        return
    for row in decision.classes:
        ours, theirs = ("     -" if row[key] is None else f"{row[key]:.4f}" for key in ("ours", "theirs"))
        change = "" if row["difference"] is None else f"{row['difference']:+.4f}"
        click.echo(f"{row['name']:24} {ours}  {theirs}  {change}")
    for check in decision.checks:
        click.echo(f"{'passed ' if check.passed else 'refused'}  {check.asked}: {check.found}")


@command.command("promote")
@click.argument("version")
@click.option("--reason", required=True, help="Why, for those who come after; it is kept with the version.")
@recipe_options
def promote(version: str, reason: str, config: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Make VERSION champion, whatever the gate said."""
    from pipelines.registry import promote

    recipe, _ = read_recipe(config, settings)
    promote(recipe, version, reason)
    _say(recipe.register_.name, version, as_json)


@command.command("rollback")
@recipe_options
def rollback(config: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Make the version champion that the champion replaced."""
    from pipelines.registry import roll_back

    recipe, _ = read_recipe(config, settings)
    _say(recipe.register_.name, roll_back(recipe), as_json)


def _say(name: str, version: str, as_json: bool) -> None:
    found = {"name": name, "version": version, "alias": "champion"}
    click.echo(json.dumps(found) if as_json else f"{name} version {version} is champion")


if __name__ == "__main__":
    main(command)
