"""The README's own code, run as printed where it needs no finished run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.integration
def test_the_replay_buffer_alone() -> None:
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "EmbeddedServer" in block)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout == "(8, 4, 8, 8) a red hat {749: 1}\n", done.stderr


def test_every_file_that_it_names_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) >= 4
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_tree_that_it_draws_is_the_tree() -> None:
    block = README.split("```\nddil_dist/\n")[1].split("```")[0]
    named = [line.split()[0] for line in block.splitlines() if line.startswith("  ")]
    assert len(named) >= 12
    assert [name for name in named if not (ROOT / "ddil_dist" / name).exists()] == []
