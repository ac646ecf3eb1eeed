"""The growing store of members."""

from __future__ import annotations

import io

import pytest
import torch

from modules.population.members import Members


def _member(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "table": torch.rand(3, 2, generator=generator, dtype=torch.float64),
        "weights": torch.rand(4, generator=generator),
        "age": torch.tensor(seed),
    }


@pytest.fixture
def members() -> Members:
    store = Members(capacity=2)
    for seed in range(5):
        assert store.append(_member(seed)) == seed
    return store


def test_members_come_back_stacked_in_order_and_with_their_dtypes_past_the_capacity(members):
    assert len(members) == 5
    stacked = members.stacked()
    for name in ("table", "weights", "age"):
        expected = torch.stack([_member(seed)[name] for seed in range(5)])
        assert stacked[name].dtype == expected.dtype
        assert torch.equal(stacked[name], expected)
        assert torch.equal(members[name], expected)


def test_storage_doubles_so_that_appending_copies_each_member_few_times():
    store, sizes = Members(capacity=1), set()
    for seed in range(64):
        store.append(_member(seed))
        sizes.add(store["table"].untyped_storage().nbytes() // (6 * 8))
    assert sizes == {1, 2, 4, 8, 16, 32, 64}


def test_stored_members_do_not_follow_the_originals():
    store, member = Members(), {"table": torch.ones(2, requires_grad=True)}
    store.append(member)
    with torch.no_grad():
        member["table"] *= 7
    assert torch.equal(store["table"], torch.ones(1, 2))
    assert not store["table"].requires_grad


def test_extend_equals_appending_one_by_one(members):
    other = Members()
    assert other.extend({name: torch.stack([_member(s)[name] for s in range(3)]) for name in _member(0)}) == 0
    assert other.extend({name: torch.stack([_member(s)[name] for s in (3, 4)]) for name in _member(0)}) == 3
    assert other.digest() == members.digest()


def test_replace_changes_one_member_only(members):
    before = members.gather(torch.arange(5))
    members.replace(2, _member(9))
    assert torch.equal(members["table"][2], _member(9)["table"])
    keep = torch.tensor([0, 1, 3, 4])
    assert torch.equal(members["table"][keep], before["table"][keep])
    with pytest.raises(IndexError, match=r"Members: index: must be in \[0, 5\), got 5"):
        members.replace(5, _member(9))


def test_gather_takes_any_shape_of_indices_and_refuses_reserved_storage(members):
    drawn = members.gather(torch.tensor([[4, 0], [1, 1]]))
    assert drawn["table"].shape == (2, 2, 3, 2)
    assert torch.equal(drawn["weights"][1, 0], _member(1)["weights"])
    with pytest.raises(IndexError, match=r"got 0 to 5"):
        members.gather(torch.tensor([0, 5]))
    with pytest.raises(IndexError, match=r"got -1 to 0"):
        members.gather(torch.tensor([0, -1]))


def test_state_goes_through_a_weights_only_file_whatever_the_count(members, tmp_path):
    buffer = io.BytesIO()
    torch.save(members.state_dict(), buffer)
    buffer.seek(0)
    other = Members()
    other.append({"unrelated": torch.zeros(1)})
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert len(other) == 5
    assert other.digest() == members.digest()
    assert other.append(_member(5)) == 5
    empty = Members()
    empty.load_state_dict(Members().state_dict())
    assert len(empty) == 0


def test_a_state_whose_rows_do_not_fit_its_count_changes_nothing(members):
    state, digest = members.state_dict(), members.digest()
    state["count"] = 4
    with pytest.raises(ValueError, match="count = 4 rows"):
        members.load_state_dict(state)
    assert members.digest() == digest


def test_the_digest_sees_values_and_names(members):
    digests = {members.digest()}
    members.replace(0, {**_member(0), "age": torch.tensor(77)})
    digests.add(members.digest())
    renamed = Members()
    renamed.load_state_dict({"count": 1, "members": {"a": torch.zeros(1, 2)}})
    digests.add(renamed.digest())
    renamed.load_state_dict({"count": 1, "members": {"b": torch.zeros(1, 2)}})
    digests.add(renamed.digest())
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {**m, "table": m["table"][:2]}, r"Members: table: must be \(3, 2\) torch.float64"),
        (lambda m: {**m, "table": m["table"].float()}, r"got \(3, 2\) torch.float32"),
        (
            lambda m: {k: v for k, v in m.items() if k != "age"},
            r"Members: names: must be \['age', 'table', 'weights'\]",
        ),
        (lambda m: {**m, "weights": m["weights"] * torch.inf}, "Members: weights: values must be finite"),
    ],
)
def test_a_member_of_another_kind_is_refused_and_nothing_is_added(members, change, message):
    digest = members.digest()
    with pytest.raises(ValueError, match=message):
        members.append(change(_member(1)))
    with pytest.raises(ValueError, match=message):
        members.replace(0, change(_member(1)))
    assert members.digest() == digest


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="capacity: must be >= 1, got 0"):
        Members(capacity=0)
    with pytest.raises(ValueError, match="same leading length"):
        Members().extend({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(KeyError, match="no tensor named 'plan'"):
        Members()["plan"]
