"""The RPCs, and what the server knows of a session beside net_2: whose it is, who has it, what it has answered."""

from sft_cloud.service.absent import Checks
from sft_cloud.service.health import HEALTH_SERVICE, Health
from sft_cloud.service.registry import DONE, Entry, Registry
from sft_cloud.service.servicer import SplitTrainingService, log_closed

__all__ = [
    "DONE",
    "HEALTH_SERVICE",
    "Checks",
    "Entry",
    "Health",
    "Registry",
    "SplitTrainingService",
    "log_closed",
]
