from __future__ import annotations

import pytest
import torch
from counting_env import Counting
from tensordict import TensorDict

from datamodules.rollout.episodes import EpisodeBuilder, steps_as_items
from datamodules.rollout.stream import TensorStream

LIMIT = 7


class _Cycling:
    """Takes actions 0, 1, 2, ... in turn, and counts the episodes that were begun."""

    def __init__(self) -> None:
        self.clock, self.begun = 0, 0

    def begin(self, observation, state, generator, frames):
        self.begun += len(observation)
        return {"age": torch.zeros(len(observation), dtype=torch.int64)}

    def act(self, observation, legal, carry, generator, frames):
        self.clock += 1
        action = torch.full(observation.shape[:2], self.clock % 3)
        return action, {"age": carry["age"] + 1}


def _stream(envs: int = 5, seed: int = 0) -> TensorStream:
    return TensorStream(Counting(envs, limit=LIMIT, seed=seed), _Cycling(), torch.Generator())


def _by_hand(chunk: TensorDict) -> list[dict[str, torch.Tensor]]:
    """Finished episodes of a chunk that begins with fresh ones, cut out environment by environment."""
    found = []
    for env in range(chunk.batch_size[0]):
        start = 0
        for step in range(chunk.batch_size[1]):
            if bool(chunk["terminated"][env, step] | chunk["truncated"][env, step]):
                rows = chunk[env, start : step + 1]
                found.append(
                    {
                        "observation": torch.cat([rows["observation"], rows["next_observation"][-1:]]),
                        "legal": torch.cat([rows["legal"], rows["next_legal"][-1:]]),
                        "state": torch.cat([rows["state"], rows["next_state"][-1:]]),
                        **{name: rows[name] for name in ("action", "reward", "terminated")},
                    }
                )
                start = step + 1
    return found


@pytest.mark.parametrize("chunk_steps", [1, 2, 5, 40])
def test_episodes_are_whole_padded_and_free_of_the_next_one(chunk_steps):
    """The same steps in chunks of any length give the same episodes, and zeros behind each end."""
    whole = _stream().collect(40, 0)
    stream, builder = _stream(), EpisodeBuilder(5, LIMIT)
    made = [builder.items(stream.collect(chunk_steps, 0)) for _ in range(40 // chunk_steps)]
    items = torch.cat([item for item in made if item is not None])
    expected = _by_hand(whole)
    assert len(items) == len(expected) > 20
    lengths = items["filled"].sum(1).tolist()
    assert min(lengths) < max(lengths) == LIMIT
    for name, size in (("observation", LIMIT + 1), ("legal", LIMIT + 1), ("state", LIMIT + 1), ("action", LIMIT)):
        assert items[name].shape[1] == size, name
    remaining = list(expected)
    for item, length in zip(items, lengths, strict=True):
        assert item["filled"].tolist() == [True] * length + [False] * (LIMIT - length)
        for name in ("observation", "legal", "state", "action", "reward", "terminated"):
            used = length + (name in ("observation", "legal", "state"))
            assert not item[name][used:].any(), name  # nothing of the episode after
        same = [
            number
            for number, one in enumerate(remaining)
            if all(torch.equal(item[name][: len(value)], value) for name, value in one.items())
            and len(one["action"]) == length
        ]
        assert same
        del remaining[same[0]]
    assert remaining == []


def test_the_step_after_the_last_is_of_the_same_episode():
    """``Counting`` shows an episode's own number: one episode, one number, also at its end."""
    stream, builder = _stream(), EpisodeBuilder(5, LIMIT)
    items = builder.items(stream.collect(40, 0))
    assert items is not None
    for item in items:
        length = int(item["filled"].sum())
        seen = item["observation"][: length + 1, 0]
        assert len(set(seen[:, 0].tolist())) == 1
        assert seen[:, 1].tolist() == list(range(length + 1))


def test_last_steps_are_filled_and_only_terminations_terminate():
    stream, builder = _stream(), EpisodeBuilder(5, LIMIT)
    items = builder.items(stream.collect(40, 0))
    assert items is not None
    ends = set()
    for item in items:
        length = int(item["filled"].sum())
        assert not item["terminated"][: length - 1].any()
        ends.add((length == LIMIT, bool(item["terminated"][length - 1])))
    # before the limit it terminated, at the limit either
    assert ends == {(False, True), (True, False), (True, True)}


def test_unfinished_episodes_wait_and_survive_a_checkpoint():
    stream, builder = _stream(), EpisodeBuilder(5, LIMIT)
    builder.items(stream.collect(3, 0))
    other = EpisodeBuilder(5, LIMIT)
    other.load_state_dict(builder.state_dict())
    chunk = stream.collect(20, 0)
    ours, theirs = builder.items(chunk), other.items(chunk)
    assert ours is not None
    assert theirs is not None
    for name in ours.keys():  # noqa: SIM118 - a TensorDict
        assert torch.equal(ours[name], theirs[name])


def test_no_episode_ends_no_item():
    stream = TensorStream(Counting(2, limit=9, ends=False), _Cycling(), torch.Generator())
    assert EpisodeBuilder(2, 9).items(stream.collect(8, 0)) is None


def test_too_long_an_episode_is_named():
    stream = TensorStream(Counting(2, limit=9, ends=False), _Cycling(), torch.Generator())
    with pytest.raises(ValueError, match="EpisodeBuilder: length must cover whole episodes, one is longer than 4"):
        EpisodeBuilder(2, 4).items(stream.collect(9, 0))


def test_steps_become_items_with_what_was_seen_after_them():
    chunk = _stream().collect(12, 0)
    items = steps_as_items(chunk)
    assert len(items) == 60
    flat = chunk.flatten(0, 1)
    for name in ("observation", "legal", "state"):
        assert torch.equal(items[name][:, 0], flat[name])
        assert torch.equal(items[name][:, 1], flat[f"next_{name}"])
    for name in ("action", "reward", "terminated"):
        assert torch.equal(items[name][:, 0], flat[name])
    assert sorted(items.keys()) == ["action", "legal", "observation", "reward", "state", "terminated"]
