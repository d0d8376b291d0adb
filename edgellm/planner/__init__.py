"""Which device runs which layers. Pure: offers and a model card in, a plan or an error out."""

from edgellm.planner.inputs import DeviceOffer, ModelCard, StageMemory
from edgellm.planner.manual import ManualStage, parse_stages
from edgellm.planner.plans import plan_by_memory, plan_manual

__all__ = [
    "DeviceOffer",
    "ManualStage",
    "ModelCard",
    "StageMemory",
    "parse_stages",
    "plan_by_memory",
    "plan_manual",
]
