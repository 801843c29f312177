#!/usr/bin/env python3
"""Command: folders of images and masks become a sharded dataset."""

from __future__ import annotations

import click

from jobs.options import main, read_recipe, recipe_options, show


@click.command("prepare")
@recipe_options
def command(config: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Turn image and mask pairs into a sharded dataset, and check the labels.

    The source (prepare.source) holds images/SPLIT/*, masks/SPLIT/*.png and classes.json; prepare.layout reads public
    data sets as they come. Pairs that are wrong are listed in rejects.parquet with the reason.
    """
    from pipelines.prepare import prepare

    recipe, workspace = read_recipe(config, settings)
    show(prepare(workspace, recipe.prepare), as_json)


if __name__ == "__main__":
    main(command)
