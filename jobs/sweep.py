#!/usr/bin/env python3
"""Command: search loss weights and backbones."""

from __future__ import annotations

import click

from jobs.options import main, read_recipe, recipe_options, show


@click.command("sweep")
@recipe_options
def command(config: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Search separation-loss weights and backbones with Ray Tune.

    Ends with a table, a plot and best.yaml, which `repsep train --config best.yaml` takes unchanged. Without a config
    it searches on the generated demo data.
    """
    from pipelines.prepare import prepare
    from pipelines.sweep import sweep

    recipe, workspace = read_recipe(config or "sweep", settings)
    if recipe.sweep is None or recipe.sweep.dataset is None:
        show(prepare(workspace, recipe.prepare), as_json=False)
    show(sweep(workspace, recipe), as_json)


if __name__ == "__main__":
    main(command)
