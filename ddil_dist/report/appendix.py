"""The end of the report: how the metrics were taken, and the configuration."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from ddil_dist.config import RunConfig, changes
from ddil_dist.metrics.protocol import Protocol
from ddil_dist.report.html import Html, el, lead, missing, section, table
from ddil_dist.report.record import RunRecord


def protocol_section(run: RunRecord) -> Html:
    """What all policies share once, what differs in a table."""
    title = "How it was measured"
    policies = run.results.policies if run.results is not None else ()
    if not policies:
        return section("protocol", title, missing("No results.json yet: nothing has been measured."))
    names = [field.name for field in fields(Protocol)]
    values = {name: [_show(getattr(policy.protocol, name)) for policy in policies] for name in names}
    shared = [name for name in names if len(set(values[name])) == 1]
    differing = [name for name in names if name not in shared]
    facts = [el("div", el("dt", _words(name)), el("dd", values[name][0])) for name in shared]
    blocks = [el("dl", *facts, class_="facts")] if facts else []
    if differing:
        rows = [[policy.name, *[values[name][index] for name in differing]] for index, policy in enumerate(policies)]
        blocks.append(table(["policy", *[_words(name) for name in differing]], rows))
    return section(
        "protocol", title, lead("Numbers compare only where all of this is equal, and images are as many."), *blocks
    )


def _words(name: str) -> str:
    words = {"nfes_per_image": "NFEs an image", "num_images": "images", "clip_model": "CLIP model"}
    return words.get(name, name.replace("_", " "))


def _show(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def config_section(run: RunRecord) -> Html:
    """What was changed from the defaults, and the whole file."""
    if run.config_text is None:
        return section("config", "Configuration", missing("No config.yaml in the run's directory."))
    blocks: list[Html] = []
    if run.config is not None:
        changed = changes(RunConfig().model_dump(mode="json"), run.config.model_dump(mode="json"))
        chips = [
            el("li", without_secrets(f"{key}={_plain(new)}"), el("s", without_secrets(f"was {_plain(old)}")))
            for key, old, new in changed
        ]
        text = "Changed from the defaults:" if chips else "Everything is at its default."
        blocks += [lead(text), el("ul", *chips, class_="chips")] if chips else [lead(text)]
    yaml = el("pre", without_secrets(run.config_text))
    return section("config", "Configuration", *blocks, el("details", el("summary", "config.yaml"), yaml))


def without_secrets(text: str) -> str:
    """The text with the user part of every URL masked: a report is passed on more freely than a config."""
    return re.sub(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@]*@", r"\1***@", text)


def _plain(value: Any) -> str:
    return "unset" if value is None else str(value)
