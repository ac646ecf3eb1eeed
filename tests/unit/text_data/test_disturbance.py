"""Settings of the training stream that findings may move: the share of disturbed windows, and the sources' shares."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.corpus_data import CorpusDataModule
from datamodules.text.disturbance import Disturber

Make = Callable[..., CorpusDataModule]
WAYS = {"upper": lambda text, seed: text.upper(), "seeded": lambda text, seed: f"{seed} {text}"}


class Letters:
    """A tokenizer of single characters; token 0 ends documents."""

    eod_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: np.ndarray) -> str:
        return "".join(chr(token) for token in ids.tolist())


def window(text: str) -> np.ndarray:
    return np.array([0 if character == "|" else ord(character) for character in text], dtype=np.int64)


def text_of(row: np.ndarray) -> str:
    return "".join("|" if token == 0 else chr(token) for token in row.tolist())


def disturbed(text: str, way: Callable[[str, int], str], documents: bool = False) -> tuple[str, np.ndarray | None]:
    rows = window(text)[None].copy()
    ids = np.full(rows.shape, 7, dtype=np.int32) if documents else None
    Disturber(1.0, {"way": way}, Letters(), 3)(rows, ids, ["web"], np.array([5]))
    return text_of(rows[0]), None if ids is None else ids[0]


def test_documents_are_disturbed_one_by_one_and_keep_their_ends() -> None:
    assert disturbed("ab|cd|ef", lambda text, _: text.upper())[0] == "AB|CD|EF"
    assert disturbed("|cd||", lambda text, _: text.upper())[0] == "|CD||"


def test_longer_text_is_cut_and_shorter_text_filled_with_its_own_beginning() -> None:
    assert disturbed("ab|cdef", lambda text, _: text * 2)[0] == "abab|cd"
    assert disturbed("abcdef|gh", lambda text, _: text[:1])[0] == "a|g|abcde"


def test_document_numbers_follow_the_new_ends() -> None:
    _, ids = disturbed("ab|cdef|g", lambda text, _: text[:2], documents=True)  # ab|cd|g|a
    assert ids is not None
    assert ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3]


def test_the_same_windows_and_more_at_a_larger_share() -> None:
    few, many = (Disturber(share, WAYS, Letters(), 3) for share in (0.2, 0.6))
    chosen = [[item for item in range(2000) if one.way_of("web", item)] for one in (few, many)]
    assert set(chosen[0]) < set(chosen[1])
    assert [len(one) / 2000 for one in chosen] == pytest.approx([0.2, 0.6], abs=0.04)
    assert {few.way_of("web", item) for item in chosen[0]} == set(WAYS)
    assert all(few.way_of("web", item) == many.way_of("web", item) for item in chosen[0])
    assert [item for item in range(2000) if few.way_of("code", item)] != chosen[0]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_disturber_wants_a_share_and_ways(share: float) -> None:
    with pytest.raises(ValueError, match="want a share"):
        Disturber(share, WAYS, Letters(), 0)
    with pytest.raises(ValueError, match="0 ways"):
        Disturber(0.5, {}, Letters(), 0)


def test_weights_choose_among_the_ways() -> None:
    heavy = Disturber(1.0, WAYS, Letters(), 3, {"upper": 3.0, "seeded": 1.0})
    chosen = [heavy.way_of("web", item) for item in range(2000)]
    assert chosen.count("upper") / 2000 == pytest.approx(0.75, abs=0.04)
    alone = Disturber(1.0, WAYS, Letters(), 3, {"seeded": 0.2})
    assert {alone.way_of("web", item) for item in range(50)} == {"seeded"}
    with pytest.raises(ValueError, match="unknown way 'lower'; known: seeded, upper"):
        Disturber(1.0, WAYS, Letters(), 3, {"lower": 1.0})
    with pytest.raises(ValueError, match="weight of upper must be"):
        Disturber(1.0, WAYS, Letters(), 3, {"upper": 0.0})


# -- in the datamodule ------------------------------------------------------------------------------------------------
def batches(data: CorpusDataModule, trainer: Any) -> list[torch.Tensor]:
    trainer.lightning_module = SimpleNamespace(disturbances=lambda: {"upper": WAYS["upper"]})
    data.trainer = trainer
    return [torch.cat([batch["input_ids"], batch["labels"][:, -1:]], 1) for batch in data.train_dataloader()]


def test_share_of_disturbed_windows_reaches_training_alone(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    clean, half, whole = (batches(corpus(perturbed_share=share), fake_trainer()) for share in (0.0, 0.5, 1.0))
    data = corpus(perturbed_share=1.0)
    for before, mixed, after in zip(torch.cat(clean), torch.cat(half), torch.cat(whole), strict=True):
        assert torch.equal(mixed, before) or torch.equal(mixed, after)
        text = data.tokenizer.decode(after.numpy())
        assert text == text.upper()
        assert text[:3] == data.tokenizer.decode(before.numpy())[:3].upper()
    changed = [not torch.equal(a, b) for a, b in zip(torch.cat(clean), torch.cat(half), strict=True)]
    assert 0.3 < np.mean(changed) < 0.7
    held = [batch["input_ids"] for loader in data.val_dataloader() for batch in loader]
    plain = [batch["input_ids"] for loader in corpus().val_dataloader() for batch in loader]
    assert all(torch.equal(one, other) for one, other in zip(held, plain, strict=True))


def test_disturbed_windows_do_not_depend_on_ranks_or_resuming(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    whole = torch.cat(batches(corpus(perturbed_share=0.5), fake_trainer()))
    parts = [batches(corpus(perturbed_share=0.5), fake_trainer(2, rank, step=4)) for rank in range(2)]
    again = torch.cat([torch.cat(pair) for pair in zip(*parts, strict=True)])
    assert torch.equal(again, whole[4 * 8 :])


def test_resuming_with_another_share_is_refused(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    data = corpus(perturbed_share=0.25)
    data.trainer = fake_trainer(step=3)
    state = data.state_dict()
    with pytest.raises(ValueError, match=r"perturbed_share was 0\.25, is 0\.0"):
        corpus().load_state_dict(state)
    older = {key: value for key, value in corpus().state_dict().items() if key != "perturbed_share"}
    corpus().load_state_dict({**older, "step": 0})
    with pytest.raises(ValueError, match="perturbed_share was 0"):
        corpus(perturbed_share=0.25).load_state_dict({**older, "step": 0})


def test_a_module_without_ways_is_refused(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    data = corpus(perturbed_share=0.1)
    data.trainer = fake_trainer()
    with pytest.raises(ValueError, match="names no ways to disturb text: set perturbed_share to 0"):
        data.train_dataloader()


def test_shares_say_all_of_the_stream(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    data = corpus(mixture=None, shares={"arxiv": 0.2, "web": 0.2, "code": 0.6})
    assert data.stream_shares() == pytest.approx({"arxiv": 0.2, "web": 0.2, "code": 0.6})
    data.trainer = fake_trainer(max_steps=50)
    drawn = torch.cat([batch["source_id"] for batch in data.train_dataloader()]).bincount(minlength=3) / 400
    assert drawn.tolist() == pytest.approx([0.2, 0.2, 0.6], abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": {"arxiv": 1.0, "web": 1.0, "code": 1.0}}, "leave mixture and replay out"),
        ({"mixture": None, "shares": {"arxiv": 1.0, "web": 1.0}}, "source 'code' has none"),
        ({"mixture": None, "shares": {"arxiv": 1.0, "web": 1.0, "code": 1.0, "x": 1.0}}, "unknown source 'x'"),
        ({"mixture": None, "shares": {"arxiv": 1.0, "web": 1.0, "code": 0.0}}, "weight of source code must be"),
        ({"perturbed_share": 1.5}, "perturbed_share must be in"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(corpus: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corpus(**changes)
