"""The results file of a run, `results.json`: every policy's row, and facts about the run as a whole. No torch.

One object: "policies" is a list of `PolicyResult.to_json`; every other key is a fact, such as
"export_max_abs_difference".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddil_dist.errors import DataError
from ddil_dist.metrics.protocol import PolicyResult

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Results:
    """What `results.json` holds."""

    policies: Sequence[PolicyResult]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain data by name, such as "export_max_abs_difference"."""

    @property
    def unmeasured(self) -> Sequence[str]:
        """Names of the policies that a stopped evaluation has not measured."""
        return tuple(self.facts.get("unmeasured", ()))


def write_results(path: Path, results: Results) -> None:
    """Write `results` to the file `path` at once: a reader sees the old file or the new one, never a part."""
    assert "policies" not in results.facts, "'policies' is the key of the rows"
    plain = {"policies": [policy.to_json() for policy in results.policies], **results.facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_results(path: Path) -> Results:
    """Read what `write_results` wrote; raises DataError if the file is not that."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        policies = [PolicyResult.from_json(policy) for policy in plain.pop("policies")]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not a results file ({error!r}); run the evaluation again to rewrite it") from error
    return Results(policies, plain)
