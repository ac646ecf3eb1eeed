"""The multi-agent core: what every module that acts for a team shares, and its policy in TorchRL's terms."""

from modules.marl.dropout import PartnerDropout
from modules.marl.module import MultiAgentModule
from modules.marl.policy import MultiAgentPolicy

__all__ = ["MultiAgentModule", "MultiAgentPolicy", "PartnerDropout"]
