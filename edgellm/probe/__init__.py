"""What this machine can do, measured through llama.cpp itself on a small block of random weights.

``figures`` is pure; ``synthetic`` writes the block; ``child`` is the process that runs it, so that
what crashes is not ours; ``measure`` asks it and computes; ``machine`` keeps the result.
"""

from edgellm.probe.conditions import Conditions, battery_note, read_conditions
from edgellm.probe.figures import DeviceFigures
from edgellm.probe.machine import Probed, device_figures

__all__ = [
    "Conditions",
    "DeviceFigures",
    "Probed",
    "battery_note",
    "device_figures",
    "read_conditions",
]
