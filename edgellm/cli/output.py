"""What every command does alike: standard output for results, standard error for people,
errors as sentences and exit codes.

With ``--json`` exactly one JSON object goes to standard output, whatever happens; everything
for people goes to standard error.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, cast

from edgellm.errors import EdgeError

INTERRUPTED = 130


def run(work: Callable[[], Coroutine[Any, Any, None]], as_json: bool) -> None:
    """Run a command's coroutine; turn errors into words and an exit code."""
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_interruptible(work))
    except EdgeError as error:
        fail(error, as_json)
    except (KeyboardInterrupt, asyncio.CancelledError):
        tell("Stopped.")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - a bug: said without a traceback, unless asked for
        if os.environ.get("EDGELLM_DEBUG"):
            traceback.print_exc()
        unexpected = EdgeError(
            f"internal error: {type(error).__name__}: {error}.",
            hint="Set EDGELLM_DEBUG=1 to see where, and please report it.",
        )
        fail(unexpected, as_json)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loop where it is installed (extra ``fast``): its hops are shorter."""
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return cast(Callable[[], asyncio.AbstractEventLoop], uvloop.new_event_loop)


async def _interruptible(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """SIGTERM and a closed terminal end a command as Ctrl-C does: in order, with nothing left
    behind. A second one does not disturb the first's tidying up."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    signals = () if sys.platform == "win32" else (signal.SIGTERM, signal.SIGHUP)

    def end() -> None:
        for each in signals:
            loop.add_signal_handler(each, lambda: None)
        if task is not None:
            task.cancel()

    for each in signals:
        loop.add_signal_handler(each, end)
    await work()


def fail(error: EdgeError, as_json: bool) -> NoReturn:
    """Say what is wrong on standard error, and as an object with ``--json``; exit."""
    tell(f"edgellm: {error}")
    if as_json:
        emit({"error": {**error.to_dict(), "exit_code": error.exit_code}})
    sys.exit(error.exit_code)


def emit(data: dict[str, Any]) -> None:
    """The one JSON object of a command."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """A piece of the answer, as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def tell(text: str) -> None:
    """A line for the person in front of the screen."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
