"""What a network is told besides x_t and t: encoded prompts, each encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

CACHE_SIZE = 8192
"""Prompts kept encoded; the least recently used go first."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Encoded prompts of a batch. Stable Diffusion is told embeddings alone, Stable Diffusion XL all three.

    embeddings: [B, L, D], the text encoders' hidden states.
    pooled:     [B, P], the second text encoder's pooled output, or None.
    size_ids:   [B, 6], original height and width, top and left of the crop, target height and width; pixels; or None.
    """

    embeddings: Tensor
    pooled: Tensor | None = None
    size_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    def select(self, index: Tensor) -> Conditioning:
        """Rows `index` [M] int64."""
        return self._map(lambda tensor: tensor[index])

    def assign(self, index: Tensor, rows: Conditioning) -> None:
        """Overwrite rows `index` [M] in place with `rows` (M of them)."""
        for own, new in zip(self._tensors(), rows._tensors(), strict=True):
            own[index] = new

    def expand(self, num: int) -> Conditioning:
        """A single row, `num` times, without a copy."""
        assert len(self) == 1
        return self._map(lambda tensor: tensor.expand(num, *tensor.shape[1:]))

    def clone(self) -> Conditioning:
        """The same rows in memory of their own."""
        return self._map(torch.clone)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, in order; all parts are of one kind."""
        columns = zip(*(part._tensors() for part in parts), strict=True)
        return Conditioning(*(torch.cat(column) for column in columns))

    def _tensors(self) -> list[Tensor]:
        """The tensors that there are: the first, or all three."""
        return [tensor for tensor in (self.embeddings, self.pooled, self.size_ids) if tensor is not None]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(*map(function, self._tensors()))


class KnownPrompts(Protocol):
    """Encodings made before, a row a prompt."""

    def __contains__(self, prompt: object) -> bool: ...

    def __getitem__(self, prompt: str) -> Conditioning: ...


class PromptEncoder:
    """Prompts to Conditioning through a pipeline's own `encode_prompt`, with a bounded cache.

    Never needs gradients. Encodes the distinct unseen prompts of a call in one batch. What is `known` is not encoded.
    """

    def __init__(self, pipeline: Any, device: torch.device, dtype: torch.dtype, *, image_size: int) -> None:
        self._pipeline = pipeline
        self._device = device
        self._dtype = dtype
        self._size = image_size
        self._cache: OrderedDict[str, Conditioning] = OrderedDict()
        self.known: KnownPrompts | None = None

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of the prompts, in their order."""
        distinct = list(dict.fromkeys(prompts))
        rows = {prompt: self._cache[prompt] for prompt in distinct if prompt in self._cache}
        if self.known is not None:
            rows.update(
                (prompt, self.known[prompt]) for prompt in distinct if prompt not in rows and prompt in self.known
            )
        unseen = [prompt for prompt in distinct if prompt not in rows]
        if unseen:
            encoded = self._encode(unseen)
            rows.update((prompt, encoded.select(torch.tensor([row]))) for row, prompt in enumerate(unseen))
        for prompt in distinct:
            self._cache[prompt] = rows[prompt]
            self._cache.move_to_end(prompt)
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        return Conditioning.cat([rows[prompt] for prompt in prompts])

    def null(self) -> Conditioning:
        """The single row that guidance moves away from: the stock pipeline's, where it is given no negative prompt.

        That is the empty prompt, or zeros for a Stable Diffusion XL pipeline with `force_zeros_for_empty_prompt`.
        """
        empty = self.encode([""])
        if empty.pooled is None or not self._pipeline.config.force_zeros_for_empty_prompt:
            return empty
        return Conditioning(torch.zeros_like(empty.embeddings), torch.zeros_like(empty.pooled), empty.size_ids)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """The prompts' rows, as the stock pipeline would tell them to the network for images of the native size."""
        encoded = self._pipeline.encode_prompt(
            prompts, device=self._device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        embeddings = encoded[0].to(self._dtype)
        if len(encoded) == 2:  # prompt and negative prompt; Stable Diffusion XL adds the pooled outputs of both
            return Conditioning(embeddings)
        side = self._size
        size_ids = torch.tensor([[side, side, 0, 0, side, side]], device=self._device, dtype=self._dtype)
        return Conditioning(embeddings, encoded[2].to(self._dtype), size_ids.expand(len(prompts), -1))
