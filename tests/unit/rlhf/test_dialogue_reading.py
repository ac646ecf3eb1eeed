"""Reading DailyDialog folders: text form, labels, damaged files, duplicates, samples."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.text.dialogues import (
    Dialogue,
    drop_duplicates,
    last_utterance,
    normalise_utterance,
    read_dialogues,
    reply_samples,
)
from datamodules.text.synthetic_dialogues import SyntheticDialogue
from modules.rlhf.classifier_files import last_utterance as last_utterance_of_rewards


def write(folder: Path, dialogues: str, acts: str, emotions: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in (("dialogues", dialogues), ("dialogues_act", acts), ("dialogues_emotion", emotions)):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder.parent


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Don ’ t worry.", "don't worry ."),
        ("We've paid 2.50, or 1,000 at 10:30 .", "we've paid 2.50 , or 1,000 at 10:30 ."),
        ("Wait...what ?", "wait ... what ?"),
        ("rooms 1 , 2 and 3.Then", "rooms 1 , 2 and 3 . then"),
        ("“ So ”, he said — no !", '" so " , he said - no !'),
        ("a <EOU> b", "a < eou > b"),
    ],
)
def test_normalised_form(text, want):
    assert normalise_utterance(text) == want


@given(st.text(alphabet="aB1 .,:'’?<>!\"-_é\t", max_size=40))
@settings(max_examples=200, deadline=None)
def test_normalising_twice_changes_nothing(text):
    once = normalise_utterance(text)
    assert normalise_utterance(once) == once
    assert "<EOU>" not in normalise_utterance(text, lowercase=False).split()


def test_reads_text_and_zero_based_labels(tmp_path):
    path = write(tmp_path / "train", "Hi . __eou__ Hi ! __eou__\nGo ! __eou__ Ok .\n", "1 2\n3 4\n", "0 6\n1 4\n")
    assert read_dialogues(path, "train") == [
        Dialogue(("hi .", "hi !"), (0, 1), (0, 6)),
        Dialogue(("go !", "ok ."), (2, 3), (1, 4)),
    ]
    assert read_dialogues(path, "train", lowercase=False)[0].utterances == ("Hi .", "Hi !")


@pytest.mark.parametrize(
    ("dialogues", "acts", "emotions", "words"),
    [
        ("a __eou__ b\nc __eou__", "1 1\n1 1\n", "0 0\n0\n", ["dialogues_act.txt line 2", "2 labels for 1", "skip"]),
        ("a __eou__ b\nc __eou__", "1 1\n1\n", "0\n0\n", ["dialogues_emotion.txt line 1", "1 labels for 2"]),
        ("a __eou__\n", "1\n1\n", "0\n", ["dialogues_act.txt has 2 lines", "line without a partner: 2"]),
        ("a __eou__ b\n", "1 5\n", "0 0\n", ["dialogues_act.txt line 1", "'5'", "1 to 4"]),
        ("a __eou__ b\n", "1 1\n", "0 x\n", ["dialogues_emotion.txt line 1", "'x'", "0 to 6"]),
        ("a __eou__  __eou__ b\n", "1 1 1\n", "0 0 0\n", ["dialogues.txt line 1", "utterance 2 is empty"]),
        ("", "", "", ["holds no dialogue"]),
    ],
)
def test_damaged_files_are_named_with_their_line(tmp_path, dialogues, acts, emotions, words):
    path = write(tmp_path / "train", dialogues, acts, emotions)
    with pytest.raises(ValueError, match="^dialogues: ") as error:
        read_dialogues(path, "train")
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_lines_that_do_not_match_are_skipped_on_demand(tmp_path):
    path = write(tmp_path / "train", "a __eou__ b\nc __eou__", "1 1\n1 1\n", "0 0\n0\n")
    assert [one.utterances for one in read_dialogues(path, "train", mismatched="skip")] == [("a", "b")]


def test_missing_folder_says_what_is_wanted_and_what_is_there(tmp_path):
    path = write(tmp_path / "train", "a __eou__", "1", "0")
    with pytest.raises(FileNotFoundError, match=r"dev is no folder; want path/<split>/dialogues.txt.*there: train"):
        read_dialogues(path, "dev")
    with pytest.raises(FileNotFoundError, match="path: null needs no files"):
        read_dialogues(tmp_path / "nowhere", "dev")
    (path / "train" / "dialogues_act.txt").unlink()
    with pytest.raises(FileNotFoundError, match="dialogues_act.txt does not exist"):
        read_dialogues(path, "train")


def test_duplicates_are_found_whatever_spacing_case_and_punctuation():
    one, same, other = (Dialogue((text,), (0,), (0,)) for text in ("it's late .", "It 's late !", "it is late"))
    assert drop_duplicates([one, same, other]) == [one, other]
    assert drop_duplicates([same, other], known=[one]) == [other]


def test_samples_take_the_last_utterances_and_the_replys_labels():
    dialogue = Dialogue(("a", "b", "c", "d"), (0, 1, 2, 3), (0, 0, 4, 6))
    samples = reply_samples([dialogue], context_size=2, min_context=1)
    assert [(one.prompt, one.reference) for one in samples] == [
        ("a <EOU>", "b"),
        ("a <EOU> b <EOU>", "c"),
        ("b <EOU> c <EOU>", "d"),
    ]
    assert [dict(one.labels) for one in samples] == [
        {"act": 1, "emotion": 0}, {"act": 2, "emotion": 4}, {"act": 3, "emotion": 6},
    ]  # fmt: skip
    assert len(reply_samples([dialogue], context_size=3, min_context=3)) == 1
    with pytest.raises(ValueError, match="min_context <= context_size"):
        reply_samples([dialogue], context_size=2, min_context=3)


def test_data_and_rewards_agree_on_the_last_utterance():
    for sample in reply_samples(SyntheticDialogue().dialogues("test", 20), 3, 1):
        assert last_utterance(sample.prompt) == last_utterance_of_rewards(sample.prompt)


def test_sample_counts_of_the_shared_folder(data_dir):
    """Five utterances of context before the reply: the counts that the folder's README states."""
    counts = {}
    for split in ("validation", "test", "extra_1k"):
        dialogues = read_dialogues(data_dir / "dailydialog", split, mismatched="skip")
        counts[split] = len(reply_samples(dialogues, 5, 5))
    assert counts == {"validation": 3388, "test": 3123, "extra_1k": 2864}
    with pytest.raises(ValueError, match="dialogues_act.txt line 28 has 10 labels for 9 utterances"):
        read_dialogues(data_dir / "dailydialog", "extra_1k")


