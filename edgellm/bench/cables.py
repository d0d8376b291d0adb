"""Devices on a network of cables, each as slow as it shall be: namespaces around a switch.

Linux, root and iproute2. What a device sends leaves at its cable's speed, in the order that it was
sent (the kernel's token bucket); what comes to it comes as others send it. So links are directed.
The delay of a real network is not there. Nothing of this machine's own network is touched.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess

from edgellm.bench.link import QUEUE, check_rate
from edgellm.errors import DeviceError

BURST = "2kb"
"""What may leave at once: a packet, as on a wire."""
WITHIN_S = 20.0
_NETWORK = "10.78.0"


class Cables:
    """A switch and ``count`` devices, numbered from 1, until ``remove``."""

    def __init__(self, count: int) -> None:
        """Raises DeviceError where the system does not let us."""
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise DeviceError(
                    f"shaped links need Linux and {tool!r}.", hint="Install iproute2."
                )
        self._prefix = f"edgellm-bench-{os.getpid()}-{secrets.token_hex(3)}"
        self._made: list[str] = []
        try:
            switch = self._namespace("switch")
            _run("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
            _run("ip", "-n", switch, "link", "set", "switch", "up")
            for number in range(1, count + 1):
                self._plug(number, switch)
        except BaseException:
            self.remove()
            raise

    def namespace(self, number: int) -> str:
        """Its name, for ``place``."""
        return f"{self._prefix}-{number}"

    @staticmethod
    def address(number: int) -> str:
        return f"{_NETWORK}.{number}"

    def shape(self, number: int, rate: str | None) -> None:
        """What this device sends leaves at ``rate``, such as 100mbit; None: as fast as it can."""
        inside = ("tc", "-n", self.namespace(number), "qdisc")
        where = ("dev", "eth0", "root")
        if rate is None:
            _try(*inside, "del", *where)
        else:
            shape = ("tbf", "rate", check_rate(rate), "burst", BURST, "latency", QUEUE)
            _run(*inside, "replace", *where, *shape)

    def remove(self) -> None:
        """Their processes must have ended."""
        while self._made:
            _try("ip", "netns", "del", self._made.pop())

    def _namespace(self, name: str) -> str:
        full = f"{self._prefix}-{name}"
        _run("ip", "netns", "add", full)
        self._made.append(full)
        return full

    def _plug(self, number: int, switch: str) -> None:
        device, port = self._namespace(str(number)), f"port{number}"
        cable = ("type", "veth", "peer", "name", port, "netns", switch)
        _run("ip", "-n", device, "link", "add", "eth0", *cable)
        _run("ip", "-n", switch, "link", "set", port, "master", "switch", "up")
        _run("ip", "-n", device, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
        for name in ("lo", "eth0"):
            _run("ip", "-n", device, "link", "set", name, "up")


def _try(*command: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end, whatever comes of it."""
    return subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)


def _run(*command: str) -> None:
    done = _try(*command)
    if done.returncode:
        said = done.stderr.strip()[:200] or f"exit code {done.returncode}"
        raise DeviceError(
            f"no network of our own can be made: {' '.join(command[:4])}: {said}.",
            hint="Run as root on Linux.",
        )
