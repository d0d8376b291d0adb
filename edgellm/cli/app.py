"""Puts the commands together and nothing else.

A command's module is imported when that command is asked for: the imports of all of them together
take longer than many a command.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, cast

import typer

from edgellm import __version__
from edgellm.cli.output import INTERRUPTED, fail
from edgellm.errors import UsageError

ParserError = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])
"""click's UsageError, by its public subclass: some releases of typer bring a click of their own."""

COMMANDS = (
    "demo",
    "join",
    "invite",
    "chat",
    "serve",
    "devices",
    "forget",
    "leave",
    "pull",
    "list",
    "rm",
    "plan",
    "ps",
    "doctor",
    "bench",
    "service",
)
"""As ``--help`` lists them. Each is the function of that name in the module of that name."""
HIDDEN = ("chaos", "rivals")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"edgellm {__version__}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which one.")
    ] = False,
) -> None:
    """Run one model over several small devices."""


def app_of(names: Sequence[str] = COMMANDS + HIDDEN) -> typer.Typer:
    """The command line with these commands only."""
    app = typer.Typer(
        name="edgellm",
        help="Run one model over several small devices.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_top)
    for name in names:
        function = getattr(import_module(f"edgellm.cli.{name}"), name)
        app.command(name, hidden=name in HIDDEN)(function)
    return app


def execute(arguments: Sequence[str]) -> Any:
    """Run the command that the arguments name; what ``sys.exit`` is to be told."""
    asked = arguments[0] if arguments else ""
    known = asked in COMMANDS or asked in HIDDEN
    app = app_of((asked,)) if known else app_of()
    try:
        return app(list(arguments), standalone_mode=False)
    except ParserError as error:
        if not arguments:  # it is the help text
            error.show()
            return UsageError.exit_code
        message = error.format_message().rstrip(".")
        fail(UsageError(f"{message}.", hint="See --help."), "--json" in arguments)
    except typer.Abort:
        return INTERRUPTED
