"""Publishing the student: whether a version is wanted, and its way to the store beside the training.

The training thread asks `wants`, which waits for nobody, and copies the weights into one flat buffer by `offer`. A
thread ships the buffer, tells that there is a new version, and looks now and then whether anybody reads versions and
whether the store still has one. No store that is silent, full or restarting ends a run: actors go on with what they
have, and the learner's own waits for states have their deadlines.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from ddil_dist.errors import DdilError
from ddil_dist.journal import Journal
from ddil_dist.types import LatentDtype, WeightsVersion
from ddil_dist.weights import PackedWeights, Packer, WeightStore

LOOK_S = 1.0
"""Between two looks for readers and at the store."""
PAUSE_S = 10.0
"""After a version that could not be shipped, before another is wanted."""

logger = logging.getLogger(__name__)


class Publisher:
    """Ships versions to a store, one at a time. Used by rank 0 alone.

    dtype        in which the readers run the student: nobody needs more of it.
    on_publish   told of each version that the store has; asked again later where it fails.
    has_readers  whether anybody takes versions; while it fails, what it said last holds.
    close_s      for a version that is on its way when training ends.
    background   in a thread of its own; else `offer` returns when the version is there, and raises what went wrong.
    """

    def __init__(
        self,
        store: WeightStore,
        *,
        dtype: LatentDtype = "float32",
        on_publish: Callable[[WeightsVersion], None] = lambda version: None,
        has_readers: Callable[[], bool] = lambda: True,
        journal: Journal | None = None,
        background: bool = False,
        close_s: float = 30.0,
    ) -> None:
        self._close_s = close_s
        self._store = store
        self._dtype = dtype
        self._on_publish = on_publish
        self._has_readers = has_readers
        self._journal = journal
        self._packer = Packer()
        self._read = True
        self._answered = False
        self._newest: WeightsVersion | None = None
        self._staged: PackedWeights | None = None
        self._offered = 0.0
        self._not_before = 0.0
        self._untold: WeightsVersion | None = None
        self._troubles: set[str] = set()
        self._bug: BaseException | None = None
        self._wake, self._idle = threading.Event(), threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True) if background else None

    def start(self) -> None:
        """Look for the first time, so that the first version is wanted at once; begin the thread."""
        if self._thread is not None:
            self._look()
            self._thread.start()

    def wants(self, update: int, *, due: bool) -> bool:
        """Whether the weights of this update should be offered now.

        They should where somebody reads versions and the store has none, as before the first and after it lost them,
        or where one is due and the store's is older. Not while another is on its way.
        """
        if self._bug is not None:
            raise self._bug
        if self._thread is None:
            self._look()
        if self._staged is not None or not (self._read and self._answered) or time.monotonic() < self._not_before:
            return False
        return self._newest is None or (due and self._newest.version < update)

    def offer(self, weights: Mapping[str, Tensor], *, update: int, progress: float) -> None:
        """Take a copy of the weights, to be published as this update's. Only where they are wanted."""
        assert self._staged is None, "another version is on its way"
        self._offered = time.monotonic()
        self._idle.clear()
        self._staged = self._packer.pack(weights, version=update, progress=progress, dtype=self._dtype)
        if self._thread is None:
            self._ship()
            self._tell()
        else:
            self._wake.set()

    def close(self) -> None:
        """Let a version that is on its way arrive, for `close_s` at most, and the thread end by itself."""
        self._closed = True
        self._wake.set()
        if self._thread is not None and self._staged is not None:
            self._idle.wait(self._close_s)

    def _run(self) -> None:
        try:
            while not self._closed:
                self._wake.wait(LOOK_S)
                self._wake.clear()
                self.tend()
        except BaseException as error:  # raised in the training thread
            self._bug = error

    def tend(self) -> None:
        """What the thread does again and again: ship what is offered, tell of it, look around."""
        if self._staged is not None:
            with self._endured("a weights version could not be published"):
                self._ship()
        if self._untold is not None and not self._closed:
            with self._endured("a published weights version could not be made known"):
                self._tell()
        if not self._closed:
            self._look()

    def _ship(self) -> None:
        packed = self._staged
        assert packed is not None
        try:
            self._store.publish(packed)
            self._newest = self._untold = packed.version
        except BaseException:
            self._not_before = time.monotonic() + PAUSE_S
            raise
        finally:
            self._staged = None
            self._idle.set()
        if self._journal is not None:
            self._journal.write(
                "publish",
                version=packed.version.version,
                digest=packed.version.digest,
                size_bytes=packed.version.size_bytes,
                seconds=time.monotonic() - self._offered,
            )

    def _tell(self) -> None:
        assert self._untold is not None
        self._on_publish(self._untold)
        self._untold = None

    def _look(self) -> None:
        """Who reads, and what there is to be read."""
        with self._endured("whether there are rollout actors is not known"):
            self._read = self._has_readers()
        answered = False
        with self._endured("the weight store does not say what it holds"):
            self._newest = self._store.newest()
            answered = True
        self._answered = answered

    @contextmanager
    def _endured(self, trouble: str) -> Iterator[None]:
        """Within the block an error of ours is logged, once until the block succeeds, and passed over by the thread."""
        try:
            yield
        except DdilError as error:
            if self._thread is None:
                raise
            if trouble not in self._troubles:
                logger.warning("%s: %s; training goes on, and it is tried again", trouble, error)
            self._troubles.add(trouble)
        else:
            self._troubles.discard(trouble)
