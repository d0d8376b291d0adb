"""Puts the commands together and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, cast

import typer

from edgellm import __version__
from edgellm.cli.bench import bench
from edgellm.cli.chaos import chaos
from edgellm.cli.chat import chat
from edgellm.cli.demo import demo
from edgellm.cli.devices import devices
from edgellm.cli.doctor import doctor
from edgellm.cli.forget import forget
from edgellm.cli.invite import invite
from edgellm.cli.join import join
from edgellm.cli.leave import leave
from edgellm.cli.output import INTERRUPTED, fail
from edgellm.cli.plan import plan
from edgellm.cli.ps import ps
from edgellm.cli.rivals import rivals
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
for command in (demo, join, invite, chat, devices, forget, leave, plan, ps, doctor, bench):
    app.command()(command)
for command in (chaos, rivals):
    app.command(hidden=True)(command)


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


def execute(arguments: Sequence[str]) -> Any:
    """Run the command that the arguments name; what ``sys.exit`` is to be told."""
    try:
        return app(list(arguments), standalone_mode=False)
    except _ParserError as error:
        if not arguments:  # it is the help text
            error.show()
            return UsageError.exit_code
        message = error.format_message().rstrip(".")
        fail(UsageError(f"{message}.", hint="See --help."), "--json" in arguments)
    except typer.Abort:
        return INTERRUPTED
