"""Which networks images are measured with, where they do not ship: files that the user names. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from ddil_dist.errors import ConfigError

if TYPE_CHECKING:
    from ddil_dist.config import RunConfig

INCEPTION_WEIGHTS: Final = "weights-inception-2015-12-05-6726825d.pth"
"""Of torch-fidelity's releases."""
HPS_WEIGHTS: Final = "HPS_v2.1_compressed.pt"
PAPER_CLIP: Final = ("ViT-g-14", "laion2b_s34b_b88k")
"""The OpenCLIP model of the paper's tables."""


@dataclass(frozen=True)
class NetworkChoice:
    """Where the networks are; None: the metric is measured only if its weights lie where a download leaves them."""

    inception: Path | None = None
    """Weights of Inception v3, torch-fidelity's port."""
    clip: str | None = None
    """OpenCLIP's 'name/weights', 'hf-hub:owner/name' or 'local-dir:folder'."""
    preference: Path | None = None
    """HPSv2's weights."""
    lpips: Path | None = None
    """Weights of AlexNet, torchvision's."""
    named_by: Literal["--", "evaluation."] = "--"
    """How people name them: options of `evaluate --pipelines`, or keys of a run."""

    @classmethod
    def of_run(cls, config: RunConfig) -> NetworkChoice:
        """What a run's configuration names."""
        named = config.evaluation
        return cls(named.inception, named.clip, named.hps, named_by="evaluation.")

    def check(self) -> None:
        """Raises ConfigError for a file that is not there."""
        for name, path in (("inception", self.inception), ("hps", self.preference), ("lpips", self.lpips)):
            if path is not None and not path.is_file():
                raise ConfigError(f"{self.named_by}{name}: no file at {str(path)!r}; give the file of the weights")

    def inception_weights(self) -> Path | None:
        """The file that is named, or that a download has left; None where there is neither."""
        cached = cached_inception()
        return self.inception or (cached if cached.is_file() else None)

    def missing(self) -> list[str]:
        """A sentence for each metric that cannot be measured, with how to get what it needs."""
        sentences = []
        if self.inception_weights() is None:
            sentences.append(
                f"FID, density and coverage need Inception v3: put {INCEPTION_WEIGHTS}, of torch-fidelity's releases, "
                f"at {cached_inception()}, or name it by {self.named_by}inception"
            )
        if self.clip is None:
            sentences.append(
                f"the CLIP score needs a model: {self._set('clip', '/'.join(PAPER_CLIP))} is the papers', and "
                f"{self._set('clip', 'local-dir:FOLDER')} one that was downloaded"
            )
        if self.preference is None:
            sentences.append(
                f"HPSv2 needs its weights, {HPS_WEIGHTS} of its repository on the hub: name them by {self.named_by}hps"
            )
        return sentences

    def _set(self, name: str, value: str) -> str:
        return f"{self.named_by}{name}{' ' if self.named_by == '--' else '='}{value}"


def cached_inception() -> Path:
    """Where a download leaves Inception's weights: torch's hub directory, as `torch.hub.get_dir` finds it."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch"
    return Path(home).expanduser() / "hub" / "checkpoints" / INCEPTION_WEIGHTS
