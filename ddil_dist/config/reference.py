"""Every key of the configuration in words: for `--help KEY`, and as docs/configuration.md.

python -m ddil_dist.config.reference > docs/configuration.md
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ddil_dist.config.run import RunConfig
from ddil_dist.errors import ConfigError
from ddil_dist.section import Section

NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}
BOUNDS = (("gt", "over"), ("ge", "at least"), ("lt", "under"), ("le", "at most"), ("min_length", "elements: at least"))


@dataclass(frozen=True)
class Key:
    """A key as people write it, and what it takes."""

    key: str
    kind: str
    default: str
    meaning: str

    def line(self) -> str:
        default = f", default {self.default}" if self.default else ""
        return f"{self.key}  ({self.kind}{default})  {self.meaning}".rstrip()


@dataclass(frozen=True)
class Group:
    """The keys of a section; of one that has several forms, those of the form that `type` names."""

    name: str
    meaning: str
    keys: tuple[Key, ...]


def groups() -> list[Group]:
    """Every section of the configuration, in its order, sections within sections after them."""
    return list(_groups("", RunConfig, ""))


def describe(key: str) -> list[str]:
    """Lines about a key, or about every key under it. Raises ConfigError for one that there is not."""
    wanted = re.sub(r"\[\d+\]|\.\d+(?=\.|$)", "[N]", key.strip("."))
    known = [(group, each) for group in groups() for each in group.keys]
    lines: list[str] = []
    for group, each in known:
        if each.key == wanted or each.key.startswith((f"{wanted}.", f"{wanted}[")):
            heading = f"{group.name}: {group.meaning}"
            lines += [heading] if heading not in lines else []
            lines.append(f"  {each.line()}")
    if not lines:
        near = difflib.get_close_matches(wanted, [each.key for _, each in known], n=1, cutoff=0.4)
        sections = ", ".join(dict.fromkeys(group.name.split(".")[0].split(" ")[0] for group in groups()))
        hint = f"did you mean {near[0]}?" if near else f"sections: {sections}"
        raise ConfigError(f"--help: no key {wanted!r}; {hint}")
    return lines


def markdown() -> str:
    """The whole reference as a page."""
    lines = [
        "# Configuration",
        "",
        "Every key of a run: in a YAML file given by `--config`, or as `key=value` on the command line, which wins. "
        "`python -m ddil_dist.launch --help KEY` tells of one, or of all keys of a section. Made from the code by "
        "`python -m ddil_dist.config.reference > docs/configuration.md`.",
    ]
    for group in groups():
        lines += [
            "",
            f"## {group.name}",
            "",
            group.meaning,
            "",
            "| key | takes | default | meaning |",
            "|---|---|---|---|",
        ]
        for each in group.keys:
            cells = (f"`{each.key}`", each.kind, f"`{each.default}`" if each.default else "", each.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _groups(name: str, section: type[Section], form: str) -> Iterator[Group]:
    keys: list[Key] = []
    within: list[tuple[str, type[Section], str]] = []
    for field_name, field in section.model_fields.items():
        key = f"{name}.{field_name}" if name else field_name
        found = _sections(field.annotation)
        for part in found:
            kind = part.model_fields.get("type")
            form = f"type: {kind.default}" if kind is not None and len(found) > 1 else ""
            within.append((key + _one_of(field.annotation), part, form))
        if not found or name:
            keys.append(_key(key, field))
    if name:
        summary = " ".join((section.__doc__ or "").split("\n\n")[0].split())
        yield Group(f"{name} ({form})" if form else name, summary, tuple(keys))
    elif keys:
        yield Group("the run as a whole", "Keys that stand by themselves.", tuple(keys))
    for key, part, its_form in within:
        yield from _groups(key, part, its_form)


def _key(key: str, field: FieldInfo) -> Key:
    meaning = field.description or ""
    return Key(key, _kind(field.annotation, field.metadata), _default(field), meaning)


def _default(field: FieldInfo) -> str:
    value = field.default_factory() if field.default_factory is not None else field.default  # type: ignore[call-arg]
    return "" if value is PydanticUndefined else _shown(value)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Section):
        return "{" + ", ".join(f"{name}: {_shown(getattr(value, name))}" for name in type(value).model_fields) + "}"
    if isinstance(value, tuple | list | frozenset):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_shown(item)}" for name, item in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a key takes, in words."""
    bounds = [f"{word} {_shown(getattr(part, name))}" for part in _flat(metadata) for name, word in BOUNDS
              if getattr(part, name, None) is not None]  # fmt: skip
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _kind(inner, [*more, *metadata])
    if origin is Literal:
        words = " or ".join(map(str, get_args(annotation)))
    elif origin in (Union, types.UnionType):
        words = " or ".join(dict.fromkeys(_kind(part) for part in get_args(annotation)))
    elif origin in (tuple, list, frozenset):
        words = f"list of {_kind(next(part for part in get_args(annotation) if part is not Ellipsis))}"
    elif origin is dict:
        words = f"mapping to {_kind(get_args(annotation)[1])}"
    elif annotation is type(None):
        words = "null"
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        words = "section"
    else:
        words = NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())
    return f"{words}, {', '.join(bounds)}" if bounds else words


def _one_of(annotation: Any) -> str:
    """How one of the elements is written, of a list or a mapping of sections."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _one_of(get_args(annotation)[0])
    return {tuple: "[N]", list: "[N]", dict: ".NAME"}.get(origin, "")


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for part in metadata:
        yield from part.metadata if isinstance(part, FieldInfo) else [part]


def _sections(annotation: Any) -> list[type[Section]]:
    """The sections that a key may hold."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    return list(dict.fromkeys(part for inner in get_args(annotation) for part in _sections(inner)))


if __name__ == "__main__":
    print(markdown(), end="")
