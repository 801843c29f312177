#!/usr/bin/env python3
"""Command: label every image under a prefix, or in its shards."""

from __future__ import annotations

import json
from typing import Any

import click

from jobs.options import (
    EXIT_FAILED_IMAGES,
    config_option,
    debug_option,
    json_option,
    main,
    read_recipe,
    set_option,
    show,
)


@click.command("segment")
@click.argument("source", required=False)
@click.argument("target", required=False)
@click.option("--model", help="models:/NAME@ALIAS, models:/NAME/VERSION, or the URI of a segmentor's directory.")
@click.option("--dry-run", is_flag=True, help="List and compare only; write nothing.")
@click.option("--limit", type=int, help="Segment at most this many images (or shards).")
@click.option("--retry-failed", is_flag=True, help="Take images again that failed before.")
@click.option("--shard", metavar="I/N", help="Take the I-th of N parts; N such jobs side by side make one output.")
@click.option(
    "--overwrite", is_flag=True, help="Replace an output that was written with another model or other settings."
)
@click.option("--max-failure-rate", type=float, help="Stop when a larger share of the images fails (default 0.5).")
@click.option(
    "--price-per-hour", type=float, help="What the cluster costs; the report then has the cost of 1,000 images."
)
@config_option
@set_option
@json_option
@debug_option
def command(
    source: str | None,
    target: str | None,
    config: str | None,
    settings: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Segment every image in SOURCE into TARGET: a mask and a row for each.

    \b
    SOURCE and TARGET are URIs: s3://bucket/prefix, gs://..., or a folder. SOURCE holds images, or shards of them
    (Parquet with an image column, tar in WebDataset layout), or is one such object.
      repsep segment s3://photos/2026 s3://masks/2026 --model models:/streets@champion

    \b
    TARGET/masks/KEY.png       indexed PNG of class ids, KEY being the image's path below SOURCE
    TARGET/masks/SHARD.parquet for shards: a row with the PNG for each image
    TARGET/results/*.parquet   a row for each image: status, size, pixels per class, confidence, reason of a failure
    TARGET/report.html, .json  counts, rates, failures, class areas, a sample of overlays

    Run it again after any interruption, or when images were added: only what is missing is done. A bad image becomes
    a failed row and never stops the rest. Endpoint and keys come from AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY and AWS_REGION; the model registry from MLFLOW_TRACKING_URI. More settings, such as
    segment.confidence or segment.max_pixels, are keys of the recipe: --set segment.confidence=true.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done with failed images.
    """
    from pipelines.segment import segment
    from pipelines.stage import Receipt

    flags |= {"source": source, "target": target}
    given = [
        f"segment.{name}={json.dumps(value, ensure_ascii=False)}"
        for name, value in flags.items()
        if value is not None and value is not False
    ]
    recipe, workspace = read_recipe(config, (*settings, *given))
    found = segment(workspace, recipe, dry_run=dry_run)
    if not isinstance(found, Receipt):
        counts = [f"{number} {name.replace('_', ' ')}" for name, number in found.items()]
        click.echo(json.dumps(found) if as_json else ", ".join(counts))
        return
    show(found, as_json)
    if found.results["failed_rows"]:
        raise click.exceptions.Exit(EXIT_FAILED_IMAGES)


if __name__ == "__main__":
    main(command)
