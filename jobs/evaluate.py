#!/usr/bin/env python3
"""Command: results of a model on a split."""

from __future__ import annotations

import click

from jobs.options import main, read_recipe, recipe_options, show


@click.command("evaluate")
@recipe_options
def command(config: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Evaluate a model: mIoU and IoU per class on a split, beside a per-position prior.

    By default the latest trained model on the val split of the latest dataset.
    """
    from pipelines.evaluate import evaluate

    recipe, workspace = read_recipe(config, settings)
    show(evaluate(workspace, recipe), as_json)


if __name__ == "__main__":
    main(command)
