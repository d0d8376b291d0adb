"""A child process that dies as one does whose library was built for another processor."""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    os.kill(os.getpid(), signal.SIGILL)
