#!/usr/bin/env python3
"""Command: all stages in order."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import click

from jobs.options import EXIT_FAILED_IMAGES, main, read_recipe, recipe_options, show


@click.command("workflow")
@recipe_options
@click.option("--plan", is_flag=True, help="Run nothing: print for each stage whether it would run, and why.")
@click.option("--verify", is_flag=True, help="Outputs of what is done are hashed, not only their sizes compared.")
def command(config: str | None, settings: tuple[str, ...], as_json: bool, plan: bool, verify: bool) -> None:
    """Run prepare, (sweep,) train, evaluate, register, (segment,) report.

    A stage that is done says "cached". After an interruption, run it again. --json prints a line for each stage; exit
    code 3 means that some images could not be segmented.
    """
    from pipelines.stage import verifying
    from pipelines.workflow import plan_workflow, run_workflow

    recipe, _ = read_recipe(config or "demo", settings)
    failed_images = 0
    with verifying() if verify else contextlib.nullcontext():
        if plan:
            for stage, what in plan_workflow(recipe):
                click.echo(json.dumps({"stage": stage, "plan": what}) if as_json else f"{stage:9} {what}")
            return
        for receipt in run_workflow(recipe, Path(config or "demo").stem):
            show(receipt, as_json)
            failed_images += receipt.results.get("failed_rows", 0)
    if failed_images:
        raise click.exceptions.Exit(EXIT_FAILED_IMAGES)


if __name__ == "__main__":
    main(command)
