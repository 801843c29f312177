#!/usr/bin/env python3
"""Command: the whole pipeline on this machine, with nothing to start by hand."""

from __future__ import annotations

import time

import click

from jobs.options import debug_option, main, set_option, show


@click.command("demo")
@click.option("--data", help="A folder with images/, masks/ and classes.json; by default generated scenes.")
@click.option("--folder", default=".repsep", show_default=True, help="Everything is kept here.")
@set_option
@debug_option
def command(data: str | None, folder: str, settings: tuple[str, ...]) -> None:
    """Train, register and label a bucket: local Ray, an S3 endpoint on loopback, MLflow on sqlite, in one folder."""
    from pipelines.demo import run_demo

    began = time.monotonic()
    with run_demo(data, folder, settings) as demo:
        for receipt in demo.receipts:
            show(receipt, as_json=False)
    click.echo(f"all of it took {time.monotonic() - began:.0f} s; the bucket's content is kept in {demo.bucket_folder}")
    click.echo(f"runs and models:  .venv/bin/mlflow ui --backend-store-uri {demo.tracking_uri}")
    click.echo(f"report page:      {demo.page}")


if __name__ == "__main__":
    main(command)
