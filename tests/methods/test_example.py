"""The method of `examples/`, installed as its reader would install it, keeps the contract and trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "huber"
CONTRACT = """
import sys
from pathlib import Path
from tests.methods import contract
from tests.support.problem import tiny_problem

problem = tiny_problem(Path(sys.argv[1]), "objective.type=huber")
contract.check_losses(problem)
contract.check_rows_are_independent(problem)
contract.check_export(problem, Path(sys.argv[2]))
print(problem.config.objective)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of a process that has it."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "huber"
    shutil.copytree(EXAMPLE, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])}


def python(environment: Mapping[str, str], *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_short() -> None:
    lines = [line for path in EXAMPLE.rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) < 60


def test_it_keeps_the_contract(installed: Mapping[str, str], tiny_directory: Path, tmp_path: Path) -> None:
    told = python(installed, "-c", CONTRACT, str(tiny_directory), str(tmp_path / "student"))
    assert told.strip() == "type='huber' c=0.03"


def test_a_launch_trains_it(installed: Mapping[str, str], tiny_overrides: list[str], tmp_path: Path) -> None:
    python(installed, "-m", "ddil_dist.launch", *tiny_overrides, "objective.type=huber", "objective.c=0.5")
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if line["kind"] == "update"]
    assert len(losses) == 6
    assert all(0 < loss < 10 for loss in losses)
    assert "objective.c  (number, over 0, default 0.03)" in python(
        installed, "-m", "ddil_dist.launch", "--help", "objective.c"
    )
