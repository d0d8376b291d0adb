"""Becomes another program, in a network and in a control group of its own. Linux.

Run as ``python -m edgellm.bench.place NAMESPACE GROUP PROGRAM ARGUMENTS...``; an empty NAMESPACE or
GROUP leaves that as it is. The program keeps our process number, descriptors and environment.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_NAMESPACES = Path("/run/netns")
"""Where iproute2 keeps them."""


def enter_network(namespace: str) -> None:
    """This thread, and what it starts from now on, has the network of ``namespace``.

    Only that: iproute2's own way in hides control groups. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(_NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), namespace)
    finally:
        os.close(descriptor)


def main() -> None:
    namespace, group, program, *arguments = sys.argv[1:]
    if group:
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    if namespace:
        enter_network(namespace)
    os.execvp(program, [program, *arguments])


if __name__ == "__main__":
    main()
