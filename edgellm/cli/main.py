"""The ``edgellm`` command: puts the commands together and nothing else."""

from __future__ import annotations

import sys
from typing import Annotated, cast

import typer

from edgellm import __version__
from edgellm.cli.bench import bench
from edgellm.cli.chat import chat, demo
from edgellm.cli.join import join
from edgellm.cli.output import INTERRUPTED, fail
from edgellm.errors import UsageError

_ParserError = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])
"""click's UsageError, by its public subclass: some releases of typer bring a click of their own."""

app = typer.Typer(
    name="edgellm",
    help="Run one model over several small devices.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(demo)
app.command()(chat)
app.command()(join)
app.command()(bench)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"edgellm {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which one.")
    ] = False,
) -> None:
    """Run one model over several small devices."""


def main() -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    try:
        code = app(standalone_mode=False)
    except _ParserError as error:
        if not arguments:  # it is the help text
            error.show()
            sys.exit(UsageError.exit_code)
        message = error.format_message().rstrip(".")
        fail(UsageError(f"{message}.", hint="See --help."), "--json" in arguments)
    except typer.Abort:
        sys.exit(INTERRUPTED)
    sys.exit(code)
