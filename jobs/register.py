#!/usr/bin/env python3
"""Command: a model version in the registry, and the gate before champion."""

from __future__ import annotations

import click

from jobs.options import main, read_recipe, recipe_options, show


@click.command("register")
@recipe_options
def command(config: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Register the evaluated model in MLflow; it becomes champion if it is shown to be better.

    The first model becomes champion. A later one must have a higher mIoU on the same images with a paired bootstrap
    interval that is above zero, and no class that loses too much; otherwise it gets the alias challenger.
    """
    from pipelines.register import register

    recipe, workspace = read_recipe(config, settings)
    show(register(workspace, recipe), as_json)


if __name__ == "__main__":
    main(command)
