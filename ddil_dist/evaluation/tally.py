"""How far an evaluation is, told before every batch of images to whoever watches it or may stop it. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Made:
    """What was made so far.

    policy                     the one whose images come next.
    num_images, total_images   of all policies.
    share                      of the network's calls, 0 to 1: some policies take many more an image than others.
    """

    policy: str
    num_images: int
    total_images: int
    share: float


OnBatch = Callable[[Made], None]
"""May raise EvaluationStoppedError to end the evaluation there."""


class Tally:
    """Counts what an evaluation makes. num_images: of each policy; calls: of the network for an image, by policy."""

    def __init__(self, num_images: int, calls: Sequence[int], on_batch: OnBatch) -> None:
        self._total_images = num_images * len(calls)
        self._total_calls = num_images * sum(calls)
        self._images = self._called = 0
        self._on_batch = on_batch

    def begin(self, policy: str) -> None:
        """A batch of the policy comes next."""
        self._on_batch(Made(policy, self._images, self._total_images, self._called / self._total_calls))

    def end(self, num_images: int, calls: int) -> None:
        """It was made, in `calls` of the network an image."""
        self._images += num_images
        self._called += num_images * calls
