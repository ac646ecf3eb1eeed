"""All probes, by file: what they measure on any module that offers what they need.

A probe file declares ``CAPABILITIES`` (name -> signature and meaning) for what its probes ask of a subject, and
``PROBES``. One capability has one meaning: files may ask for those that another file declares.
"""

from __future__ import annotations

import importlib
from functools import cache

from modules.assurance.probe import Probe

FILES = ("shared", "classifier", "oversight", "language", "feedback", "control", "games", "teams", "routing", "agents")


@cache
def all_probes() -> dict[str, Probe]:
    """Name -> probe, in the order of files.

    Raises:
        ValueError: two probes of one name.
    """
    found: dict[str, Probe] = {}
    for file in FILES:
        for probe in importlib.import_module(f"{__name__}.{file}").PROBES:
            if probe.name in found:
                raise ValueError(f"probes: two probes are named '{probe.name}'; the second stands in {file}.py")
            found[probe.name] = probe
    unknown = {(p.name, need) for p in found.values() for need in p.needs} - {
        (p.name, need) for p in found.values() for need in known_capabilities()
    }
    if unknown:
        raise ValueError(f"probes: nobody declares the capability that this probe needs: {sorted(unknown)[0]}")
    return found


@cache
def known_capabilities() -> dict[str, str]:
    """Capability -> its signature and meaning, of all probe files.

    Raises:
        ValueError: a capability declared twice.
    """
    known: dict[str, str] = {}
    for file in FILES:
        for name, meaning in importlib.import_module(f"{__name__}.{file}").CAPABILITIES.items():
            if name in known:
                raise ValueError(f"probes: capability '{name}' is declared twice; the second time in {file}.py")
            known[name] = meaning
    return known
