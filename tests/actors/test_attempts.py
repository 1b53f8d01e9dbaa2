"""What keeps failing is said once, and again when it changes."""

from __future__ import annotations

import pytest

from actors.attempts import Attempts


def test_what_fails_is_said_once_until_it_changes(capsys: pytest.CaptureFixture[str]) -> None:
    attempts = Attempts("fleet")
    errors: list[Exception | None] = []

    def look() -> None:
        if (error := errors.pop(0)) is not None:
            raise error

    def collect() -> None:
        return

    def said(*coming: Exception | None) -> list[str]:
        errors[:] = coming
        while errors:
            attempts.make(look)
            attempts.make(collect)  # works in between, which says nothing of the other
        return capsys.readouterr().out.splitlines()

    away = "the server waited {} s"
    assert said(*(OSError(away.format(seconds)) for seconds in (0.5, 1.0, 12.5))) == [
        "ddil_dist: fleet: OSError: the server waited 0.5 s"
    ]
    assert said(OSError(away.format(13.0))) == []
    assert said(ValueError("another"), ValueError("another")) == ["ddil_dist: fleet: ValueError: another"]
    assert said(None, ValueError("another")) == ["ddil_dist: fleet: ValueError: another"], "it had worked in between"
