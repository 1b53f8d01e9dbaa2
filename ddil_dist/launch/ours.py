"""Finding our own packages where a folder of the same name lies in the working directory.

`actors` and `learner` are installed at the top level, and Python looks into the working directory first.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any

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


def changed() -> list[str]:
    """Functions, classes and methods of ours that this process has put others in the place of: dotted names.

    Other processes of a run import ours anew, and would go on without them.
    """
    found = []
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] in (*OURS, "ddil_dist") and file is not None and file.endswith(".py"):
            tree = ast.parse(Path(file).read_text(encoding="utf-8"))
            found += [f"{name}.{path}" for path in _changed(tree.body, vars(module), file)]
    return found


def _changed(body: Sequence[ast.stmt], there: Mapping[str, Any], file: str) -> Iterator[str]:
    """Names that `body`, of `file`, defines, and that are something from elsewhere by now."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            held = there.get(node.name)
            if not isinstance(held, type) or held.__module__ != there.get("__name__", there.get("__module__")):
                yield node.name
            else:
                yield from (f"{node.name}.{path}" for path in _changed(node.body, vars(held), file))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            code = _code(there.get(node.name))
            if code is not None and Path(code.co_filename) != Path(file):
                yield node.name


def _code(held: Any) -> CodeType | None:
    """Of a function, however it is wrapped; None of what has none to be told by."""
    for wrapper in ("fget", "__func__", "func"):
        held = getattr(held, wrapper, None) or held
    with suppress(ValueError, AttributeError):
        held = inspect.unwrap(held)
    code = getattr(held, "__code__", None)
    return code if isinstance(code, CodeType) else None


def _is_ours(origin: str | None, init: Path) -> bool:
    return origin is not None and Path(origin).resolve() == init
