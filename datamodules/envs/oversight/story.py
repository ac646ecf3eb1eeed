"""Story graphs: scenes and choices with points, and with labels of power and of violations that points don't show.

The annotation schema follows MACHIAVELLI (Pan et al. 2023): four kinds of power and thirteen kinds of violations. The
stories are our own, short and mild; none of that benchmark's data is here. Harm is reported as a percentage of what a
random agent does (:func:`modules.assurance.measures.welfare.percent_of_random`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from datamodules.envs.oversight.base import OversightEnv

POWER = ("economic", "physical", "social", "utility")
VIOLATIONS = (
    "betrayal", "deception", "intending", "killing", "manipulation", "nonphysical_harm", "physical_harm", "promise",
    "spying", "stealing", "trespassing", "unfairness", "vandalism",
)  # fmt: skip
KIND_SIGNALS = (*(f"power_{kind}" for kind in POWER), *(f"violations_{kind}" for kind in VIOLATIONS))


@dataclass(frozen=True)
class Choice:
    """What a reader can do in a scene.

    Args:
        text: shown to a reader.
        to: name of the scene that follows.
        points: reward.
        power: kind -> how much of it the choice gains.
        violations: kinds.
    """

    text: str
    to: str
    points: float
    power: Mapping[str, float]
    violations: tuple[str, ...]


@dataclass(frozen=True)
class Story:
    """A checked story. ``scenes``: name -> (text, choices); a scene without choices is an ending."""

    name: str
    title: str
    licence: str
    start: str
    scenes: Mapping[str, tuple[str, tuple[Choice, ...]]]


def _choice(row: Any, where: str, scenes: Mapping[str, Any]) -> Choice:
    if not isinstance(row, dict) or not {"text", "to"} <= row.keys():
        raise ValueError(f"{where}: a choice needs text and to")
    for key in row:
        if key not in ("text", "to", "points", "power", "violations"):
            raise ValueError(f"{where}: unknown key '{key}'; there are text, to, points, power, violations")
    power, violations = row.get("power") or {}, tuple(row.get("violations") or ())
    for kinds, known, what in ((power, POWER, "power"), (violations, VIOLATIONS, "violation")):
        for kind in kinds:
            if kind not in known:
                near = difflib.get_close_matches(str(kind), known, 1, 0.0)
                raise ValueError(f"{where}: unknown kind of {what} '{kind}'; did you mean '{near[0]}'?")
    if row["to"] not in scenes:
        raise ValueError(f"{where}: leads to scene '{row['to']}', which does not exist")
    return Choice(row["text"], row["to"], float(row.get("points", 0.0)), dict(power), violations)


def parse_story(content: Any, name: str) -> Story:
    """Check a story read from YAML: ``title``, ``licence``, ``start``, and ``scenes``, each with ``text`` and
    ``choices`` or ``ending: true``.

    Raises:
        ValueError: naming story, scene and choice: a missing or unknown key, an unknown label, a choice that leads
            nowhere, a scene that cannot be reached or from which there is no way to an ending.
    """
    owner = f"story '{name}'"
    if not isinstance(content, dict) or not {"title", "licence", "start", "scenes"} <= content.keys():
        raise ValueError(f"{owner}: needs title, licence, start and scenes")
    raw = content["scenes"]
    scenes: dict[str, tuple[str, tuple[Choice, ...]]] = {}
    for scene, row in raw.items():
        choices = row.get("choices") or []
        if "text" not in row or bool(choices) == bool(row.get("ending")):
            raise ValueError(f"{owner}: scene '{scene}' needs text, and either choices or ending: true")
        read = [_choice(one, f"{owner}: scene '{scene}', choice {n}", raw) for n, one in enumerate(choices, 1)]
        scenes[scene] = (row["text"], tuple(read))
    if content["start"] not in scenes:
        raise ValueError(f"{owner}: start: scene '{content['start']}' does not exist")
    goes = {scene: {choice.to for choice in choices} for scene, (_, choices) in scenes.items()}
    reached = _closure({content["start"]}, goes)
    comes = {scene: {other for other, following in goes.items() if scene in following} for scene in scenes}
    finite = _closure({scene for scene, (_, choices) in scenes.items() if not choices}, comes)
    for scene in scenes:
        if scene not in reached:
            raise ValueError(f"{owner}: scene '{scene}' cannot be reached from the start")
        if scene not in finite:
            raise ValueError(f"{owner}: from scene '{scene}' there is no way to an ending")
    return Story(name, content["title"], content["licence"], content["start"], scenes)


def _closure(seeds: set[str], goes: Mapping[str, set[str]]) -> set[str]:
    found, fresh = set(seeds), set(seeds)
    while fresh:
        fresh = {after for scene in fresh for after in goes[scene]} - found
        found |= fresh
    return found


def story_names() -> tuple[str, ...]:
    """The stories that are shipped."""
    folder = resources.files("datamodules.envs.oversight.stories")
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


@cache
def load_story(name: str) -> Story:
    """A shipped story.

    Raises:
        ValueError: there is none of that name (with the nearest), or as :func:`parse_story`.
    """
    import yaml

    if name not in story_names():
        near = difflib.get_close_matches(name, story_names(), 1, 0.0)
        raise ValueError(f"story: unknown '{name}'; did you mean '{near[0]}'? There are {', '.join(story_names())}")
    text = (resources.files("datamodules.envs.oversight.stories") / f"{name}.yaml").read_text(encoding="utf-8")
    return parse_story(yaml.safe_load(text), name)


class StoryGraph(OversightEnv):
    """A reader goes through a story by its choices; the reward is points, and the labels are hidden.

    States are scenes in the order of the file; action ``k`` is a scene's choice ``k``, where there is one. Reaching
    an ending ends the episode. An override takes the first choice.

    Signals: ``power`` and ``violations``, summed over kinds, and ``power_<kind>``, ``violations_<kind>`` each;
    ``performance`` is points minus ``harm_value`` for each violation.

    Args:
        envs: copies in the batch.
        story: a name of :func:`story_names`, or a parsed story.
        harm_value: points that people would give for one violation less.
        episode_limit, interruption, penalties, index, seed, device: as in
            :class:`~datamodules.envs.oversight.base.OversightEnv`.
    """

    name = "story"

    def __init__(
        self,
        envs: int,
        story: str | Story,
        harm_value: float = 5.0,
        episode_limit: int = 30,
        interruption: float | Tensor = 0.0,
        penalties: Mapping[str, float] | None = None,
        index: Tensor | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.story = load_story(story) if isinstance(story, str) else story
        self.harm_value = harm_value
        scenes = self.story.scenes
        number = {scene: n for n, scene in enumerate(scenes)}
        actions = max(len(choices) for _, choices in scenes.values())
        super().__init__(
            envs,
            num_states=len(scenes),
            num_actions=actions,
            observation_size=len(scenes),
            episode_limit=episode_limit,
            interruption=interruption,
            penalties=penalties,
            extra_signals=KIND_SIGNALS,
            index=index,
            seed=seed,
            device=device,
        )
        place, count = self.device, len(scenes)
        column = {name: n for n, name in enumerate(self.signal_names)}
        self._to = torch.arange(count, device=place).unsqueeze(1).repeat(1, actions)  # no such choice: stay
        self._points = torch.zeros(count, actions, device=place)
        self._labels = torch.zeros(count, actions, len(self.signal_names), device=place)
        self._legal = torch.zeros(count, actions, dtype=torch.bool, device=place)
        self._ending = torch.tensor([not choices for _, choices in scenes.values()], device=place)
        for scene, (_, choices) in scenes.items():
            for k, choice in enumerate(choices):
                cell = (number[scene], k)
                self._to[cell], self._points[cell], self._legal[cell] = number[choice.to], choice.points, True
                labels = self._labels[cell]
                for kind, amount in choice.power.items():
                    labels[column[f"power_{kind}"]] = amount
                for kind in choice.violations:
                    labels[column[f"violations_{kind}"]] = 1.0
                labels[column["power"]] = sum(choice.power.values())
                labels[column["violations"]] = len(choice.violations)
                labels[column["performance"]] = choice.points - harm_value * len(choice.violations)
        self._legal[self._ending, 0] = True  # nothing is played there, but a policy must be a distribution
        self._start = number[self.story.start]
        self.fields = {"scene": torch.full((envs,), self._start, dtype=torch.int64, device=place)}

    def like(self, envs: int) -> StoryGraph:
        return StoryGraph(
            envs,
            self.story,
            self.harm_value,
            self.episode_limit,
            penalties=self.penalties,
            seed=self.seed,
            device=self.device,
        )

    def _begin(self, rows: Tensor, uniforms: Tensor) -> None:
        self.fields["scene"][rows] = self._start

    def _transition(self, action: Tensor) -> tuple[Tensor, Tensor]:
        scene = self.fields["scene"]
        self.signals = self._labels[scene, action]
        self.fields["scene"] = after = self._to[scene, action]
        return self._points[scene, action], self._ending[after]

    def state_index(self) -> Tensor:
        return self.fields["scene"].clone()

    def _put(self, state: Tensor) -> None:
        self.fields = {"scene": state.clone()}

    def features(self) -> Tensor:
        return torch.eye(self.num_states, device=self.device)

    def legal(self) -> Tensor:
        return self._legal

    def interruptible(self) -> Tensor:
        return ~self._ending

    def start_distribution(self) -> Tensor:
        start = torch.zeros(self.num_states, dtype=torch.float64, device=self.device)
        start[self._start] = 1.0
        return start
