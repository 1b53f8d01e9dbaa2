"""What a network is told besides x_t and t: encoded prompts, each encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CACHE_SIZE = 8192
"""Prompts kept encoded; the least recently used go first."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Encoded prompts of a batch.

    embeddings: [B, L, D], the text encoder's last hidden states.
    """

    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.embeddings)

    def select(self, index: Tensor) -> Conditioning:
        """Rows `index` [M] int64."""
        return Conditioning(self.embeddings[index])

    def assign(self, index: Tensor, rows: Conditioning) -> None:
        """Overwrite rows `index` [M] in place with `rows` (M of them)."""
        self.embeddings[index] = rows.embeddings

    def expand(self, num: int) -> Conditioning:
        """A single row, `num` times, without a copy."""
        assert len(self) == 1
        return Conditioning(self.embeddings.expand(num, -1, -1))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        return Conditioning(torch.cat([part.embeddings for part in parts]))


class PromptEncoder:
    """Prompts to Conditioning through a pipeline's own `encode_prompt`, with a bounded cache.

    Never needs gradients. Encodes the distinct unseen prompts of a call in one batch.
    """

    def __init__(self, pipeline: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._pipeline = pipeline
        self._device = device
        self._dtype = dtype
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of the prompts, in their order."""
        distinct = list(dict.fromkeys(prompts))
        rows = {prompt: self._cache[prompt] for prompt in distinct if prompt in self._cache}
        unseen = [prompt for prompt in distinct if prompt not in rows]
        if unseen:
            encoded = self._pipeline.encode_prompt(
                unseen, device=self._device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )[0]
            rows.update(zip(unseen, (row.clone() for row in encoded.to(self._dtype)), strict=True))
        for prompt in distinct:
            self._cache[prompt] = rows[prompt]
            self._cache.move_to_end(prompt)
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        return Conditioning(torch.stack([rows[prompt] for prompt in prompts]))
