#!/usr/bin/env python3
"""Command: the page and the model card of what a workspace holds."""

from __future__ import annotations

from pathlib import Path

import click

from jobs.options import main, read_recipe, recipe_options, show


@click.command("report")
@recipe_options
def command(config: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Write one HTML page, and a model card, of the latest of each stage in the workspace.

    `repsep workflow` ends with it; this is for stages that were run one by one. A stage that was not run is said to be
    absent, and one that does not belong to the others, such as the evaluation of an older model, is left out.
    """
    from pipelines.report import latest_receipts, report

    recipe, workspace = read_recipe(config, settings)
    name = Path(config).stem if config is not None else None
    show(report(workspace, recipe, latest_receipts(workspace), name), as_json)


if __name__ == "__main__":
    main(command)
