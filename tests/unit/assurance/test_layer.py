"""The objectives layer: what is written reads back the same, and a stranger's file sets knobs or nothing."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.assurance.knobs import Knob
from modules.assurance.layer import layer_text, read_layer
from modules.assurance.objectives import Objectives, to_layer
from modules.assurance.subject import AssuranceError

EPS, MIXTURE, POOL = "model.init_args.eps", "data.init_args.mixture", "data.init_args.pool"
ALLOWED = (EPS, MIXTURE, POOL, "vars.name", "vars.live")


def _read(tmp_path, text, allowed=ALLOWED):
    path = tmp_path / "layer.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_layer(path, allowed)


def test_a_layer_is_nested_keys_and_a_line_for_people():
    text = to_layer(Objectives(2, "ab12", knobs={EPS: 0.15, MIXTURE: {"b": 0.5, "a": 0.5}, "data.n": [1.0, 2.5]}))
    assert text == (
        "# Objectives of round 2, from report ab12.\n"
        "data:\n  init_args:\n    mixture:\n      a: 0.5\n      b: 0.5\n  n:\n  - 1.0\n  - 2.5\n"
        "model:\n  init_args:\n    eps: 0.15\n"
    )
    assert yaml.safe_load(text)["model"] == {"init_args": {"eps": 0.15}}
    assert to_layer(Objectives()) == "# Objectives of round 0, from the declared start.\n{}\n"


def test_order_of_knobs_is_nothing():
    knobs = {EPS: 0.1, "model.init_args.beta": 2.0, "vars.x": [3.0]}
    assert layer_text(knobs, 1, "") == layer_text(dict(reversed(knobs.items())), 1, "")


NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**9), 10**9)
NAMES = st.text(min_size=1, max_size=20).filter(lambda name: "${" not in name and name != "class_path")


@settings(deadline=None, max_examples=100)
@given(eps=NUMBERS, mixture=st.dictionaries(NAMES, NUMBERS), pool=st.lists(NUMBERS, max_size=5))
def test_what_is_written_reads_back_bit_for_bit(tmp_path_factory, eps, mixture, pool):
    values = {EPS: eps, MIXTURE: mixture, POOL: pool}
    found = _read(tmp_path_factory.mktemp("layer"), layer_text(values, 3, "0" * 64))
    assert found == values
    assert repr(found[EPS]) == repr(eps)


@pytest.mark.parametrize(
    ("knobs", "parent", "message"),
    [
        ({EPS: 0.1}, "x\nmodel: {class_path: os.system}", "parent must be a report's sha256"),
        ({"a.b": 1.0, "a.b.c": 2.0}, "", "a.b.c lies within another knob"),
        ({"a.b": {"c": 1.0}, "a.b.c": 2.0}, "", "a.b.c holds another knob"),
    ],
)
def test_what_makes_no_layer_is_refused(knobs, parent, message):
    with pytest.raises(AssuranceError, match=message):
        layer_text(knobs, 1, parent)


def test_plain_layers_are_read(tmp_path):
    text = "vars: {name: a word, live: true}\nmodel:\n  init_args: {eps: 0.5}\ndata: {init_args: {pool: [1, 2]}}\n"
    assert _read(tmp_path, text) == {"vars.name": "a word", "vars.live": True, EPS: 0.5, POOL: [1, 2]}
    assert _read(tmp_path, "# nothing\n") == {}


BOMB = "a: &a [1,1,1,1]\nb: &b [*a,*a,*a,*a]\nmodel: {init_args: {eps: *b}}\n"
HOSTILE = {
    "a class at the root": ("class_path: os.system\n", "'class_path': a layer names no class"),
    "a class in a knob's place": ("model: {class_path: evil.Module}\n", "'model.class_path': a layer names no class"),
    "a class within a pool": ("data: {init_args: {pool: {class_path: 1}}}\n", "a layer names no class"),
    "a class in a knob": ("model: {init_args: {eps: {class_path: os.system, init_args: {command: id}}}}", "no class"),
    "the environment": ("model: {init_args: {eps: '${oc.env:SECRET}'}}\n", "line 1: .* is not allowed"),
    "the environment, in a comment": ("\n# ${oc.env:SECRET}\n", "line 2: .* is not allowed"),
    "the environment, escaped": ('vars: {name: "\\x24{oc.env:SECRET}"}\n', "vars.name: .* is not allowed"),
    "the environment, in an escaped key": ('vars: {"\\x24{oc.env:SECRET}": 1}\n', "not allowed in a key"),
    "another key": ("trainer: {max_steps: 9}\n", "'trainer' is not a knob's value that may be set"),
    "a key beside a knob": ("model: {init_args: {epz: 9}}\n", "'model.init_args.epz' .*nearest knob is model.*eps"),
    "a whole object over a knob": ("model: {init_args: [1]}\n", "'model.init_args' is not a knob's value"),
    "a dotted key": ("model.init_args.eps: 0.1\n", r"'model.init_args.eps' .*nearest knob is .* \(as nested keys\)"),
    "a python object": ("model: {init_args: {eps: !!python/object/apply:os.system []}}\n", "1: the tag .* not allowed"),
    "bytes": ("vars: {name: !!binary aWQ=}\n", "the tag .* is not allowed"),
    "an alias bomb": (BOMB, "line 1: anchors and aliases .* are not allowed"),
    "an alias": ("model: {init_args: {eps: *x}}\n", "anchors and aliases .* are not allowed"),
    "a merge": ("vars: {<<: {name: x}}\n", "key '<<' must be text"),
    "a key twice": ("model: {init_args: {eps: 0.1, eps: 9.0}}\n", "key 'model.init_args.eps' stands twice"),
    "a number as key": ("1: 2\n", "key '1' must be text"),
    "a list as key": ("? [a]\n: 1\n", "must be text"),
    "infinity": ("model: {init_args: {eps: .inf}}\n", "model.init_args.eps: inf is not a finite number"),
    "not a number": ("model: {init_args: {eps: .nan}}\n", "model.init_args.eps: nan is not a finite number"),
    "nothing": ("model: {init_args: {eps: null}}\n", "model.init_args.eps: give a number"),
    "a date": ("model: {init_args: {eps: 2020-01-01}}\n", "model.init_args.eps: give a number"),
    "no date": ("model: {init_args: {eps: 2020-13-45}}\n", "is not valid YAML"),
    "a huge number": (f"model: {{init_args: {{eps: 0x{'f' * 9000}}}}}\n", "model.init_args.eps: give a number"),
    "a huge decimal number": (f"model: {{init_args: {{eps: {'9' * 9000}}}}}\n", "is not valid YAML"),
    "text within weights": ("data: {init_args: {mixture: {a: x}}}\n", "data.init_args.mixture: give a number"),
    "deeper weights": ("data: {init_args: {mixture: {a: {b: 1}}}}\n", "data.init_args.mixture: give a number"),
    "a deep nest": ("[" * 30000, "line 1: nests too deeply"),
    "a deep nest of mappings": ("{a: " * 9000, "line 1: nests too deeply"),
    "a second document": ("vars: {live: true}\n---\nmodel: {class_path: x}\n", "begins a second document"),
    "a list": ("- 1\n", "must be a mapping"),
    "a word": ("word\n", "must be a mapping"),
    "a large file": ("# " + "x" * 65536, "has more than 64 KiB"),
    "no text": (b"\xff\xfe\x00", "is not UTF-8 text"),
    "control characters": ("vars: {name: \x00}\n", "is not valid YAML"),
    "no YAML": ("vars: {name: [}\n", "is not valid YAML"),
    "a long key": (f"{'k' * 201}: 1\n", "must be text of at most 200 characters"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_set_nothing(tmp_path, name):
    text, message = HOSTILE[name]
    with pytest.raises(AssuranceError, match=message) as caught:
        _read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "layer.yaml"))
    assert len(str(caught.value)) < len(str(tmp_path)) + 300


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(AssuranceError, match="gone.yaml: cannot be read"):
        read_layer(tmp_path / "gone.yaml", ALLOWED)


KNOBS = [
    Knob(EPS, "mult", ["r.x"], [0.0, 0.36], start=0.0, first=0.1),
    Knob(MIXTURE, "exp_weights", ["r.x"], start={"a": 0.5, "b": 0.5}),
    Knob("data.init_args.range", "widen", ["r.x"], [0.0, 4.0], start=[1.0, 2.0]),
    Knob(POOL, "enqueue", ["r.x"], items=["a", "b"]),
]


def test_with_the_knobs_values_must_fit_their_rules(tmp_path):
    text = (
        "model: {init_args: {eps: 0.2}}\ndata: {init_args: {mixture: {b: 0.75, a: 0.25}, range: [1, 3], pool: {a: 2}}}"
    )
    assert _read(tmp_path, text, KNOBS) == {
        EPS: 0.2, MIXTURE: {"a": 0.25, "b": 0.75}, "data.init_args.range": [1.0, 3.0], POOL: {"a": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {init_args: {eps: 0.5}}", "knob model.init_args.eps: value 0.5 lies outside the bounds"),
        ("model: {init_args: {eps: true}}", "must be a finite number, got True"),
        ("model: {init_args: {eps: high}}", "must be a finite number, got high"),
        ("model: {init_args: {eps: [0.1]}}", "must be a finite number"),
        (f"model: {{init_args: {{eps: 0x{'f' * 9000}}}}}", "must be a finite number, got a number of thousands"),
        ("data: {init_args: {mixture: {a: 0.9, b: 0.9}}}", "the weights' sum is 1.8"),
        ("data: {init_args: {mixture: {a: 0.5, evil: 0.5}}}", "must weigh what start weighs: a, b"),
        ("data: {init_args: {mixture: 0.5}}", "must be a mapping or list of weights"),
        ("data: {init_args: {range: [1, 9]}}", "within the bounds"),
        ("data: {init_args: {pool: {held_out: 0}}}", "not among its items"),
    ],
)
def test_with_the_knobs_values_that_do_not_fit_are_refused(tmp_path, text, message):
    with pytest.raises(AssuranceError, match=message):
        _read(tmp_path, text, KNOBS)
