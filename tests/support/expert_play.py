"""Scripted experts at their tasks, several episodes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.envs.browser.experts import EXPERTS
from datamodules.envs.browser.pool import MiniWoBPool
from modules.contracts.browsing import EpisodeSpec, PageView, parse_instruction

LONGEST = 25  # instructions


@dataclass
class Played:
    seed: str
    first: PageView
    last: PageView
    instructions: list[str]


def play(pool: MiniWoBPool, task: str, seeds: Sequence[int]) -> list[Played]:
    """Episodes by the task's expert, several at once."""
    waiting, playing, played = list(seeds), {}, []
    while waiting or playing:
        idle = [slot for slot in range(pool.slots) if slot not in playing][: len(waiting)]
        episodes = {slot: EpisodeSpec(task, str(waiting.pop(0))) for slot in idle}
        if episodes:
            for slot, view in pool.reset_pages(episodes).items():
                playing[slot] = Played(episodes[slot].seed, view, view, [])
        for one in playing.values():
            one.instructions.append(EXPERTS[task](one.last, tuple(one.instructions)))
            assert str(parse_instruction(one.instructions[-1])) == one.instructions[-1]
        for slot, view in pool.step_pages({slot: one.instructions[-1] for slot, one in playing.items()}).items():
            one = playing[slot]
            one.last = view
            if view.done or len(one.instructions) == LONGEST:
                played.append(playing.pop(slot))
    return played
