#!/usr/bin/env python3
"""Command: search loss weights and models."""

from __future__ import annotations

import click

from jobs.options import main, prepare_if_none, read_recipe, recipe_options, show


@click.command("sweep")
@recipe_options
def command(config: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Search separation-loss weights, models and learning rates with Ray Tune.

    Ends with a page and best.yaml, which `repsep train --config best.yaml` takes unchanged. Where the recipe names a
    prepare.source, that is prepared (or found done); else the workspace's dataset is taken, or generated demo data.
    """
    from pipelines.prepare import prepare
    from pipelines.progress import say
    from pipelines.sweep import sweep
    from pipelines.workflow import describe

    recipe, workspace = read_recipe(config or "sweep", settings)
    if recipe.sweep is None or recipe.sweep.dataset is None:
        if recipe.prepare.source is None:
            prepare_if_none(workspace, recipe)
        else:
            for line in describe(prepare(workspace, recipe.prepare)):
                say(line)
    show(sweep(workspace, recipe), as_json)


if __name__ == "__main__":
    main(command)
