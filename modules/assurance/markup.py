"""Pieces of the pages. Everything that came from outside is cleaned and escaped here."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from modules.assurance import words
from modules.assurance.plots import Estimate
from modules.assurance.signature import KEY, KEY_FILE

Entry = Mapping[str, Any]

KEY_LINE = (
    '<p class="key"><span><i class="fresh"></i>fresh units, new in every round</span>'
    '<span><i class="anchor"></i>anchor units, the same in every round</span>'
    '<span><i class="tau"></i>limit</span><span><i class="holds"></i>side where it holds</span></p>'
)


def text(value: object, most: int = words.LONGEST) -> str:
    """Outside text as markup."""
    return html.escape(words.clean(value, most))


def code(value: object) -> str:
    """A digest, a name or a path as markup."""
    return f"<code>{html.escape(words.clean(value, 200))}</code>"


def badge(ruling: str) -> str:
    return f'<span class="badge {html.escape(ruling)}">{html.escape(words.RULINGS.get(ruling, ruling))}</span>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are markup; a head that begins with ``>`` marks a column of numbers."""
    numeric = [name.startswith(">") for name in head]
    css = [' class="num"' if one else "" for one in numeric]
    top = "".join(f"<th{c}>{html.escape(name.lstrip('>'))}</th>" for name, c in zip(head, css, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, css, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def definitions(rows: Sequence[tuple[str, str]]) -> str:
    """Term and description; both are markup."""
    return "<dl>" + "".join(f"<dt>{term}</dt><dd>{said}</dd>" for term, said in rows) + "</dl>"


def estimate(label: str, figure: Entry | None) -> Estimate | None:
    """The plot's view of a figure; ``None`` where it was not measured."""
    if figure is None or figure["status"] != "measured":
        return None
    return Estimate(label, figure["value"], figure["low"], figure["high"])


def unsigned_banner(signed: bool) -> str:
    """Large letters where there is no key; nothing where there is one."""
    if signed:
        return ""
    return (
        f'<div class="unsigned"><strong>{words.UNSIGNED}</strong>The checksums show that these files fit together and '
        f"were not changed by accident. {words.INTEGRITY}: nothing here says who measured. Set {code(KEY)} or "
        f"{code(KEY_FILE)} to sign.</div>"
    )
