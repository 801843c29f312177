"""What all commands share: the recipe's options, errors in one paragraph, results for people or as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pipelines.config import Recipe
    from pipelines.stage import Receipt

EXIT_FAILED_IMAGES = 3

config_option = click.option(
    "--config", "-c", help="Recipe: a YAML file, or the name of one that comes with repsep (demo)."
)
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a key of the recipe, e.g. train.steps=200. Repeatable.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the receipt as one JSON object on stdout.")
debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--config, --set, --json and --debug."""
    for option in (debug_option, json_option, set_option, config_option):
        command = option(command)
    return command


def read_recipe(config: str | None, settings: tuple[str, ...]) -> tuple[Recipe, str]:
    """The recipe and its workspace, which is printed: under a Ray job it is not in the current folder."""
    from pipelines.config import load_recipe
    from pipelines.progress import say
    from pipelines.workflow import workspace_of

    recipe = load_recipe(config, settings)
    workspace = workspace_of(recipe)
    say(f"workspace: {workspace}")
    return recipe, workspace


def prepare_if_none(workspace: str, recipe: Recipe) -> None:
    """Prepare the recipe's dataset where the workspace has none yet."""
    from pipelines.errors import RepsepError
    from pipelines.prepare import prepare
    from pipelines.progress import say
    from pipelines.stage import latest_receipt
    from pipelines.workflow import describe

    try:
        latest_receipt(workspace, "prepare")
    except RepsepError:
        for line in describe(prepare(workspace, recipe.prepare)):
            say(line)


def show(receipt: Receipt, as_json: bool) -> None:
    """Print what a stage made."""
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(receipt)))
        return
    from pipelines.workflow import describe

    for line in describe(receipt):
        click.echo(line)


def main(command: click.Command) -> None:
    """Run a command as a program: exit code 0, 1 failed, 2 wrong usage, 3 done with failed images."""
    debug = "--debug" in sys.argv[1:]
    try:
        code = command.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.Abort:
        click.echo("stopped", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except Exception as error:
        code = _explain(error, debug)
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    from pipelines.errors import RepsepError

    if isinstance(error, RepsepError):
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    if not debug:
        click.echo(
            f"Error: {type(error).__name__}: {error}\n(this is not expected; --debug shows where it comes from)",
            err=True,
        )
    return 1
