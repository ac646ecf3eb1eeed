from __future__ import annotations

import json
from pathlib import Path

import pytest
import scipy.stats
import torch
from tensordict import TensorDict

from datamodules.rollout import replay as replay_file
from datamodules.rollout.replay import INDEX, Replay

STORAGES = ("memory", "memmap")


def _items(numbers: range) -> TensorDict:
    """Items that tell their number in every kind of tensor that replay holds."""
    count = torch.tensor(list(numbers), dtype=torch.int64)
    return TensorDict(
        {
            "observation": count.float().view(-1, 1, 1, 1).expand(-1, 2, 3, 4) + torch.arange(4) / 8,
            "action": count.view(-1, 1, 1).expand(-1, 1, 3).clone(),
            "terminated": (count % 3 == 0).view(-1, 1),
            "legal": (count.view(-1, 1, 1) >> torch.arange(5)) % 2 == 1,
        },
        [len(count)],
    )


def _numbers(replay: Replay) -> list[int]:
    """Numbers of the items by their place in the ring; the other tensors must agree with them."""
    held = replay._items()
    numbers = held["action"][: len(replay), 0, 0].tolist()
    whole = _items(range(max(numbers) + 1))[torch.tensor(numbers)]
    for name, value in held.items():
        assert torch.equal(value[: len(replay)], whole[name]), name
    return numbers


def _replay(tmp_path: Path, capacity: int, storage: str = "memory", seed: int = 0, name: str = "scratch") -> Replay:
    return Replay(capacity, storage, tmp_path / name, seed)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_full_ring_forgets_the_oldest(tmp_path, storage):
    replay = _replay(tmp_path, 10, storage)
    assert len(replay) == 0
    replay.extend(_items(range(0, 4)))
    assert (len(replay), replay.cursor, _numbers(replay)) == (4, 4, [0, 1, 2, 3])
    replay.extend(_items(range(4, 9)))
    replay.extend(_items(range(9, 13)))  # over the end: 10, 11 and 12 take the places of 0, 1 and 2
    assert (len(replay), replay.cursor, replay.written) == (10, 3, 13)
    assert _numbers(replay) == [10, 11, 12, 3, 4, 5, 6, 7, 8, 9]
    replay.extend(_items(range(13, 23)))
    assert _numbers(replay) == [20, 21, 22, 13, 14, 15, 16, 17, 18, 19]
    replay.extend(_items(range(0, 0)))
    assert replay.written == 23


@pytest.mark.parametrize(("storage", "written"), [("memory", 30), ("memory", 97), ("memmap", 97)])
def test_samples_are_uniform_over_what_is_stored(tmp_path, storage, written):
    """Chi-square over items, and over the two halves of successive draws; only the newest 40 come."""
    replay = _replay(tmp_path, 40, storage, seed=3)
    for start in range(0, written, 10):
        replay.extend(_items(range(start, min(start + 10, written))))
    drawn = replay.sample(20_000)["action"][:, 0, 0]
    stored = range(max(written - 40, 0), written)
    counts = torch.bincount(drawn, minlength=written)
    assert int(counts[: stored.start].sum()) == 0
    assert scipy.stats.chisquare(counts[stored.start :].numpy()).pvalue > 1e-3
    pairs = torch.bincount((drawn[:-1] % 2) * 2 + drawn[1:] % 2, minlength=4)
    assert scipy.stats.chisquare(pairs.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("storage", STORAGES)
def test_sampling_depends_on_its_seed_alone(tmp_path, storage):
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(draws))
        replay = _replay(tmp_path, 40, storage, seed, f"scratch-{len(draws)}")
        replay.extend(_items(range(40)))
        draws.append(replay.sample(64)["action"])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_samples_do_not_change_with_the_ring(tmp_path):
    replay = _replay(tmp_path, 5)
    replay.extend(_items(range(5)))
    sample = replay.sample(8)
    kept = sample.clone()
    replay.extend(_items(range(5, 10)))
    assert torch.equal(sample["observation"], kept["observation"])


