"""The instruction grammar, string by string, and as a property."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.contracts.browsing import (
    KEYS,
    MAX_TEXT,
    MAX_XPATH,
    ActionPrompts,
    GrammarError,
    Instruction,
    is_instruction,
    parse_instruction,
)


@pytest.mark.parametrize(
    ("text", "kind", "argument"),
    [
        ("type hello", "type", "hello"),
        ("TYPE Hello World", "type", "Hello World"),
        ('type "quoted"', "type", "quoted"),
        ("  press   ENTER ", "press", "enter"),
        ("press space", "press", "space"),  # the official executor knows it, the official grammar refuses it
        ("clickxpath //button[text()='a']", "clickxpath", "//button[text()='a']"),
        ("ClickXPath //a", "clickxpath", "//a"),
        ("clickoption //option[2]", "clickoption", "//option[2]"),
        ("movemouse //div", "movemouse", "//div"),
        ('clickxpath //*[@id="x y"]', "clickxpath", '//*[@id="x y"]'),
        ("type type it", "type", "type it"),
    ],
)
def test_instructions(text, kind, argument):
    assert parse_instruction(text) == Instruction(kind, argument)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with one of"),
        ("click //a", "begins with one of"),
        ("type", "type needs a text"),
        ('type ""', "type needs a text"),
        ("clickxpath", "clickxpath needs an XPath"),
        ("clickxpath//a", "begins with one of"),
        ("press f5", "press takes one of"),
        ("press enter enter", "press takes one of"),
        ("type a\nclickxpath //a", "one line"),
        ("type a\u2028b", "one line"),
        ("type a\x00", "one line"),
        ("clickxpath //a`.", None),
        (f"type {'x' * (MAX_TEXT + 1)}", f"at most {MAX_TEXT}"),
        (f"clickxpath {'/' * (MAX_XPATH + 1)}", f"at most {MAX_XPATH}"),
    ],
)
def test_other_texts(text, message):
    if message is None:  # of the grammar; that its XPath is none shows in the browser
        assert is_instruction(text)
        return
    assert not is_instruction(text)
    with pytest.raises(GrammarError, match=message):
        parse_instruction(text)


_TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=60)


@settings(deadline=None)  # a loaded machine is no fault
@given(st.sampled_from(["type", "clickxpath", "clickoption", "movemouse", "press"]), _TEXTS)
def test_parsing_undoes_formatting(kind, argument):
    try:
        instruction = parse_instruction(f"{kind} {argument}")
    except GrammarError:
        return
    assert parse_instruction(str(instruction)) == instruction
    if kind == "press":
        assert instruction.argument in KEYS


@settings(deadline=None)  # a loaded machine is no fault
@given(_TEXTS, _TEXTS, st.lists(_TEXTS, max_size=3))
def test_page_text_is_data_in_prompts(goal, page, history):
    made = ActionPrompts().acting(goal, page, history)
    assert made == f"{goal}\n{page}\n" + "".join(f"- {line}\n" for line in history) + ">"
    assert ActionPrompts().acting("{page}", "{history}", ["{goal}"]) == "{page}\n{history}\n- {goal}\n>"
