"""The ``edgellm`` command's beginning and end: Ctrl-C is answered from the first moment on.

The imports of the commands take a while, so they come last.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        from edgellm.cli.app import execute  # noqa: PLC0415 - see the module

        code = execute(sys.argv[1:])
    except KeyboardInterrupt:
        # Nothing runs yet, or nothing any more.
        os.write(2, b"Stopped.\n")
        os._exit(130)
    finally:
        # The command has ended: there is nothing to interrupt but the interpreter's own end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)
