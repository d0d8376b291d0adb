"""Devices of various speeds on one machine: control groups that allow a part of a processor's time.

Linux, and root or a group that is ours to divide. Processes are put into a group before they start
anything (``place``), so that all that a device does counts: its node, its stages, its probe.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from edgellm.errors import DeviceError
from edgellm.probe.limits import Groups, groups_of

PERIOD_US = 4_000
"""Short against what a stage computes for a token, so that a throttled device is slower all the
time: whoever computes for less than its part of a period is not slowed down at all. A kernel's
clock ticks every 1 to 4 ms and enforces nothing between."""
_LEAST_QUOTA_US = 1_000
"""The kernel takes no less."""
_HINT = "Run as root on Linux, where control groups may be made."


class Throttles:
    """Groups of ours, below that of this process."""

    def __init__(self, base: Path, version: int) -> None:
        self._base = base
        self._version = version

    def group(self, name: str, share: float) -> Path:
        """The folder of a group that may use ``share`` of one processor's time; 0.5 is a half.

        Raises DeviceError where the system does not let us.
        """
        folder = self._base / name
        period = max(PERIOD_US, round(_LEAST_QUOTA_US / share))
        quota = round(period * share)
        try:
            folder.mkdir(exist_ok=True)
            if self._version == 1:
                (folder / "cpu.cfs_period_us").write_text(str(period), encoding="ascii")
                (folder / "cpu.cfs_quota_us").write_text(str(quota), encoding="ascii")
            else:
                (folder / "cpu.max").write_text(f"{quota} {period}", encoding="ascii")
        except OSError as error:
            raise _refused(error) from error
        return folder


@contextlib.contextmanager
def throttles() -> Iterator[Throttles]:
    """Groups for as long as it takes; what runs in them must have ended before.

    Raises DeviceError where the system does not let us make any.
    """
    groups = groups_of("cpu")
    if groups is None:
        raise DeviceError("this system has no control groups for processors.", hint=_HINT)
    base = groups.folders[0] / f"edgellm-bench-{os.getpid()}-{secrets.token_hex(3)}"
    try:
        base.mkdir()
        _hand_down(groups, base)
    except OSError as error:
        with contextlib.suppress(OSError):
            base.rmdir()
        raise _refused(error) from error
    try:
        yield Throttles(base, groups.version)
    finally:
        for folder in (*(each for each in base.iterdir() if each.is_dir()), base):
            with contextlib.suppress(OSError):  # somebody is in it still: it goes with them
                folder.rmdir()


def _hand_down(groups: Groups, base: Path) -> None:
    """Version 2 divides processors among a group's children only where it was told to."""
    if groups.version == 2:
        for folder in (groups.folders[0], base):
            (folder / "cgroup.subtree_control").write_text("+cpu", encoding="ascii")


def _refused(error: OSError) -> DeviceError:
    return DeviceError(f"no control group can be made: {error.strerror or error}.", hint=_HINT)
