#!/usr/bin/env python3
"""Command: results of a model on a split."""

from __future__ import annotations

import click

from jobs.options import main, read_recipe, recipe_options, show


@click.command("evaluate")
@recipe_options
@click.option("--corruptions", type=click.Choice(["none", "fast", "full"]), help="Also on corrupted images.")
def command(config: str | None, settings: tuple[str, ...], as_json: bool, corruptions: str | None) -> None:
    """Evaluate a model: IoU, boundaries, calibration and worst images on a split, beside a per-position prior.

    By default the latest trained model on the val split of the latest dataset. The masks of a finished `repsep segment`
    are judged with --set evaluate.predictions=TARGET; then no model runs.
    """
    from pipelines.evaluate import evaluate

    if corruptions is not None:
        settings = (*settings, f"evaluate.corruptions={corruptions}")
    recipe, workspace = read_recipe(config, settings)
    show(evaluate(workspace, recipe), as_json)


if __name__ == "__main__":
    main(command)
