"""Finding our own packages where a folder of the same name lies in the working directory.

`actors` and `learner` are installed at the top level, and Python looks into the working directory first.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from ddil_dist.errors import EnvironmentFailure

OURS = ("actors", "learner")
ROOT = Path(__file__).resolve().parents[2]
"""Holds ddil_dist, and the others beside it."""

_taken: list[str] = []


def claim() -> list[str]:
    """Make our packages those that their names mean in this process; the names that others had taken so far.

    Raises EnvironmentFailure where one of the others is imported already, or ours are not there.
    """
    for name in OURS:
        init = ROOT / name / "__init__.py"
        if not init.is_file():
            raise EnvironmentFailure(
                f"the package {name!r} is not installed beside ddil_dist, in {ROOT}; install it again"
            )
        loaded = sys.modules.get(name)
        if loaded is not None and _is_ours(loaded.__file__, init):
            continue
        if loaded is not None:
            raise EnvironmentFailure(
                f"{loaded.__file__ or name} is imported as {name!r}, a name of ddil_dist's own packages; rename it, or "
                "start from another directory"
            )
        found = importlib.util.find_spec(name)
        if found is not None and _is_ours(found.origin, init):
            continue
        _taken.append(name)
        spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return list(_taken)


def claim_in_worker() -> None:
    """The same in a process that Ray starts, before it looks into the launcher's working directory."""
    claim()
    import actors  # noqa: F401  (once imported, they are what their names mean)
    import learner  # noqa: F401


def _is_ours(origin: str | None, init: Path) -> bool:
    return origin is not None and Path(origin).resolve() == init
