"""An elastic group of workers that grows: Ray Train ends all and starts more, but not before a checkpoint is there.

Its controller decides, in a process of its own, and asks by a key of the run's; rank 0 answers once the checkpoint is
on the disk. So growing costs no update, and is not counted among the deaths without one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from ddil_dist.control import RunControl
from ddil_dist.errors import EnvironmentFailure
from learner.checkpoint import CheckpointStore

LOOK_S: Final = 0.5


def await_checkpoint(control: RunControl, *, timeout_s: float) -> None:
    """Ask the workers for a checkpoint, and return once it is there, or at the deadline."""
    control.ask_for_checkpoint(within_s=timeout_s)
    while control.checkpoint_wanted():  # the server forgets it at the deadline
        time.sleep(LOOK_S)


def wanted_checkpoint(control: RunControl, store: CheckpointStore) -> Callable[[int], bool]:
    """For rank 0 to ask after each update: whether a checkpoint is wanted of it, until there is one. Says so then."""
    since: int | None = None

    def is_wanted(update: int) -> bool:
        nonlocal since
        try:
            if not control.checkpoint_wanted():
                since = None
                return False
            since = update if since is None else since
            if (store.newest_update() or 0) < since:
                return True
            control.checkpoint_taken()
            since = None
        except EnvironmentFailure:  # Redis is away
            pass
        return False

    return is_wanted
