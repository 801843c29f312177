#!/usr/bin/env python3
"""Command: all stages in order."""

from __future__ import annotations

import click

from jobs.options import main, read_recipe, recipe_options, show


@click.command("workflow")
@recipe_options
def command(config: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Run prepare, (sweep,) train, evaluate, register, (segment,) report.

    A stage that is done says "cached". After an interruption, run it again.
    """
    from pipelines.workflow import run_workflow

    recipe, _ = read_recipe(config or "demo", settings)
    for receipt in run_workflow(recipe):
        show(receipt, as_json)


if __name__ == "__main__":
    main(command)