def _saved(replay: Replay, folder: Path, previous: Path | None = None) -> dict[str, int]:
    """Number of links of each file of a save."""
    folder.mkdir()
    replay.save(folder, previous)
    replay.saved_as(folder)
    return {path.name: path.stat().st_nlink for path in sorted(folder.iterdir()) if path.name != INDEX}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("written", [1, 7, 20, 25, 61])
def test_a_loaded_ring_goes_on_as_the_saved_one(tmp_path, monkeypatch, storage, written):
    """Contents, cursor and samples, before and after more items arrive."""
    monkeypatch.setattr(replay_file, "PART_ITEMS", 8)
    replay = _replay(tmp_path, 20, storage, seed=1)
    for number in range(written):
        replay.extend(_items(range(number, number + 1)))
    replay.sample(5)
    state = replay.state_dict()
    _saved(replay, tmp_path / "save")
    other = _replay(tmp_path, 20, storage, seed=2, name="other")
    other.load_state_dict(state)
    other.load(tmp_path / "save")
    for _ in range(2):
        assert (len(other), other.cursor, other.written) == (len(replay), replay.cursor, replay.written)
        assert _numbers(other) == _numbers(replay)
        assert torch.equal(other.sample(50)["observation"], replay.sample(50)["observation"])
        for ring in (replay, other):
            ring.extend(_items(range(written, written + 13)))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("capacity", "part"), [(20, 8), (24, 8), (20, 20), (20, 64), (17, 1), (9, 4)])
def test_linked_saves_hold_what_full_saves_hold(tmp_path, monkeypatch, storage, capacity, part):
    """Saves after any number of new items, over the ring's end too, whose last part may be short."""
    monkeypatch.setattr(replay_file, "PART_ITEMS", part)
    draw = torch.Generator().manual_seed(capacity + part)
    replay, previous, linked = _replay(tmp_path, capacity, storage), None, 0
    replay.extend(_items(range(3)))
    for number in range(40):
        folder = tmp_path / f"save-{number}"
        links = _saved(replay, folder, previous)
        linked += sum(count > 1 for count in links.values())
        fresh = Replay(capacity)
        fresh.load(folder)
        assert _numbers(fresh) == _numbers(replay), number
        assert fresh.cursor == replay.cursor
        previous = folder
        count = int(torch.randint(0, capacity + 1, (), generator=draw)) if number % 2 else number % 4
        replay.extend(_items(range(replay.written, replay.written + count)))
    assert linked > 0


def test_only_changed_parts_are_written_anew(tmp_path, monkeypatch):
    """Parts 0: places 0-7, 1: 8-15, 2: 16-19; each of four tensors has one file a part."""
    monkeypatch.setattr(replay_file, "PART_ITEMS", 8)
    replay = _replay(tmp_path, 20)
    replay.extend(_items(range(12)))
    assert set(_saved(replay, tmp_path / "a").values()) == {1}

    def linked(name: str, previous: str) -> set[str]:
        links = _saved(replay, tmp_path / name, tmp_path / previous)
        return {file.split(".")[1] for file, count in links.items() if count > 1}

    assert linked("b", "a") == {"000000", "000001"}  # nothing new
    replay.extend(_items(range(12, 15)))
    assert linked("c", "b") == {"000000"}
    replay.extend(_items(range(15, 21)))  # places 15-19 and 0: all three
    assert linked("d", "c") == set()
    replay.extend(_items(range(21, 24)))  # places 1-3
    assert linked("e", "d") == {"000001", "000002"}
    replay.extend(_items(range(24, 40)))  # places 4-19
    replay.extend(_items(range(40, 41)))  # and 0
    assert linked("f", "e") == set()


def test_files_of_another_object_are_not_linked(tmp_path):
    """Only this ring's own last save is known to hold the same: any other is written over, not trusted."""
    one, other = _replay(tmp_path, 20), _replay(tmp_path, 20, name="other")
    one.extend(_items(range(20)))
    other.extend(_items(range(100, 120)))
    _saved(one, tmp_path / "one")
    links = _saved(other, tmp_path / "other-save", tmp_path / "one")
    assert set(links.values()) == {1}
    fresh = Replay(20)
    fresh.load(tmp_path / "other-save")
    assert _numbers(fresh) == list(range(100, 120))


