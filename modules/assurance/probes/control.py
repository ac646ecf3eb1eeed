"""To be written."""

from modules.assurance.probe import Probe

CAPABILITIES: dict[str, str] = {}
PROBES: tuple[Probe, ...] = ()
