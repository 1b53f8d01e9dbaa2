"""An endless seeded stream of (x_0, caption) for forward diffusion: shuffled epochs, encoded by the VAE in batches."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from ddil_dist.data.rows import Rows
from ddil_dist.models.pipeline import TeacherPipeline


class ForwardData:
    """Draws encoded images in a seeded order that `state_dict` can resume exactly.

    Invariant: the position counts rows handed out; rows encoded ahead are recomputed after a resume, with the same
    posterior noise, because noise is seeded by batch.
    """

    def __init__(self, rows: Rows, teacher: TeacherPipeline, *, seed: int, encode_batch: int = 32) -> None:
        self._rows = rows
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
        captions = self._rows.captions(self._position, num)
        self._position += num
        self._ahead.clear()
        return captions

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
        mean, std, captions = self._rows.posterior(batch * self._encode_batch, self._encode_batch)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + batch)
        latents = self._teacher.draw_latents(mean, std, generator)
        self._ahead.extend(zip(latents, captions, strict=True))
