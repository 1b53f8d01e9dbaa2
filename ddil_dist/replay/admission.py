"""Inserts before the rate limiter, which the first shard keeps for all: admitted at once, or once samples are taken."""

from __future__ import annotations

from ddil_dist.errors import WaitTimeoutError
from ddil_dist.replay.accounts import WaitAccount
from ddil_dist.replay.view import View
from ddil_dist.replay.waits import Deadline


def admit(view: View, waits: WaitAccount, writer: str, batch_id: int, num: int, deadline: Deadline) -> None:
    """Several shards: charge a batch to the limiter on the first one, once. With one, the insert itself does."""
    first = view.first
    keys = [*first.shard.keys]
    keys[5:7] = keys[5] + b"-charged", keys[6] + b"-charged"
    while True:
        packed = first.shard.call("admit", first.incarnation, writer, batch_id, num, keys=keys)
        kind = view.exchange(first, packed, deadline, "an insert")[0]
        if kind == b"ok":
            return
        if kind == b"reset":
            view.open(first, deadline)
        else:
            wait_for_samples(view, waits, num, deadline)


def wait_for_samples(view: View, waits: WaitAccount, num: int, deadline: Deadline) -> None:
    """Return once the limiter would let the insert in; the batch is not sent again before. Raises WaitTimeoutError."""
    while True:
        with view.lock:
            view.sync(deadline, contents=False)
            limiter = view.limiter
        if limiter.can_insert(num):
            return
        if not waits.pause(deadline, "insert for samples"):
            raise WaitTimeoutError(
                f"an insert of {num} states waited {deadline.waited_s:.1f} s {limiter.why_no_insert(num)}"
            )
