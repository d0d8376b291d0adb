"""Which device runs which layers. Pure: offers and a model card in, a plan or an error out."""

from edgellm.planner.cost import Prediction, StagePrediction
from edgellm.planner.inputs import DeviceOffer, ModelCard, StageMemory, StageWork
from edgellm.planner.manual import ManualStage, parse_stages
from edgellm.planner.plans import Explained, Situation, plan_as_asked, plan_for
from edgellm.planner.reasons import LeftOut, Solo
from edgellm.planner.speeds import DeviceSpeed, Link, Links, Workload

__all__ = [
    "DeviceOffer",
    "DeviceSpeed",
    "Explained",
    "LeftOut",
    "Link",
    "Links",
    "ManualStage",
    "ModelCard",
    "Prediction",
    "Situation",
    "Solo",
    "StageMemory",
    "StagePrediction",
    "StageWork",
    "Workload",
    "parse_stages",
    "plan_as_asked",
    "plan_for",
]
