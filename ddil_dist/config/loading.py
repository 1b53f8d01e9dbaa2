"""Reading and writing configurations: YAML and overrides in, one line a problem out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from pydantic import ValidationError

from ddil_dist.config.curriculum import stage_mappings
from ddil_dist.config.run import RunConfig
from ddil_dist.config.thresholding import EACH, ONE
from ddil_dist.errors import ConfigError
from ddil_dist.methods import REFUSED
from ddil_dist.section import Section


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated configuration of a YAML file and `key=value` overrides, which win.

    Raises ConfigError with one line a problem.
    """
    try:
        merged = OmegaConf.create({})
        if path is not None:
            if not path.is_file():
                raise ConfigError(f"--config: no file at {path}")
            loaded = OmegaConf.load(path)
            if not OmegaConf.is_dict(loaded):
                raise ConfigError(f"--config: {path} holds no mapping of sections; begin with a key such as 'run:'")
            merged = OmegaConf.merge(merged, loaded)  # type: ignore[assignment]
        for override in overrides:
            if not re.match(r"[A-Za-z_][\w.\[\]]*=", override):
                raise ConfigError(f"'{override}' is not an override; write key=value, such as learner.updates=200")
            merged = _override(merged, override)
        raw = OmegaConf.to_container(merged, resolve=True)
    except InterpolationKeyError as error:
        raise ConfigError(_unknown_interpolation(error)) from error
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        source = path if path is not None else "overrides"
        raise ConfigError(f"{source}: not readable as configuration: {' '.join(str(error).split())}") from error
    return parse_config(raw)


def _override(merged: Any, override: str) -> Any:
    """The mapping with one `key=value` set. An element of a list may be named, as `prior.parts[0]` or `prior.parts.0`.

    Raises ConfigError where the list has no such element.
    """
    key, _, text = override.partition("=")
    path = [part for part in re.split(r"[.\[\]]+", key) if part]
    index = next((place for place, part in enumerate(path) if part.isdigit()), None)
    if index is None:
        return OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
    name, number = ".".join(path[:index]), int(path[index])
    elements = OmegaConf.select(merged, name)
    if elements is None:
        elements = OmegaConf.select(OmegaConf.create(RunConfig().model_dump(mode="json")), name)
    if not OmegaConf.is_list(elements):
        return OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
    if number >= len(elements):
        raise ConfigError(f"{name}: there is no element {number}; it has {len(elements)}, counted from 0")
    OmegaConf.update(merged, name, elements)
    OmegaConf.update(merged, ".".join(path), yaml.safe_load(text))
    return merged


def _unknown_interpolation(error: InterpolationKeyError) -> str:
    """What to write in place of "${HOME}", which OmegaConf takes for a key of the configuration."""
    found = re.search(r"Interpolation key '([^']*)'", str(error))
    name = found.group(1) if found else ""
    return (
        f"{error.full_key}: ${{{name}}} names no key of the configuration; for an environment variable write "
        f"${{oc.env:{name}}}"
    )


