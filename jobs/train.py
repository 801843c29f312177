#!/usr/bin/env python3
"""Command: train a segmentor, also as `ray job submit --working-dir . jobs/train.py`."""

from __future__ import annotations

import click

from jobs.options import main, prepare_if_none, read_recipe, recipe_options, show


@click.command("train")
@recipe_options
def command(config: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Train a segmentor with Ray Train on the latest prepared dataset.

    Run again after any interruption, it goes on from the last checkpoint. Without a config it trains on generated
    demo data. Against a cluster: ray job submit --working-dir . -- python jobs/train.py --config RECIPE
    """
    from pipelines.train import train

    recipe, workspace = read_recipe(config or "demo", settings)
    if config is None and recipe.train.dataset is None:
        prepare_if_none(workspace, recipe)
    show(train(workspace, recipe), as_json)


if __name__ == "__main__":
    main(command)
