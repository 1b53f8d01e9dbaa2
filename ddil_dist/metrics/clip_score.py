"""CLIP score: how well an image shows its caption, by OpenCLIP (Hessel et al. 2021, without their factor of 2.5).

The paper reports the mean cosine similarity itself, about 0.32 for Stable Diffusion under ViT-g/14. Models differ in
scale: a score is comparable only under the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ddil_dist.errors import EnvironmentFailure
from ddil_dist.metrics.features import to_uint8


class ClipScorer:
    """An OpenCLIP model with the preprocessing and tokenizer that belong to it."""

    def __init__(
        self,
        model: Any,
        *,
        preprocess: Callable[[Image.Image], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        name: str,
        device: torch.device | str = "cpu",
    ) -> None:
        """`model` has OpenCLIP's encode_image and encode_text; `preprocess` is its evaluation transform."""
        self.name = name
        self._device = torch.device(device)
        self._model = model.to(self._device).eval()
        self._preprocess = preprocess
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, name: str, pretrained: str | None = None, *, device: torch.device | str = "cpu") -> ClipScorer:
        """Any OpenCLIP model: a name with weights, 'hf-hub:org/repo', or 'local-dir:folder'.

        Raises EnvironmentFailure if there is no such model or its weights cannot be had.
        """
        import open_clip

        try:
            model, preprocess = open_clip.create_model_from_pretrained(name, pretrained, device=device)
            tokenizer = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError) as error:
            raise EnvironmentFailure(
                f"OpenCLIP could not load {name!r} with weights {pretrained!r}: {error}; open_clip.list_pretrained() "
                "names what there is, and without network access 'local-dir:folder' loads a downloaded model"
            ) from error
        label = name if pretrained is None else f"{name}/{pretrained}"
        return cls(model, preprocess=preprocess, tokenizer=tokenizer, name=label, device=device)

    @classmethod
    def builtin(cls, *, device: torch.device | str = "cpu") -> ClipScorer:
        """The small model that ships with the package and knows only the built-in captions."""
        from ddil_dist.builtin import load_clip

        model, preprocess, tokenizer = load_clip()
        return cls(model, preprocess=preprocess, tokenizer=tokenizer, name="builtin-clip", device=device)

    @torch.no_grad()
    def similarities(self, images: Tensor, captions: Sequence[str], *, batch_size: int = 100) -> Tensor:
        """[N] float64 cosine similarities of `images` [N, 3, H, W] in [0, 1], each with its own caption."""
        assert len(images) == len(captions), f"{len(images)} images with {len(captions)} captions"
        parts = [
            self._similarities(images[start : start + batch_size], list(captions[start : start + batch_size]))
            for start in range(0, len(images), batch_size)
        ]
        return torch.cat(parts)

    def _similarities(self, images: Tensor, captions: list[str]) -> Tensor:
        pixels = torch.stack([self._preprocess(_to_pil(image)) for image in to_uint8(images).cpu()])
        of_images = self._model.encode_image(pixels.to(self._device))
        of_captions = self._model.encode_text(self._tokenizer(captions).to(self._device))
        return F.cosine_similarity(of_images.double().cpu(), of_captions.double().cpu(), dim=-1)


def _to_pil(image: Tensor) -> Image.Image:
    """An RGB image of uint8 [3, H, W]; OpenCLIP's transforms start from one."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
