"""An endless seeded stream of (x_0, caption) for forward diffusion: shuffled epochs, encoded by the VAE in batches."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor

from ddil_dist.data.cache import LatentCache
from ddil_dist.data.image_text import ImageTextData
from ddil_dist.models.pipeline import TeacherPipeline


class ForwardData:
    """Draws encoded images in a seeded order that `state_dict` can resume exactly.

    Invariant: the position counts rows handed out; rows encoded ahead are recomputed after a resume, with the same
    posterior noise, because noise is seeded by batch.
    """

    def __init__(
        self,
        data: ImageTextData,
        teacher: TeacherPipeline,
        *,
        seed: int,
        encode_batch: int = 32,
        cache: LatentCache | None = None,
    ) -> None:
        self._data = data
        self._cache = cache
        self._teacher = teacher
        self._seed = seed
        self._encode_batch = encode_batch
        self._position = 0
        self._ahead: deque[tuple[Tensor, str]] = deque()

    def next(self, num: int) -> tuple[Tensor, list[str]]:
        """`num` latents [num, C, h, w] float32 on the teacher's device, and their captions."""
        while len(self._ahead) < num:
            self._encode()
        rows = [self._ahead.popleft() for _ in range(num)]
        self._position += num
        return torch.stack([latent for latent, _ in rows]), [caption for _, caption in rows]

    def next_captions(self, num: int) -> list[str]:
        """The captions that the next `num` rows have, without reading their images."""
        rows = [self._row(self._position + offset) for offset in range(num)]
        self._position += num
        self._ahead.clear()
        return self._data.captions_of(rows)

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._position = 0
        self._ahead.clear()
        whole, rest = divmod(state["position"], self._encode_batch)
        self._position = whole * self._encode_batch
        if rest:
            self.next(rest)

    def _encode(self) -> None:
        batch = (self._position + len(self._ahead)) // self._encode_batch
        first = batch * self._encode_batch
        epoch_rows = [self._row(first + offset) for offset in range(self._encode_batch)]
        if self._cache is None:
            images, captions = self._data.images(epoch_rows)
            mean, std = self._teacher.image_posterior(images)
        else:
            mean, std, captions = self._cache.rows(epoch_rows)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + batch)
        latents = self._teacher.draw_latents(mean, std, generator)
        self._ahead.extend(zip(latents, captions, strict=True))

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._data))
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            generator = np.random.default_rng((self._seed, 2, epoch))
            mapped = self._cache is not None  # any row of a cache is as cheap as the next
            self._order = generator.permutation(len(self._data)) if mapped else self._data.shuffled(generator)
        return int(self._order[offset])
