"""A prompt that outgrows the model's context fails its own episode and no other."""

from __future__ import annotations

from modules.contracts.browsing import EpisodeSpec, PageView
from modules.language.backends.base import PromptTooLongError, Reply, Request
from modules.rci.agent import Act, Agent, Reset, Strategy
from modules.rci.driving import drive
from modules.rci.module import answered
from modules.rci.prompting import PromptLibrary


class Small:
    """A model with room for the pages of some seeds; right where it answers."""

    identity = "small"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def generate(self, requests):
        self.batches.append(len(requests))
        for request in requests:
            if "long page" in request.text:
                raise PromptTooLongError("small: a prompt of 600 tokens, the context has 512")
        return [Reply("clickxpath //a") for _ in requests]

    def close(self) -> None: ...


def test_only_the_episode_with_the_long_prompt_fails():
    model = Small()
    agent = Agent(PromptLibrary("default"))
    seeds = ("short 1", "long 2", "short 3")

    def page(spec: EpisodeSpec) -> PageView:
        return PageView("click it", f"<p>{spec.seed.split()[0]} page</p>", "")

    handlers = {
        Request: lambda effects: answered(model, [request for _, request in effects]),
        Reset: lambda effects: [page(effect.spec) for _, effect in effects],
        Act: lambda effects: [PageView("click it", "", "", done=True, reward=1.0) for _ in effects],
    }
    strategy = Strategy(erci=-1, irci=0, state_grounding=False)
    loops = [agent.episode("direct", strategy, EpisodeSpec("some-task", seed)) for seed in seeds]
    results = {record.result.seed: record.result for _, record in drive(loops, 3, handlers)}
    assert [results[seed].strict for seed in seeds] == [True, False, True]
    assert [results[seed].overlong for seed in seeds] == [False, True, False]
    assert "600 tokens" in results["long 2"].reason
    assert not results["long 2"].error
    assert results["long 2"].calls == 0
    assert model.batches == [3, 1, 1, 1]
