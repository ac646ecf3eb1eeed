"""DialogueDataModule: tokenizer, batches, order of the stream, ranks, resume, errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules.dialogue_data import DialogueDataModule
from datamodules.text.dialogue_tokens import train_word_tokenizer
from modules.contracts import DescribesBatch, HasDigest, ProvidesPrompts, StatefulData
from modules.rlhf.classifier_files import PairInputs


def trainer(step: int = 0, rank: int = 0, world: int = 1, accumulate: int = 1, max_steps: int = 6) -> Any:
    count = SimpleNamespace(ready=step, started=step, processed=step, completed=step)
    loop = SimpleNamespace(batch_progress=SimpleNamespace(current=count, total=count))
    return SimpleNamespace(
        global_step=step, global_rank=rank, world_size=world, accumulate_grad_batches=accumulate, max_steps=max_steps,
        limit_train_batches=1.0, fit_loop=SimpleNamespace(epoch_loop=loop), state=SimpleNamespace(fn="fit"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("dialogue-cache"))


@pytest.fixture
def make(cache):
    def build(**options: Any) -> DialogueDataModule:
        settings: dict[str, Any] = {
            "synthetic_dialogues": 40, "context_size": 3, "min_context": 1, "max_prompt_tokens": 20,
            "max_response_tokens": 8, "cache_dir": cache, "batch_size": 8,
        }  # fmt: skip
        data = DialogueDataModule(**{**settings, **options})
        data.prepare_data()
        data.setup()
        return data

    return build


def rows(data: DialogueDataModule, **where: Any) -> list[torch.Tensor]:
    data.trainer = trainer(**where)
    return [batch["index"] for batch in data.train_dataloader()]


class TestWordTokenizer:
    def test_ids_and_special_words(self, tmp_path):
        tokenizer = train_word_tokenizer(["b a b <|endoftext|>", "a b c"], 5, tmp_path / "t")
        assert tokenizer.encode("b a c <EOU> <unk> <|endoftext|>") == [2, 3, 0, 1, 0, 0]  # c is beyond the size
        assert (tokenizer.eod_id, tokenizer.vocab_size) == (4, 5)
        assert tokenizer.decode([2, 3, 4]) == "b a"

    def test_transformers_reads_it_with_the_same_ids(self, tmp_path):
        from transformers import AutoTokenizer

        tokenizer = train_word_tokenizer(["b a b", "a b c"], 6, tmp_path / "t")
        theirs = AutoTokenizer.from_pretrained(tmp_path / "t", local_files_only=True)
        assert theirs("b a <EOU> x", add_special_tokens=False)["input_ids"] == tokenizer.encode("b a <EOU> x")
        assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.eod_id

    def test_is_cached_by_content(self, make, cache):
        one, same, other = make(), make(batch_size=4, task="sft"), make(tokenizer={"vocab_size": 50})
        assert one.tokenizer.directory == same.tokenizer.directory != other.tokenizer.directory
        assert other.tokenizer.vocab_size == 50

    def test_setup_without_prepare(self, tmp_path):
        data = DialogueDataModule(synthetic_dialogues=5, cache_dir=str(tmp_path))
        with pytest.raises(FileNotFoundError, match=r"call prepare_data\(\) first"):
            data.setup()


@pytest.mark.parametrize("contract", [ProvidesPrompts, StatefulData, HasDigest, DescribesBatch])
def test_contracts(make, contract):
    assert isinstance(make(), contract)


class TestBatches:
    def test_prompts(self, make):
        data = make(max_prompt_tokens=100)
        data.trainer = trainer()
        batch = next(iter(data.train_dataloader()))
        assert set(batch.keys()) == set(data.describe()) == {"prompt_ids", "prompt_length", "index"}
        assert batch["prompt_ids"].shape == (8, int(batch["prompt_length"].max()))  # trimmed to the longest
        for ids, length, index in zip(batch["prompt_ids"], batch["prompt_length"], batch["index"], strict=True):
            assert data.tokenizer.decode(ids[:length]) == data.samples("train")[int(index)].prompt

    def test_a_long_prompt_loses_its_beginning(self, make):
        data = make(max_prompt_tokens=6)
        batch = next(iter(data.test_dataloader()))
        for row in range(8):
            words = data.samples("test")[row].prompt.split()[-6:]
            assert data.tokenizer.decode(batch["prompt_ids"][row, : batch["prompt_length"][row]]).split() == words

    def test_sft_counts_the_reply_and_its_end_alone(self, make):
        data, eod = make(task="sft"), make().tokenizer.eod_id
        batch = next(iter(data.test_dataloader()))
        for row in range(8):
            sample = data.samples("test")[row]
            want = [*data.tokenizer.encode(sample.reference), eod][:8]
            counted = batch["labels"][row] != -100
            assert batch["labels"][row][counted].tolist() == want
            # labels are shifted: the input one place later is the label
            where = counted.nonzero()[:-1, 0]
            assert torch.equal(batch["input_ids"][row][where + 1], batch["labels"][row][where])
            prompt = data.tokenizer.encode(sample.prompt)[-20:]
            assert batch["input_ids"][row, : len(prompt)].tolist() == prompt
            assert int(where[0]) == len(prompt) - 1

    def test_a_long_reply_is_cut_and_does_not_end(self, make):
        data = make(task="sft", max_response_tokens=3)
        labels = torch.cat([batch["labels"].flatten() for batch in data.test_dataloader()])
        assert data.tokenizer.eod_id not in labels.tolist()

    def test_sft_step_targets_count_the_whole_step(self, make):
        data = make(task="sft")
        whole = sum(
            int((batch["labels"] != -100).sum())
            for rank in (0, 1)
            for batch in _first(data, 2, rank=rank, world=2, accumulate=2)
        )
        stated = {int(batch["step_targets"][0]) for batch in _first(data, 2, rank=1, world=2, accumulate=2)}
        assert stated == {whole}

    def test_intent_inputs_are_those_that_the_reward_makes(self, make):
        data = make(task="intent")
        batch = next(iter(data.val_dataloader()))
        samples = data.samples("val")[:8]
        assert batch["label"].tolist() == [one.labels["act"] for one in samples]
        replies = [[*data.tokenizer.encode(one.reference), data.tokenizer.eod_id][:8] for one in samples]
        want = PairInputs(data.tokenizer, 20)([one.prompt for one in samples], replies)
        for key, length, ids, size in (("prompt", "prompt_length", *want[:2]), ("reply", "reply_length", *want[2:])):
            assert torch.equal(batch[length], size)
            inside = torch.arange(ids.shape[1]) < size[:, None]
            assert torch.equal(batch[f"{key}_ids"][inside], ids[inside])

    def test_held_out_rows_are_split_over_ranks_with_fillers(self, make):
        data, seen = make(val_samples=13, eval_batch_size=5), []
        for rank in range(2):
            data.trainer = trainer(rank=rank, world=2)
            batches = [batch["index"].tolist() for batch in data.val_dataloader()]
            assert [len(batch) for batch in batches] == [3, 3, 3]
            seen += [index for batch in batches for index in batch]
        assert sorted(index for index in seen if index >= 0) == list(range(13))
        data = make(val_samples=3, eval_batch_size=8, task="sft")
        batch = next(iter(data.val_dataloader()))
        assert (batch["labels"][3:] == -100).all()
        assert (batch["labels"][:3] != -100).any(1).all()
        data = make(val_samples=3, eval_batch_size=8, task="intent")
        assert next(iter(data.val_dataloader()))["label"][3:].tolist() == [-100] * 5

    def test_bpe_keeps_the_space_before_a_reply(self, make):
        data = make(task="sft", tokenizer={"kind": "bpe", "vocab_size": 400}, max_prompt_tokens=60,
                    max_response_tokens=60)  # fmt: skip
        batch, sample = next(iter(data.test_dataloader())), data.samples("test")[0]
        text = data.tokenizer.decode(batch["input_ids"][0])
        assert text.rstrip() == f"{sample.prompt} {sample.reference}"


def _first(data: DialogueDataModule, count: int, **where: Any) -> list[Any]:
    data.trainer = trainer(**where)
    batches = iter(data.train_dataloader())
    return [next(batches) for _ in range(count)]


class TestStream:
    def test_an_epoch_is_a_permutation_and_the_next_one_another(self, make):
        data = make()
        count = len(data.samples("train"))
        drawn = torch.cat(rows(data, max_steps=2 * count // 8 + 1)).tolist()
        assert sorted(drawn[:count]) == sorted(drawn[count : 2 * count]) == list(range(count))
        assert drawn[:count] != drawn[count : 2 * count]

    def test_depends_on_the_seed_but_held_out_samples_do_not(self, make):
        one, other = make(seed=0, val_samples=5), make(seed=1, val_samples=5)
        assert one.samples("val") == other.samples("val")
        assert not torch.equal(rows(one)[0], rows(other)[0])

    def test_ranks_and_micro_batches_share_the_steps_samples_out(self, make):
        data = make()
        whole = [sorted(batch.tolist()) for batch in rows(data)]
        parts = [rows(data, rank=rank, world=2, accumulate=2) for rank in range(2)]
        for step, want in enumerate(whole):
            got = [part[2 * step + micro].tolist() for part in parts for micro in range(2)]
            assert sorted(sum(got, [])) == want

    def test_resume_is_exact(self, make):
        data = make()
        whole = rows(data, max_steps=30)
        data.trainer = trainer(step=17, max_steps=30)
        state = data.state_dict()
        again = make()
        again.trainer = trainer(max_steps=30)
        again.load_state_dict(state)
        rest = rows(again, step=17, max_steps=30)
        assert all(torch.equal(one, two) for one, two in zip(rest, whole[17:], strict=True))

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"seed": 1}, "seed"),
            ({"tokenizer": {"vocab_size": 60}}, "tokenizer_hash"),
            ({"synthetic_seed": 2, "tokenizer": None}, "data"),
            ({"max_response_tokens": 9}, "max_response_tokens"),
            ({"task": "sft"}, "task"),
        ],
    )
    def test_resume_with_other_data_names_the_field(self, make, change, field):
        data = make()
        if change.get("tokenizer", 0) is None:  # other text, the same tokenizer
            change = {**change, "tokenizer": str(data.tokenizer.directory)}
        other = make(**change)
        other.trainer = trainer()
        with pytest.raises(ValueError, match=f"other data: {field} was"):
            other.load_state_dict(data.state_dict())

    def test_max_steps_is_needed(self, make):
        data = make()
        data.trainer = trainer(max_steps=-1)
        with pytest.raises(ValueError, match="trainer.max_steps >= 1"):
            data.train_dataloader()


class TestSplits:
    def write(self, path, **splits: list[list[str]]) -> str:
        for name, dialogues in splits.items():
            (path / name).mkdir()
            for part, label in (("", None), ("_act", "1"), ("_emotion", "0")):
                lines = [" __eou__ ".join(dialogue) for dialogue in dialogues]
                if label:
                    lines = [" ".join([label] * len(dialogue)) for dialogue in dialogues]
                (path / name / f"dialogues{part}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    def test_duplicates_stay_in_test_alone(self, make, tmp_path):
        path = self.write(
            tmp_path,
            train=[["a b", "c d"], ["e f", "g h"], ["i j", "k l"], ["e f", "g h"]],
            validation=[["a b", "c d"], ["i j", "k l"]],
            test=[["A b .", "c d !"]],
        )
        data = make(path=path)
        counts = {split: [one.reference for one in data.samples(split)] for split in ("train", "val", "test")}
        assert counts == {"train": ["g h"], "val": ["k l"], "test": ["c d !"]}

    def test_validation_dialogues_kept_back_from_training(self, make):
        data = make(val_splits="", val_fraction=0.25)
        dialogues = data.dialogues()
        assert len(dialogues["val"]) == 10
        assert len(dialogues["train"]) == 30
        assert not {one.key for one in dialogues["val"]} & {one.key for one in dialogues["train"]}

    def test_split_names_with_commas(self):
        assert DialogueDataModule(train_splits="train, validation", val_splits="test").options["train_splits"] == [
            "train", "validation",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"train_splits": ["dev"]}, "no split 'dev'; there are train, validation, test"),
            ({"train_splits": "test"}, "'test' is in train_splits and in test_splits"),
            ({"train_splits": []}, "train_splits is empty"),
            ({"val_splits": [], "val_fraction": 0.0}, "val_fraction must be in"),
            ({"batch_size": 0}, "batch_size must be >= 1"),
            ({"val_samples": 0}, "val_samples must be >= 1"),
            ({"min_context": 6}, "min_context <= context_size"),
            ({"task": "chat"}, "task must be one of"),
            ({"tokenizer": {"vocab_size": 2}}, "tokenizer.vocab_size must be >= 4"),
            ({"tokenizer": {"kind": "char"}}, "tokenizer.kind must be"),
            ({"seed": -1}, "must be >= 0"),
        ],
    )
    def test_wrong_arguments_are_refused_at_once(self, options, words):
        with pytest.raises(ValueError, match=words):
            DialogueDataModule(**options)

    def test_missing_path(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="path: null needs no files"):
            DialogueDataModule(path=str(tmp_path / "nowhere")).prepare_data()

    def test_dialogues_too_short(self, make):
        with pytest.raises(ValueError, match="lower min_context"):
            make(context_size=10, min_context=10)
