"""`repsep`: one command for each stage. Commands are imported when they are called, so that --help is immediate."""

from __future__ import annotations

import importlib

import click

from jobs import options

COMMANDS = {
    "workflow": "Run all stages in order.",
    "prepare": "Images and masks become a sharded dataset.",
    "sweep": "Search loss weights and backbones.",
    "train": "Train a segmentor.",
    "evaluate": "Results of a model on a split.",
    "register": "Register a model; champion if better.",
    "models": "List, compare, promote and roll back versions.",
    "segment": "Label every image under a prefix.",
    "report": "A page and a model card of what was done.",
    "demo": "Everything once, on generated images.",
}


class LazyGroup(click.Group):
    """Knows the names and one line of help of its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"jobs.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup)
@click.version_option(package_name="repsep")
def repsep() -> None:
    """Semantic segmentation with vision transformers, from labelled images to a labelled bucket.

    Every command takes the same recipe (--config) and reads its section; `repsep COMMAND --help` says more.
    """


def main() -> None:
    """The entry point."""
    options.main(repsep)
