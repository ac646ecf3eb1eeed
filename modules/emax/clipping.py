"""Clipping of the gradients of an ensemble: each member's by itself, or all as one vector."""

from __future__ import annotations

from torch import Tensor

from modules.emax.settings import Clip


def clip_members(agents: Tensor, mixer: Tensor | None, clip: Clip) -> Tensor:
    """Scale gradients down in place to ``clip.norm``.

    Args:
        agents: ``[members, size]``.
        mixer: ``[members, ...]``, clipped together with the member's agents, or ``[1, ...]``, shared and clipped by
            itself; ``None``: no mixer learns.
        clip: norm and scope.

    Returns:
        Norms ``[members]`` before clipping.
    """
    joined = mixer is not None and mixer.shape[0] == agents.shape[0]
    squares = agents.square().sum(1)
    mixer_squares = None if mixer is None else mixer.square().sum(1)
    if joined:
        assert mixer_squares is not None
        squares = squares + mixer_squares
        mixer_squares = squares
    if clip.scope == "global":
        total = squares.sum() if joined or mixer_squares is None else squares.sum() + mixer_squares.sum()
        squares = total.expand(agents.shape[0])
        mixer_squares = None if mixer is None else total.expand(mixer.shape[0])
    norms = squares.sqrt()
    if clip.norm is not None:
        agents.mul_((clip.norm / (norms + 1e-6)).clamp_max(1.0).unsqueeze(1))
        if mixer is not None and mixer_squares is not None:
            mixer.mul_((clip.norm / (mixer_squares.sqrt() + 1e-6)).clamp_max(1.0).unsqueeze(1))
    return norms
