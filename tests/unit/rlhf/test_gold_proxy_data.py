"""GoldProxyDataModule: prompts by position, ranks, resume."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules.gold_proxy_data import GoldProxyDataModule
from modules.contracts import ProvidesPrompts


def trainer(step: int = 0, rank: int = 0, world: int = 1) -> Any:
    return SimpleNamespace(
        global_step=step, global_rank=rank, world_size=world, accumulate_grad_batches=1, max_steps=40,
        limit_train_batches=1.0, state=SimpleNamespace(fn="fit"),
    )  # fmt: skip


def indices(data: GoldProxyDataModule, **where: Any) -> torch.Tensor:
    data.trainer = trainer(**where)
    return torch.stack([batch["index"] for batch in data.train_dataloader()])


def test_prompts_are_act_and_first_token():
    data = GoldProxyDataModule(batch_size=8, val_samples=16)
    assert isinstance(data, ProvidesPrompts)
    for batch in data.val_dataloader():
        for ids, index in zip(batch["prompt_ids"].tolist(), batch["index"].tolist(), strict=True):
            sample = data.samples("val")[index]
            assert ids == [40 + sample.labels["act"], index % 40] == data.tokenizer.encode(sample.prompt)
            assert data.tokenizer.decode(ids) == sample.prompt
        assert (batch["prompt_length"] == 2).all()
    assert (data.tokenizer.vocab_size, data.tokenizer.eod_id, len(data.samples("train"))) == (42, -1, 80)


def test_all_prompts_come_equally_often():
    counts = torch.bincount(indices(GoldProxyDataModule(batch_size=1000)).flatten(), minlength=80).double()
    # chi-squared with 79 degrees of freedom: 123 is passed once in a thousand
    assert float(((counts - 500) ** 2 / 500).sum()) < 123


def test_step_ranks_and_resume():
    whole = indices(GoldProxyDataModule(batch_size=8, seed=3))
    parts = [indices(GoldProxyDataModule(batch_size=8, seed=3), rank=rank, world=2) for rank in range(2)]
    assert torch.equal(torch.cat(parts, 1), whole)
    data = GoldProxyDataModule(batch_size=8, seed=3)
    data.trainer = trainer(step=25)
    state = data.state_dict()
    again = GoldProxyDataModule(batch_size=8, seed=3)
    again.trainer = trainer()
    again.load_state_dict(state)
    assert torch.equal(indices(again, step=25), whole[25:])
    assert not torch.equal(indices(GoldProxyDataModule(batch_size=8, seed=4)), whole)
    other = GoldProxyDataModule(batch_size=8, seed=4)
    other.trainer = trainer()
    with pytest.raises(ValueError, match="seed was 3, is 4"):
        other.load_state_dict(state)


def test_held_out_prompts_are_fixed_and_filled_up():
    batches = [list(GoldProxyDataModule(batch_size=8, val_samples=11, seed=seed).val_dataloader()) for seed in (0, 1)]
    assert all(torch.equal(one["index"], two["index"]) for one, two in zip(*batches, strict=True))
    drawn = torch.cat([batch["index"] for batch in batches[0]])
    assert (drawn >= 0).tolist() == [True] * 11 + [False] * 5


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"val_samples": 0}, {"eval_batch_size": 0}, {"seed": -1}])
def test_wrong_arguments(options):
    with pytest.raises(ValueError, match=f"GoldProxyDataModule: {next(iter(options))} must be"):
        GoldProxyDataModule(**options)


def test_unknown_names():
    data = GoldProxyDataModule()
    with pytest.raises(ValueError, match="no split 'dev'"):
        data.samples("dev")
    with pytest.raises(ValueError, match="'t40' is none of"):
        data.tokenizer.encode("act0 t40")