def test_a_save_outlives_the_removal_of_the_one_it_links_to(tmp_path):
    replay = _replay(tmp_path, 20)
    replay.extend(_items(range(20)))
    _saved(replay, tmp_path / "a")
    assert max(_saved(replay, tmp_path / "b", tmp_path / "a").values()) == 2
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    fresh = Replay(20)
    fresh.load(tmp_path / "b")
    assert _numbers(fresh) == list(range(20))
    # the previous save is gone: everything is written again
    assert set(_saved(replay, tmp_path / "c", tmp_path / "a").values()) == {1}


def test_an_empty_ring_can_be_saved(tmp_path):
    replay = _replay(tmp_path, 20)
    assert _saved(replay, tmp_path / "save") == {}
    fresh = Replay(20)
    fresh.load(tmp_path / "save")
    assert len(fresh) == 0
    with pytest.raises(ValueError, match="Replay: sample: nothing is stored yet"):
        fresh.sample(1)


def test_memory_mapped_items_lie_in_the_folder_and_go_with_it(tmp_path):
    folder = tmp_path / "scratch"
    replay = Replay(1000, "memmap", folder)
    replay.extend(_items(range(10)))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size >= 1000 * (24 * 4 + 3 * 8)
    replay.close()
    assert not folder.exists()


def test_damage_is_named(tmp_path):
    replay = _replay(tmp_path, 20)
    replay.extend(_items(range(20)))
    folder = tmp_path / "save"
    _saved(replay, folder)
    part = folder / "action.000000.bin"
    whole, index = part.read_bytes(), (folder / INDEX).read_text()
    for damaged in (whole[:-1], whole[:3] + bytes([whole[3] ^ 1]) + whole[4:]):
        part.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"action\.000000\.bin is damaged \(size or checksum\): resume from another"
        ):
            Replay(20).load(folder)
    part.unlink()
    with pytest.raises(ValueError, match=r"action\.000000\.bin is missing: resume from another checkpoint"):
        Replay(20).load(folder)
    part.write_bytes(whole)
    listing = json.loads(index)
    del listing["parts"][part.name]
    (folder / INDEX).write_text(json.dumps(listing))
    with pytest.raises(ValueError, match=r"replay\.json does not list action\.000000\.bin"):
        Replay(20).load(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match=r"replay\.json is missing"):
        Replay(20).load(folder)


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="Replay: capacity must be >= 1, got 0"):
        Replay(0)
    with pytest.raises(ValueError, match="Replay: storage: memory or memmap, got 'disk'"):
        Replay(1, "disk")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="Replay: folder: memory-mapped storage needs one, got none"):
        Replay(1, "memmap")
    with pytest.raises(ValueError, match="capacity must be at least the 5 items that arrive at once, got 4"):
        Replay(4).extend(_items(range(5)))
    with pytest.raises(ValueError, match="Replay: capacity: the checkpoint has 9, the config 4: keep them equal"):
        Replay(4).load_state_dict(Replay(9).state_dict())
    large = Replay(9)
    large.extend(_items(range(9)))
    _saved(large, tmp_path / "save")
    with pytest.raises(ValueError, match=r"Replay: capacity must be >= 9 to hold .*, got 4"):
        Replay(4).load(tmp_path / "save")


def test_a_ring_that_cannot_fit_is_refused_before_it_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"Replay: capacity: 1,000,000,000 items of 1,000,000 bytes take 1000000.0 GB"):
        Replay(10**9).require_room(10**6)
    with pytest.raises(
        ValueError, match=r"1 times for checkpoints and storage, take 1000000.0 GB, the disk of .* free"
    ):
        Replay(10**9, "memmap", tmp_path / "scratch").require_room(10**6)
    with pytest.raises(ValueError, match=r"3 times for checkpoints and storage"):
        Replay(10**9, "memmap", tmp_path / "scratch").require_room(10**6, saved_copies=2)
    Replay(1000, "memmap", tmp_path / "scratch").require_room(100, saved_copies=2)
    Replay(1000).require_room(100)
