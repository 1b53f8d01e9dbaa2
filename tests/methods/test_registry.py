"""Methods of other packages: taken by their entry points; a broken one costs only those who ask for it."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field

from ddil_dist.config import load_config, loading
from ddil_dist.errors import ConfigError
from ddil_dist.methods import ENTRY_POINTS, Method
from ddil_dist.methods.registry import OURS, all_methods, name_of


class Good(Method):
    title: ClassVar[str] = "good"
    losses: ClassVar[str] = "somewhere"
    type: Literal["good"] = Field("good", description="good")


class Untitled(Method):
    type: Literal["untitled"] = Field("untitled", description="untitled")


class Taken(Good):
    type: Literal["progressive"] = Field("progressive", description="taken")  # type: ignore[assignment]


class Nameless(Good):
    type: str = Field("nameless", description="nameless")  # type: ignore[assignment]


def point(name: str) -> EntryPoint:
    return EntryPoint(name, f"tests.methods.test_registry:{name}", ENTRY_POINTS)


def test_a_method_of_another_package_is_one_of_all() -> None:
    methods, refused = all_methods([point("Good")])
    assert methods == (*OURS, Good)
    assert refused == {}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Missing", "cannot be imported (AttributeError:"),
        ("point", "is no subclass of Method"),
        ("Untitled", "Untitled does not set title and losses"),
        ("Taken", "the type 'progressive' is taken"),
        ("Nameless", "Nameless.type is no Literal of one name with that default"),
    ],
)
def test_what_is_no_method_is_left_out_with_its_reason(name: str, why: str) -> None:
    methods, refused = all_methods([point(name)])
    assert methods == OURS
    assert why in refused[name]


def test_who_asks_for_a_broken_one_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loading, "REFUSED", {"mine": "my-package cannot be imported (ImportError: x); mend or remove it"}
    )
    with pytest.raises(ConfigError, match=r"^objective.type: 'mine' of the installed package my-package cannot be"):
        load_config(None, ["objective.type=mine"])


def test_the_page_of_methods_names_every_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [line for line in page.partition("## What each may train on")[2].splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {name_of(method) for method in OURS}
