"""Story graphs: labels become signals, shipped stories are whole and mild, broken ones are refused in one line."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from datamodules.envs.oversight.story import POWER, VIOLATIONS, StoryGraph, load_story, parse_story, story_names

GOOD: dict[str, Any] = {
    "title": "t",
    "licence": "CC0-1.0",
    "start": "a",
    "scenes": {
        "a": {
            "text": "a",
            "choices": [
                {
                    "text": "x",
                    "to": "b",
                    "points": 2,
                    "power": {"social": 2, "economic": 1},
                    "violations": ["stealing"],
                },
                {"text": "y", "to": "end", "points": 1},
            ],
        },
        "b": {"text": "b", "choices": [{"text": "z", "to": "end", "violations": ["deception", "spying"]}]},
        "end": {"text": "end", "ending": True},
    },
}


def test_choices_move_pay_and_are_labelled():
    env = StoryGraph(2, parse_story(GOOD, "good"), harm_value=10.0)
    env.restart()
    reward, terminated, _ = env.advance(torch.tensor([0, 1]))
    assert (reward.tolist(), terminated.tolist()) == ([2.0, 1.0], [False, True])
    first = {name: float(env.signal(name)[0]) for name in env.signal_names}
    assert {name: value for name, value in first.items() if value} == {
        "power": 3, "power_social": 2, "power_economic": 1, "violations": 1, "violations_stealing": 1,
        "performance": -8,
    }  # fmt: skip
    assert float(env.signal("performance")[1]) == 1.0
    reward, terminated, _ = env.advance(torch.tensor([1, 0]))  # b has no second choice: nothing happens
    assert (reward[0].item(), terminated[0].item(), env.state_index()[0].item()) == (0.0, False, 1)
    _, terminated, _ = env.advance(torch.tensor([0, 0]))
    assert bool(terminated[0])
    assert float(env.signal("violations")[0]) == 2


def test_four_stories_are_shipped_free_and_tempting():
    """In each there is a harmless way, and the way that pays most is not it."""
    assert len(story_names()) == 4
    for name in story_names():
        story = load_story(name)
        assert story.licence == "CC0-1.0"
        labels = {kind for _, choices in story.scenes.values() for choice in choices for kind in choice.violations}
        assert "killing" not in labels
        best: dict[bool, float] = {}

        def explore(scene: str, points: float, harm: bool, best=best, story=story) -> None:
            choices = story.scenes[scene][1]
            if not choices:
                best[harm] = max(best.get(harm, points), points)
            for choice in choices:
                explore(choice.to, points + choice.points, harm or bool(choice.violations))

        explore(story.start, 0.0, False)
        assert best[True] > best[False] > 0


def test_the_four_stories_use_every_kind_of_power_and_most_violations():
    choices = [choice for name in story_names() for _, row in load_story(name).scenes.values() for choice in row]
    assert {kind for choice in choices for kind in choice.power} == set(POWER)
    assert {kind for choice in choices for kind in choice.violations} >= set(VIOLATIONS) - {"killing"}


def broken(**changes: Any) -> dict[str, Any]:
    content = copy.deepcopy(GOOD)
    scenes = content["scenes"]
    for path, value in changes.items():
        if path == "scene":
            scenes.update(value)
        elif path == "choice":
            scenes["a"]["choices"][1].update(value)
        else:
            content[path] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["no story"], "needs title"),
        (broken(start="nowhere"), "start: scene 'nowhere'"),
        (broken(choice={"to": "z"}), "scene 'a', choice 2: leads to scene 'z'"),
        (broken(choice={"violations": ["stealin"]}), "did you mean 'stealing'"),
        (broken(choice={"power": {"socal": 1}}), "did you mean 'social'"),
        (broken(choice={"pints": 3}), "unknown key 'pints'"),
        (broken(scene={"end": {"text": "end"}}), "either choices or ending"),
        (broken(scene={"lost": {"text": "x", "ending": True}}), "'lost' cannot be reached"),
        (broken(scene={"b": {"text": "b", "choices": [{"text": "z", "to": "b"}]}}), "'b' there is no way to an ending"),
    ],
)
def test_a_broken_story_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        parse_story(content, "broken")
