"""Pages without a browser: an episode is a list of instructions that earn the reward in their order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from modules.contracts.browsing import ActionPrompts, ActionStatus, EpisodeSpec, PageView, parse_instruction
from modules.language.backends.base import Reply, Request
from modules.rci.agent import Act, Agent, Film, Probe, Record, Reset, Strategy
from modules.rci.driving import drive

#: What the HTML says of where an episode is: task, seed, instructions done.
MARK = re.compile(r"\[at (\S+) (\S+) (\d+)\]")
Answer = Callable[[Request], str]


class FakePages:
    """Args:
    script: the right instructions of an episode.
    html, goal: texts around the mark of the state, and in place of the utterance.
    experts: tell the right instruction.
    trouble: statuses that an instruction ends the episode with, by (seed, number of the instruction from 0); -1: at
        its start.
    slots: pages.

    An instruction whose XPath holds ``missing`` has no match and changes nothing; any other wrong one ends the episode
    with reward -1. Everything asked is noted in ``log``.
    """

    def __init__(
        self,
        script: Callable[[EpisodeSpec], Sequence[str]],
        html: str = "",
        goal: str = "do it",
        experts: bool = False,
        trouble: Mapping[tuple[str, int], ActionStatus] | None = None,
        slots: int = 8,
    ) -> None:
        self.script, self.html, self.goal, self.experts, self.slots = script, html, goal, experts, slots
        self.trouble: dict[tuple[str, int], ActionStatus] = dict(trouble or {})
        self.live: dict[int, tuple[EpisodeSpec, int, PageView]] = {}
        self.log: list[Any] = []

    @property
    def action_prompts(self) -> ActionPrompts:
        return ActionPrompts()

    def _view(self, spec: EpisodeSpec, done: int) -> PageView:
        steps = self.script(spec)
        mark = f"[at {spec.task} {spec.seed} {done}]"
        return PageView(self.goal, self.html + mark, f"button {mark}", expert=steps[done] if self.experts else None)

    def reset_pages(self, episodes: Mapping[int, EpisodeSpec]) -> dict[int, PageView]:
        for slot, spec in episodes.items():
            self.log.append(Reset(spec))
            view = self._view(spec, 0)
            if status := self.trouble.get((spec.seed, -1)):
                view = PageView("", "", "", done=True, reason="no page", status=status)
            self.live[slot] = spec, 0, view
        return {slot: self.live[slot][2] for slot in episodes}

    def step_pages(self, instructions: Mapping[int, str]) -> dict[int, PageView]:
        for slot, text in instructions.items():
            self.log.append(Act(text))
            spec, done, view = self.live[slot]
            assert not view.done, "an instruction after the end"
            parse_instruction(text)  # what is none never gets here
            steps = self.script(spec)
            if status := self.trouble.get((spec.seed, done)):
                view = PageView(self.goal, "", "", done=True, reward=1.0, reason="lost", status=status)
            elif text == steps[done]:
                done += 1
                if done == len(steps):
                    view = PageView(self.goal, "", "", done=True, reward=1.0, reason="done")
                else:
                    view = self._view(spec, done)
            elif "missing" in text:
                view = replace(view, status="no_match")
            else:
                view = PageView(self.goal, "", "", done=True, reward=-1.0, reason="wrong")
            self.live[slot] = spec, done, view
        return {slot: self.live[slot][2] for slot in instructions}

    def probe_pages(self, instructions: Mapping[int, str]) -> dict[int, ActionStatus]:
        def status(text: str) -> ActionStatus:
            try:
                parse_instruction(text)
            except ValueError:
                return "malformed"
            return "no_match" if "missing" in text else "ok"

        return {slot: status(text) for slot, text in instructions.items()}

    def screenshots(self, slots: Sequence[int]) -> dict[int, bytes]:
        return {slot: self.live[slot][2].html.encode() for slot in slots}


def play(
    agent: Agent,
    strategy: Strategy,
    specs: Iterable[EpisodeSpec],
    pages: Any,
    answer: Answer,
    width: int = 1,
    film: bool = False,
) -> list[Record]:
    """Records of the episodes, in the order of ``specs``. Requests are appended to ``pages.log`` where there is one."""
    log = getattr(pages, "log", [])

    def generate(effects: Sequence[tuple[int, Request]]) -> list[Reply]:
        log.extend(request for _, request in effects)
        return [Reply(answer(request), "stop", len(request.text), 1) for _, request in effects]

    def by_slot(work: Any, key: str) -> Any:
        def run(effects: Sequence[tuple[int, Any]]) -> list[Any]:
            found = work({slot: getattr(effect, key) for slot, effect in effects})
            return [found[slot] for slot, _ in effects]

        return run

    handlers = {
        Request: generate, Reset: by_slot(pages.reset_pages, "spec"), Act: by_slot(pages.step_pages, "instruction"),
        Probe: by_slot(pages.probe_pages, "instruction"),
        Film: lambda effects: list(pages.screenshots([slot for slot, _ in effects]).values()),
    }  # fmt: skip
    loops = (agent.episode("it", strategy, spec, film) for spec in specs)
    found = dict(drive(loops, width, handlers))
    return [found[number] for number in sorted(found)]


def requests(pages: FakePages) -> list[Request]:
    return [entry for entry in pages.log if isinstance(entry, Request)]


def where(request: Request) -> tuple[EpisodeSpec, int]:
    """The episode that a prompt is about, and how many instructions are done in it."""
    task, seed, done = MARK.findall(request.text)[-1]
    return EpisodeSpec(task, seed), int(done)
