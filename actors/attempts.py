"""Steps of a loop that must go on whatever fails: an error is said once, until it changes or the step works again."""

from __future__ import annotations

import re
from collections.abc import Callable

from ddil_dist.control import reason_of


class Attempts:
    """Tries steps, each known by its function's name. who: is said before what fails."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._failing: dict[str, str] = {}

    def make(self, step: Callable[[], None]) -> None:
        """Call the step; say what it raises unless that was said, in other numbers such as seconds perhaps."""
        try:
            step()
        except Exception as error:  # Redis is away, mostly: what runs goes on
            told = f"{type(error).__name__}: {reason_of(error)}"
            gist = re.sub(r"\d+", "#", told)
            if self._failing.get(step.__name__) != gist:
                print(f"ddil_dist: {self._who}: {told}", flush=True)
            self._failing[step.__name__] = gist
        else:
            self._failing.pop(step.__name__, None)
