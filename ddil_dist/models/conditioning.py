"""What a network is told besides x_t and t: encoded prompts, each encoded once."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from ddil_dist.models.log_filters import quiet_truncation

logger = logging.getLogger(__name__)

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

    def keep_for_current_stream(self) -> None:
        """Whoever drops these tensors, their memory is not used anew before this stream has read them."""
        for tensor in self._tensors():
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))

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
    Threads may share it, and each may work on a CUDA stream of its own.
    """

    def __init__(self, pipeline: Any, device: torch.device, dtype: torch.dtype, *, image_size: int) -> None:
        self._pipeline = pipeline
        self._device = device
        self._dtype = dtype
        self._size = image_size
        self._cache: OrderedDict[str, Conditioning] = OrderedDict()
        self._lock = Lock()
        self._num_encoded = self._num_long = 0
        self._tell_at = 1
        self.one_by_one = False
        """Whether an encoding must not depend, in its last bits, on the prompts that it is first met with."""
        self.known: KnownPrompts | None = None

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of the prompts, in their order."""
        with self._lock:
            return self._encode_or_recall(prompts)

    def _encode_or_recall(self, prompts: Sequence[str]) -> Conditioning:
        distinct = list(dict.fromkeys(prompts))
        rows = {prompt: self._cache[prompt] for prompt in distinct if prompt in self._cache}
        if self.known is not None:
            rows.update(
                (prompt, self.known[prompt]) for prompt in distinct if prompt not in rows and prompt in self.known
            )
        unseen = [prompt for prompt in distinct if prompt not in rows]
        if unseen:
            each = [self._encode([prompt]) for prompt in unseen] if self.one_by_one else [self._encode(unseen)]
            encoded = Conditioning.cat(each)
            if self._device.type == "cuda":  # what is kept must be there for any stream that meets it
                torch.cuda.current_stream(self._device).synchronize()
            rows.update((prompt, encoded.select(torch.tensor([row]))) for row, prompt in enumerate(unseen))
        for prompt in distinct:
            self._cache[prompt] = rows[prompt]
            self._cache.move_to_end(prompt)
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        for prompt in distinct:
            rows[prompt].keep_for_current_stream()
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
        self._count_truncated(prompts)
        with quiet_truncation(self._pipeline):
            encoded = self._pipeline.encode_prompt(
                prompts, device=self._device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        embeddings = encoded[0].to(self._dtype)
        if len(encoded) == 2:  # prompt and negative prompt; Stable Diffusion XL adds the pooled outputs of both
            return Conditioning(embeddings)
        side = self._size
        size_ids = torch.tensor([[side, side, 0, 0, side, side]], device=self._device, dtype=self._dtype)
        return Conditioning(embeddings, encoded[2].to(self._dtype), size_ids.expand(len(prompts), -1))

    def _count_truncated(self, prompts: list[str]) -> None:
        """Tell, now and then, of prompts that the text encoder sees the beginning of."""
        tokenizer = self._pipeline.tokenizer
        most = int(tokenizer.model_max_length)
        with quiet_truncation(self._pipeline):
            self._num_long += sum(len(ids) > most for ids in tokenizer(prompts).input_ids)
        self._num_encoded += len(prompts)
        if self._num_long >= self._tell_at:
            self._tell_at = 10 * self._num_long
            logger.warning(
                "%d of %d prompts so far are longer than the text encoder's %d tokens; what is beyond them it does not "
                "see",
                *(self._num_long, self._num_encoded, most),
            )
