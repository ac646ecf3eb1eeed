"""Pure functions of the benchmark scripts (which are run as files, not imported as a package)."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


def test_requirements_split_at_the_no_deps_marker(load):
    peers = load("peers")
    text = "# why\ntorch\nnumpy==2\n\n# [no-deps]\nlitgpt==0.5.13\n"
    assert peers.read_requirements(text) == (["torch", "numpy==2"], ["litgpt==0.5.13"])
    with pytest.raises(ValueError, match="line 2: second"):
        peers.read_requirements("# [no-deps]\n# [no-deps]\n")
    with pytest.raises(ValueError, match="pass it with --pip-option"):
        peers.read_requirements("--index-url x\n")


@pytest.mark.parametrize("name", ["hf_trainer", "litgpt", "lm_eval"])
def test_every_peer_pins_its_packages_and_leaves_torch_to_the_constraint(load, name):
    peers = load("peers")
    with_deps, without = peers.read_requirements((BENCHMARKS / "requirements" / f"{name}.txt").read_text())
    assert "torch" in with_deps  # named, so that the constraint applies; unpinned, so that the constraint decides
    assert all("==" in line for line in (*with_deps, *without) if line != "torch")
    assert not any("torchvision" in line for line in (*with_deps, *without))


def test_fingerprint_changes_with_requirements_and_torch(load):
    peers = load("peers")
    marks = {peers.fingerprint(r, c) for r in ("a", "b") for c in ("torch==1", "torch==2")}
    assert len(marks) == 4


def test_summary_divides_within_a_round_not_across(load):
    train_tokens = load("train_tokens")
    rounds = [{"a": {"r": 100.0}, "b": {"r": 50.0}}, {"a": {"r": 10.0}, "b": {"r": 8.0}}]
    table = train_tokens.summarise(rounds, reference="a", key="r")
    assert table["a"]["ratio_min"] == table["a"]["ratio_max"] == 1.0
    assert (table["b"]["ratio_min"], table["b"]["ratio_median"], table["b"]["ratio_max"]) == (0.5, 0.65, 0.8)


def test_recorded_command_names_no_folder(load):
    train_tokens = load("train_tokens")
    argv = ["--root", "/somewhere", "--rounds", "2", "--out", "/x.json"]
    assert train_tokens._public_command(argv) == "python benchmarks/train_tokens.py --rounds 2"


def test_parameter_formula_is_the_published_size(load):
    common = load("common")
    assert common.LoopArgs(tokens=Path("unused")).parameters == 16_913_280


@pytest.mark.parametrize(
    ("event", "group"),
    [
        ("aten::mm", "matmul"), ("mkldnn::_linear_pointwise", "matmul"), ("aten::t", "cast, copy and layout"),
        ("aten::tanh", "other"), ("aten::mul_", "element-wise"), ("aten::_log_softmax_backward_data", "cross entropy"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"), ("aten::_fused_adamw_",
        "optimizer and clipping"), ("graph_0_cpp_fused_add_1", "fused kernels (compiled)"),
        ("aten::embedding_dense_backward", "embedding"), ("aten::_to_copy", "cast, copy and layout"),
    ],
)  # fmt: skip
def test_profile_groups(load, event, group):
    assert load("common").group_of(event) == group


@pytest.mark.parametrize("answer", ["7", "-3", r"\frac{14}{3}", r"-\dfrac{2}{6}", "2.5", "1,200", r"10,\!080"])
def test_rewriting_keeps_the_value_and_plus_one_changes_it(load, answer):
    golden = load("golden")
    value = golden.value_of(answer)
    assert value is not None
    assert golden.value_of(golden.rewritten(answer)) == value
    changed = golden.plus_one(answer)
    assert changed == f"{answer}+1" or golden.value_of(changed) == value + 1


def test_golden_texts_state_what_their_verdict_says(load):
    golden = load("golden")
    rows = [{"solution": "S", "answer": "4"}, {"solution": "S", "answer": "1,2"}]
    made = {(one.doc_id, one.variant): one for one in golden.math_golden(rows)}
    assert made[0, "rewritten"].answer == r"\frac{8}{2}"
    assert made[1, "rewritten"].answer == "1, 2"
    assert made[1, "other_item"].answer == "4"
    assert (0, "other_item") not in made  # no other number to take
    assert not made[0, "plus_one"].truth
    gsm = {one.variant: one for one in golden.gsm8k_golden([{"answer": "a <<1+1=2>>2\n#### 1,200"}])}
    assert gsm["no_comma"].generation == "a 2 The answer is 1200."
    assert gsm["dollars"].answer == "$1,200"
    assert gsm["plus_one"].answer == "1201"
    assert set(gsm) == set(golden.GSM8K_VARIANTS)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"3\sqrt{13}", r"\frac{2(3\sqrt{13})}{2}"), ("2k", r"\frac{2(2k)}{2}"), ("7", None), (r"\frac{1}{2}", None),
        (r"\text{even}", None), ("(1,2)", None), ("x=5", None), ("52_8", None), (r"1\frac{4}{5}", None), ("even", None),
        (r"90^\circ", None),
    ],
)  # fmt: skip
def test_scaling_is_for_single_formulas_only(load, answer, expected):
    assert load("golden").scaled(answer) == expected
