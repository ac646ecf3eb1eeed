"""Names of the single-agent oversight worlds and what they stand for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from datamodules.envs.oversight.base import OversightEnv
from datamodules.envs.oversight.off_switch import OffSwitch
from datamodules.envs.oversight.story import StoryGraph, story_names
from datamodules.envs.oversight.supervisor import AbsentSupervisor
from datamodules.envs.oversight.vase import Vase

WORLDS: Mapping[str, Callable[..., OversightEnv]] = {
    "off_switch": OffSwitch,
    "vase": Vase,
    "supervisor": AbsentSupervisor,
}


def known_worlds() -> tuple[str, ...]:
    """Everything that :func:`make_world` makes."""
    return (*WORLDS, *(f"story/{name}" for name in story_names()))


def make_world(world: str, envs: int, options: Mapping[str, Any] | None = None, **arguments: Any) -> OversightEnv:
    """``envs`` copies of ``world``.

    Args:
        world: one of :func:`known_worlds`.
        envs: copies.
        options: constructor arguments of the world that differ from its defaults.
        arguments: ``interruption``, ``penalties``, ``index``, ``seed``, ``device``.

    Raises:
        ValueError: an unknown world (with the nearest names), or options that it does not have or that do not fit.
    """
    known = known_worlds()
    if world not in known:
        near = difflib.get_close_matches(world, known, 3, 0.4)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"make_world: world: unknown '{world}'{hint}; there are {', '.join(known)}")
    given = {**dict(options or {}), **arguments}
    try:
        if world.startswith("story/"):
            return StoryGraph(envs, **{"story": world.removeprefix("story/"), **given})
        return WORLDS[world](envs, **given)
    except TypeError as error:
        raise ValueError(f"make_world: options of {world}: {error}") from None
