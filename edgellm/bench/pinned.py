"""Becomes another program, pinned to processors, that ends with its parent.

Run as ``python -m edgellm.bench.pinned PROCESSORS PROGRAM ARGUMENTS...``, started by ``Child``: a
program that knows nothing of us is then watched and ended like any child. Both its outputs go where
a child's standard error goes. PROCESSORS is like ``0,1``; empty pins nothing.
"""

from __future__ import annotations

import os
import sys

from edgellm.engine.childside import open_channel


def main() -> None:
    processors, program, *arguments = sys.argv[1:]
    _channel = open_channel()  # its pipes close when this process becomes the other
    if processors and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, map(int, processors.split(",")))
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main()
