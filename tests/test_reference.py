"""The reference of the configuration: complete, true, and answered at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddil_dist.config import RunConfig, load_config
from ddil_dist.config.reference import describe, groups, markdown
from ddil_dist.errors import ConfigError
from ddil_dist.launch.__main__ import main

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"


def test_the_page_is_that_of_the_code() -> None:
    remedy = "make it again: python -m ddil_dist.config.reference > docs/configuration.md"
    assert PAGE.read_text(encoding="utf-8") == markdown(), remedy


def test_every_key_is_explained() -> None:
    keys = [key for group in groups() for key in group.keys]
    assert [key.key for key in keys if not key.meaning] == []
    assert all(group.meaning for group in groups())


def test_every_key_of_a_default_run_is_there_with_its_value() -> None:
    told = {key.key: key.default for group in groups() if "(" not in group.name for key in group.keys}

    def leaves(value: Any, key: str) -> None:
        if isinstance(value, dict) and value and key not in told:
            for name, inner in value.items():
                leaves(inner, f"{key}.{name}" if key else name)
        elif key.split(".")[0] not in ("thresholding", "objective", "curriculum"):
            assert key in told, key

    leaves(RunConfig().model_dump(mode="json"), "")
    assert told["learner.updates"] == "1000"
    assert load_config(None, [f"learner.ema_decay={told['learner.ema_decay']}"]) == RunConfig()


def test_a_key_a_section_and_an_element_are_described() -> None:
    assert describe("learner.ema_decay")[1].startswith(
        "  learner.ema_decay  (number, at least 0, under 1, default 0.98)"
    )
    assert describe("prior.parts[0].student") == describe("prior.parts.0.student") == describe("prior.parts[N].student")
    forms = {group.name for group in groups() if group.name.startswith("objective (")}
    assert {"objective (type: progressive)", "objective (type: dmd)"} <= forms
    with pytest.raises(ConfigError, match=r"--help: no key 'learner.update'; did you mean learner\.updates\?"):
        describe("learner.update")


def test_help_of_a_key_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", "learner.updates"]) == 0
    assert "whole number, over 0, default 1000" in capsys.readouterr().out
    assert main(["--help", "no.such"]) == 2
    assert main(["-h"]) == 0
    assert "--help KEY tells of one" in " ".join(capsys.readouterr().out.split())


def test_help_of_a_key_imports_nothing_heavy() -> None:
    code = (
        "import sys; from ddil_dist.launch.__main__ import main; main(['--help', 'learner']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'diffusers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
