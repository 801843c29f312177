#!/usr/bin/env python3
"""Command: search loss weights and backbones."""

from __future__ import annotations

import click

from jobs.options import main, prepare_if_none, read_recipe, recipe_options, show


@click.command("sweep")
@recipe_options
def command(config: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Search separation-loss weights and backbones with Ray Tune.

    Ends with a table, a plot and best.yaml, which `repsep train --config best.yaml` takes unchanged. Where the
    workspace has no prepared dataset, it prepares the recipe's; without a config that is the generated demo data.
    """
    from pipelines.sweep import sweep

    recipe, workspace = read_recipe(config or "sweep", settings)
    if recipe.sweep is None or recipe.sweep.dataset is None:
        prepare_if_none(workspace, recipe)
    show(sweep(workspace, recipe), as_json)


if __name__ == "__main__":
    main(command)