def parse_config(raw: Any) -> RunConfig:
    """Validate plain data into a RunConfig, its stages too; raises ConfigError with one line a problem."""
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = [_describe(dict(problem)) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None
    resolve_stages(config)
    return config


def resolve_stages(config: RunConfig) -> list[RunConfig]:
    """The single-stage runs that a configuration stands for, in order: its curriculum's, or itself alone.

    Raises ConfigError with one line a problem of a stage.
    """
    if config.curriculum is None:
        return [config]
    stages, problems = [], []
    for index, raw in enumerate(stage_mappings(config.model_dump(mode="json"), config.curriculum)):
        try:
            stages.append(parse_config(raw))
        except ConfigError as error:
            problems += [f"curriculum.stages.{index}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(problems))
    return stages


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, which `load_config` reads back to an equal one, but for passwords in URLs."""
    raw = config.model_dump(mode="json")
    redis = raw["redis"]
    redis["url"] = None if redis["url"] is None else _without_password(redis["url"])
    redis["more_urls"] = [_without_password(url) for url in redis["more_urls"]]
    return OmegaConf.to_yaml(OmegaConf.create(_literal(raw)))


def changes(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every value that differs between two dumped configurations."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *[name for name in new if name not in old]]
        return [
            change
            for name in names
            for change in changes(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if old == new else [(key, old, new)]


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    user_and_password, at, address = rest.rpartition("@")
    user = user_and_password.partition(":")[0]
    return f"{scheme}://{user}{at if user else ''}{address}"


def _literal(value: Any) -> Any:
    """`value` with every "${" escaped, so that OmegaConf reads it as text and not as an interpolation."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _describe(problem: dict[str, Any]) -> str:
    """One line for one pydantic problem: key, value, rule, remedy."""
    path, section = _locate(problem["loc"])
    key, kind, value = ".".join(path), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        valid = sorted(section.model_fields) if section is not None else []
        return f"{key}: unknown key{_shown(path, value)}; {_nearest(path[-1], valid, prefix=path[:-1])}"
    if kind == "union_tag_invalid":
        if key == "objective" and problem["ctx"]["tag"] in REFUSED:
            return f"{key}.type: {problem['ctx']['tag']!r} of the installed package {REFUSED[problem['ctx']['tag']]}"
        tags = re.findall(r"'([^']*)'", problem["ctx"]["expected_tags"])
        return f"{key}.type: unknown type {problem['ctx']['tag']!r}; {_nearest(problem['ctx']['tag'], tags)}"
    if kind == "union_tag_not_found":
        return f"{key}.type: is missing (got {value!r}); say which of {', '.join(_tags(path))}"
    if kind == "missing":
        return f"{key}: is missing, and has no default"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not key or (kind == "value_error" and isinstance(value, dict)):
        named = message.partition(": ")[0] in getattr(_at(path), "model_fields", ())
        return f"{key}{'.' if named else ': '}{message}" if key else message
    shown = "a value that may hold a password" if path[:1] == ["redis"] else repr(value)
    return f"{key}: {message} (got {shown})"


def _shown(path: Sequence[str], value: Any) -> str:
    """The value in brackets; nothing of Redis's, where a password may have gone astray."""
    return "" if path[:1] == ["redis"] else f" (value {value!r})"


def _nearest(word: str, valid: Sequence[str], *, prefix: Sequence[str] = ()) -> str:
    """The hint after an unknown word: the nearest valid one, else all of them."""
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"did you mean {'.'.join([*prefix, near[0]])}?" if near else f"valid there: {', '.join(valid)}"


def _locate(location: Sequence[str | int]) -> tuple[list[str], type[Section] | None]:
    """A problem's key as people write it, and the section that holds the key; None where none does.

    Pydantic's locations name, after a union's key, the member that it chose; that is not part of the key.
    """
    path: list[str] = []
    holder: type[Section] | None = None
    here: Any = RunConfig  # a section; the members of a union by tag; or None within a plain value
    for part in location:
        if isinstance(here, dict):
            here = here.get(part)
            continue
        if isinstance(part, int):
            path.append(str(part))
            continue
        holder = here
        if here is None and part in (ONE, EACH):
            continue
        path.append(part)
        here = _sections_of(here, part)
    return path, holder


def _sections_of(section: type[Section] | None, name: str) -> Any:
    """The section under a key, the sections by `type` where it is one of several, None where it is a plain value."""
    field = section.model_fields.get(name) if section is not None else None
    if field is None:
        return None
    sections = [
        item
        for item in (field.annotation, *get_args(field.annotation))
        if isinstance(item, type) and issubclass(item, Section)
    ]
    if len(sections) < 2:
        return sections[0] if sections else None
    return {item.model_fields["type"].default: item for item in sections}


def _at(path: Sequence[str]) -> type[Section] | None:
    """The section at a key; None where there are several, or a plain value."""
    section: Any = RunConfig
    for part in path:
        section = _sections_of(section, part) if isinstance(section, type) else None
    return section if isinstance(section, type) else None


def _tags(path: Sequence[str]) -> list[str]:
    """The types that the union at a key knows."""
    section: Any = RunConfig
    for part in path:
        section = _sections_of(section, part)
    return list(section)