class TestSyntheticDialogue:
    def test_is_a_function_of_seed_split_and_number(self):
        some = SyntheticDialogue(3).dialogues("train", 50)
        assert SyntheticDialogue(3).dialogues("train", 80)[:50] == some
        assert SyntheticDialogue(4).dialogues("train", 50) != some
        assert SyntheticDialogue(3).dialogues("test", 50) != some

    def test_text_is_in_normal_form_with_labels_in_range(self):
        for dialogue in SyntheticDialogue().dialogues("train", 200):
            assert 4 <= len(dialogue.utterances) <= 10
            assert len(dialogue.acts) == len(dialogue.emotions) == len(dialogue.utterances)
            assert all(normalise_utterance(text) == text for text in dialogue.utterances)
            assert set(dialogue.acts) <= {0, 1, 2, 3}

    def test_replies_follow_from_the_last_utterance_and_take_up_its_words(self):
        dialogues = SyntheticDialogue().dialogues("train", 400)
        after = {act: [0] * 4 for act in range(4)}
        for dialogue in dialogues:
            for last, reply in zip(dialogue.acts, dialogue.acts[1:], strict=False):
                after[last][reply] += 1
        assert after[1][0] > 0.75 * sum(after[1])  # a question is mostly informed
        assert after[2][3] > 0.7 * sum(after[2])  # a directive mostly committed to
        samples = reply_samples(dialogues, 3, 3)

        def shared(prompt: str, reply: str) -> int:
            return len(set(prompt.split()) & {word for word in reply.split() if len(word) > 4})

        own = sum(shared(one.prompt, one.reference) for one in samples)
        strange = sum(shared(one.prompt, two.reference) for one, two in zip(samples, samples[50:], strict=False))
        assert own > 2 * strange

    def test_unknown_split(self):
        with pytest.raises(ValueError, match="no split 'dev'; there are train, validation, test"):
            SyntheticDialogue().dialogues("dev", 1)
