"""Experts of the MiniWoB++ tasks in which elements are clicked and options are chosen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from datamodules.envs.browser.experts.base import (
    NoMoveError,
    by_id,
    by_text,
    element,
    expert,
    fill,
    find,
    quote,
    squeeze,
    tree,
)
from modules.contracts.browsing import PageView


def first(root: Any, xpath: str, **values: str) -> Any:
    """The first match of an XPath, whose ``$name`` stand for ``values``.

    Raises:
        NoMoveError: it has none.
    """
    found = root.xpath(xpath, **values)
    if not found:
        told = "".join(f", {name} {value!r}" for name, value in values.items())
        raise NoMoveError(f"the page has no match of {xpath}{told}")
    return found[0]


def text_of(item: Any) -> str:
    """What an element holds as text, blanks collapsed."""
    return squeeze(item.text_content())


# ------------------------------------------------------------------------------------------- buttons, links and colours


@expert("click-button", "click-dialog-2")
def click_button(view: PageView, history: Sequence[str]) -> str:
    (text,) = find(view, r'"(.*)"')
    return by_text("button", text) if text != "x" else click_dialog(view, history)


@expert("click-link")
def click_link(view: PageView, history: Sequence[str]) -> str:
    (text,) = find(view, r'link "(.*)"')
    return by_text("span", text)


@expert("click-test", "click-test-2")
def click_test(view: PageView, history: Sequence[str]) -> str:
    return by_id("subbtn")


@expert("click-tab")
def click_tab(view: PageView, history: Sequence[str]) -> str:
    (text,) = find(view, r"(Tab #\d)")
    return by_text("a", text)


@expert("click-dialog")
def click_dialog(view: PageView, history: Sequence[str]) -> str:
    return "clickxpath //button[@title='Close']"


@expert("click-button-sequence")
def click_button_sequence(view: PageView, history: Sequence[str]) -> str:
    # A clicked button keeps the focus.
    return by_id("subbtn2") if "data-focused" in element(tree(view), "subbtn").attrib else by_id("subbtn")


@expert("click-color")
def click_color(view: PageView, history: Sequence[str]) -> str:
    (color,) = find(view, r"on the (\w+) colored")
    return f"clickxpath //*[@data-color={quote(color)}]"


@expert("click-shades")
def click_shades(view: PageView, history: Sequence[str]) -> str:
    (color,) = find(view, r"shades of (\w+) and")
    root = tree(view)
    wrong = root.xpath("//span[@class='selected' and @data-color!=$color]/@data-color", color=color)
    if wrong:
        return f"clickxpath //span[@data-color={quote(wrong[0])} and @class]"
    if not root.xpath("//span[@data-color=$color and not(@class)]", color=color):
        return by_id("submit")
    # All matches of a span are clicked; those that are selected already would be deselected.
    fresh = " and not(@class)" if root.xpath("//span[@class='selected']") else ""
    return f"clickxpath //span[@data-color={quote(color)}{fresh}]"


@expert("click-widget")
def click_widget(view: PageView, history: Sequence[str]) -> str:
    (kind,) = find(view, r'"(\w+)" widget')
    return f"clickxpath //*[@data-type={quote(kind)}]"


# ---------------------------------------------------------------------------------------------------- boxes and options


@expert("click-option")
def click_option(view: PageView, history: Sequence[str]) -> str:
    (name,) = find(view, r"Select (\w+) and click")
    box = first(tree(view), "//label[normalize-space()=$name]/input", name=name)
    return by_id("subbtn") if "checked" in box.attrib else by_id(box.get("id"))


def _boxes(view: PageView, wanted: Sequence[str]) -> str:
    """Check the boxes in the order of their names, uncheck all others, then submit."""
    boxes = {text_of(label): label.find("input") for label in tree(view).iter("label")}
    for name in wanted:
        if name not in boxes:
            raise NoMoveError(f"the page has no box '{name}'")
        if "checked" not in boxes[name].attrib:
            return by_id(boxes[name].get("id"))
    for name, box in boxes.items():
        if name not in wanted and "checked" in box.attrib:
            return by_id(box.get("id"))
    return by_id("subbtn")


@expert("click-checkboxes", "click-checkboxes-large", "click-checkboxes-transfer")
def click_checkboxes(view: PageView, history: Sequence[str]) -> str:
    (names,) = find(view, r"Select (.*) and click")
    return _boxes(view, [] if names == "nothing" else names.split(", "))


#: What click-checkboxes-soft takes for similar: words that the same line holds.
_SIMILAR = tuple(
    line.split()
    for line in """
    big large huge enormous gigantic
    small tiny little mini petite
    red scarlet crimson vermillion
    happy cheerful joyful gleeful delighted
    sad unhappy sorrowful miserable tragic
    angry mad furious irritated
    evil wicked immoral sinful corrupt depraved
    wrong incorrect mistaken erroneous
    real genuine actual
    strange odd peculiar unusual weird
    stop cease halt end finish
    scared terrified panicked fearful frightened afraid
    quiet calm peaceful serene mild
    old aged archaic
    love like adore favor
    kill murder assassinate
    keep retain preserve sustain maintain
    hide conceal camouflage
    hate despise loathe detest dislike
    funny humorous amusing comical laughable
    fat fleshy plump chubby
    stupid dumb dull unwise
    delicious savory delectable appetizing
    cut slice carve chop
    brave courageous fearless
    begin start initiate launch
    answer reply response
    television televisions TV TVs
    house home houses homes
    fire flame fires flames
    pig pork swine
    rabbit rabbits bunny bunnies
    car cars automobile automobiles vehicle vehicles
    water
    """.strip().splitlines()
)
_GROUP = {word: number for number, words in enumerate(_SIMILAR) for word in words}


@expert("click-checkboxes-soft")
def click_checkboxes_soft(view: PageView, history: Sequence[str]) -> str:
    (names,) = find(view, r"similar to (.*) and click")
    shown = {_GROUP.get(text_of(label)): text_of(label) for label in tree(view).iter("label")}
    wanted = []
    for name in names.split(", "):
        if name not in _GROUP or _GROUP[name] not in shown:
            raise NoMoveError(f"the page has no box similar to '{name}'")
        wanted.append(shown[_GROUP[name]])
    return _boxes(view, wanted)


@expert("choose-list", "click-scroll-list")
def choose_list(view: PageView, history: Sequence[str]) -> str:
    (names,) = find(view, r"Select (.*) from the (?:scroll )?list")
    wanted = names.split(", ")
    options = element(tree(view), "options")
    chosen = [text_of(option) for option in options.iter("option") if "selected" in option.attrib]
    several = "multiple" in options.attrib
    for name in wanted:
        first(options, ".//option[normalize-space()=$name]", name=name)
        if name not in chosen:
            return f"clickoption //option[normalize-space()={quote(name)}]"
    for name in chosen:
        if several and name not in wanted:
            return f"clickoption //option[normalize-space()={quote(name)}]"  # takes the choice back
    return by_text("button", "Submit")


# ------------------------------------------------------------------------------------------ what has to be opened first


@expert("click-collapsible")
def click_collapsible(view: PageView, history: Sequence[str]) -> str:
    header = first(tree(view), "//h3")
    return by_id("subbtn") if header.get("aria-expanded") == "true" else by_text("h3", text_of(header))


@expert("click-collapsible-2")
def click_collapsible_2(view: PageView, history: Sequence[str]) -> str:
    (text,) = find(view, r'link "(.*)"')
    root = tree(view)
    below = "following-sibling::div[1]//span[normalize-space()=$text]"
    if root.xpath(f"//h3[@aria-expanded='true' and {below}]", text=text):
        return by_text("span", text)
    return by_text("h3", text_of(first(root, f"//h3[{below}]", text=text)))


@expert("click-tab-2", "click-tab-2-hard")
def click_tab_2(view: PageView, history: Sequence[str]) -> str:
    (text,) = find(view, r'link "(.*)"')
    root = tree(view)
    holders = root.xpath("//div[starts-with(@id,'tabs-') and .//span[normalize-space()=$text]]", text=text)
    if not holders:
        raise NoMoveError(f"no tab holds a link '{text}'")
    if any(holder.get("aria-hidden") == "false" for holder in holders):
        return by_text("span", text)
    return by_text("a", text_of(first(root, "//a[@href=$target]", target=f"#{holders[0].get('id')}")))


@expert("click-menu")
def click_menu(view: PageView, history: Sequence[str]) -> str:
    """Hover over each item on the way until its submenu opens, which takes the page a while; click the last."""
    (path,) = find(view, r"Select (.*)")
    root = tree(view)
    *parents, leaf = path.split(">")
    for parent in parents:
        # A closed submenu is hidden from readers.
        if root.xpath("//li[div[normalize-space()=$name]]/ul[@aria-hidden='true']", name=parent):
            return by_text("div", parent).replace("clickxpath", "movemouse", 1)
    return by_text("div", leaf)


@expert("navigate-tree")
def navigate_tree(view: PageView, history: Sequence[str]) -> str:
    (name,) = find(view, r'named "(.*)"')
    root = tree(view)
    ways = [(_closed_folders(span), span) for span in root.xpath("//span[normalize-space()=$name]", name=name)]
    if not ways:
        raise NoMoveError(f"the tree has no '{name}'")
    closed, span = min(ways, key=lambda way: len(way[0]))
    if closed:
        span, name = closed[0].find("span"), text_of(closed[0].find("span"))
    # Of several spans all would be clicked: those of equal names are told apart by their number.
    same = root.xpath("//span[normalize-space()=$name]", name=name)
    kind, xpath = by_text("span", name).split(" ", 1)
    return f"{kind} {xpath}" if len(same) == 1 else f"{kind} ({xpath})[{same.index(span) + 1}]"


def _closed_folders(span: Any) -> list[Any]:
    """The folders that hide an item of the tree, outermost first."""
    holders = list(span.getparent().iterancestors("li"))[::-1]
    return [item for item in holders if "expandable" in item.get("class", "").split()]


# ---------------------------------------------------------------------------------------------------- figures and grids


def _figure(item: Any) -> tuple[str, str, str, str]:
    """Size, colour, kind (``letter``, ``digit`` or ``shape``) and text or name of an item of the drawing."""
    color = item.get("fill", "")
    if item.tag == "text":
        text = text_of(item)
        size = float(item.get("font-size", "0px").removesuffix("px"))
        return "large" if size > 15 else "small", color, "digit" if text.isdigit() else "letter", text
    if item.tag == "rect":
        name, width = "rectangle", float(item.get("width"))
    elif item.tag == "circle":
        name, width = "circle", 2 * float(item.get("r"))
    elif item.tag == "polygon":
        corners = [float(point.split(",")[0]) for point in item.get("points").split()]
        name, width = "triangle", max(corners) - min(corners)
    else:
        raise NoMoveError(f"the drawing holds a <{item.tag}>")
    return "large" if width > 15 else "small", color, "shape", name


def _matching(root: Any, words: str) -> list[Any]:
    """Items of the drawing that ``words`` fit, such as ``large red item``; size or colour may be left out."""
    *features, noun = words.split()
    fit = []
    for item in element(root, "area_svg"):
        size, color, kind, name = _figure(item)
        if all(word in (size, color) for word in features) and noun in ("item", kind, name):
            fit.append(item)
    return fit


@expert("click-shape")
def click_shape(view: PageView, history: Sequence[str]) -> str:
    (words,) = find(view, r"Click on an? (.+)")
    items = _matching(tree(view), words)
    if not items:
        raise NoMoveError(f"the drawing has no {words}")
    item = items[0]
    names = {"circle": ("cx", "cy"), "polygon": ("points",)}.get(item.tag, ("x", "y"))
    place = " and ".join(f"@{name}={quote(item.get(name))}" for name in names)
    return f"clickxpath //*[{place}]"


@expert("count-shape")
def count_shape(view: PageView, history: Sequence[str]) -> str:
    (words,) = find(view, r"How many (.+)s are there")
    return by_text("button", str(len(_matching(tree(view), words))))


@expert("identify-shape")
def identify_shape(view: PageView, history: Sequence[str]) -> str:
    _, _, kind, name = _figure(first(tree(view), "//*[@id='area_svg']/*"))
    return by_text("button", {"digit": "Number", "letter": "Letter"}.get(kind, name.capitalize()))


@expert("grid-coordinate")
def grid_coordinate(view: PageView, history: Sequence[str]) -> str:
    (point,) = find(view, r"(\(-?\d,-?\d\))")
    return by_id(point)


# ------------------------------------------------------------------------------------------------ forms by their labels


@expert("multi-layouts", "multi-orderings")
def search_movies(view: PageView, history: Sequence[str]) -> str:
    root = tree(view)
    genre, director, year = find(view, r"for (\w+) movies directed by (.+) from year (\d+)")
    fields = {}
    for pattern, text in (("Genre", genre), ("Director", director), ("Year|Date", year)):
        label = next((item for item in root.iter() if re.search(pattern, _own(item)) and _beside(item)), None)
        if label is None:
            raise NoMoveError(f"the form has no label like {pattern}")
        fields[f"clickxpath //*[text()={quote(_own(label))}]/..//input"] = text
    for item in root.iter("button", "div"):
        if _own(item) in ("Submit", "Search", "Go!"):
            return fill(root, fields) or f"clickxpath //{item.tag}[text()={quote(_own(item))}]"
    raise NoMoveError("the form has nothing to submit it by")


def _own(item: Any) -> str:
    return item.text or "" if isinstance(item.tag, str) else ""


def _beside(item: Any) -> bool:
    """Whether a label has its field beside it."""
    return bool(item.xpath("..//input"))
