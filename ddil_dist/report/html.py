"""HTML as nested calls that escape by construction: a plain str is text, only `Html` is markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

Colour = str
"""A CSS variable of style.css without its dashes, such as "student"."""


class Html(str):
    """Markup, everything in it escaped already."""

    __slots__ = ()


def el(tag: str, *children: str, **attributes: str | None) -> Html:
    """An element; a child that is no `Html` is escaped, as is every attribute. `class_` is class, `a_b` is a-b."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value, quote=True)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in ("img", "meta", "br", "link"):
        return Html(f"<{tag}{given}>")
    return Html(f"<{tag}{given}>{join(children)}</{tag}>")


def join(children: Iterable[str]) -> Html:
    """Markup and text one after the other, the text escaped."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child, quote=False) for child in children))


def section(anchor: str, title: str, *children: str) -> Html:
    """A section of the page with a heading that can be linked to."""
    return el("section", el("h2", title), *children, id=anchor)


def lead(*children: str) -> Html:
    """The sentence that says what a section shows."""
    return el("p", *children, class_="lead")


def missing(text: str) -> Html:
    """The line that stands for a part that is not there."""
    return el("p", text, class_="missing")


def legend(entries: Iterable[tuple[str, Colour]]) -> Html:
    """Colour keys, in a row."""
    keys = [el("li", _swatch(colour), label) for label, colour in entries]
    return el("ul", *keys, class_="legend")


def _swatch(colour: Colour) -> Html:
    """A colour key: a square, or a dashed line for a colour named "student dashed"."""
    name, _, dashed = colour.partition(" ")
    if dashed:
        return el("i", class_="dash", style=f"border-color:var(--{name})")
    return el("i", style=f"background:var(--{name})")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table whose first column names the row; a cell of markup must be a `td`. It scrolls sideways where it must."""
    header = el("tr", *[el("th", cell, scope="col") for cell in head])
    body = [
        el(
            "tr",
            el("th", row[0], scope="row"),
            *[cell if isinstance(cell, Html) else el("td", cell) for cell in row[1:]],
        )
        for row in rows
    ]
    return el("div", el("table", el("thead", header), el("tbody", *body)), class_="scroll")


def stacked_bar(label: str, total_text: str, parts: Sequence[tuple[str, float, Colour]]) -> Html:
    """One horizontal bar of (name, amount >= 0, colour) parts with the shares written under it."""
    whole = sum(amount for _, amount, _ in parts) or 1.0
    pieces = [
        el(
            "i",
            style=f"flex-grow:{amount / whole:.5f};background:var(--{colour})",
            title=f"{name}: {amount / whole:.1%}",
        )
        for name, amount, colour in parts
        if amount > 0
    ]
    keys = [
        el("li", el("i", style=f"background:var(--{colour})"), f"{name} ", el("b", percent(amount / whole)))
        for name, amount, colour in parts
        if amount > 0
    ]
    head = el("p", el("b", label), el("span", total_text), class_="bar-head")
    return el("div", head, el("div", *pieces, class_="bar"), el("ul", *keys, class_="legend"), class_="bar-block")


def percent(share: float) -> str:
    """A share as whole per cent; near the ends with a digit, so that something never reads as nothing or as all."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{share:.0%}" if 0.0995 <= share <= 0.9905 or share in (0, 1) else f"{share:.1%}"


def duration(seconds: float) -> str:
    """A length of time in the two units that matter."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.2g} ms" if seconds < 0.00995 else f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def size(num_bytes: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} GiB"


def plural(num: int, noun: str) -> str:
    """The number with its noun."""
    return f"{count(num)} {noun}" if num == 1 else f"{count(num)} {noun}s"


def count(value: float) -> str:
    """A whole number with its thousands apart."""
    return f"{round(value):,}".replace(",", "\u202f")
