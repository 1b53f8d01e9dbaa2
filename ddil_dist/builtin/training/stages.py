"""The stages of the build: what each reads, what it writes, and how one knows that it is done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from ddil_dist.builtin.captions import all_captions
from ddil_dist.builtin.training import dataset
from ddil_dist.builtin.training.dataset import Split

LAST_FILES = {
    "data": "data/prompts.txt",
    "tokenizer": "pipeline/tokenizer/merges.txt",
    "vae": "pipeline/vae/diffusion_pytorch_model.safetensors",
    "unet": "pipeline/model_index.json",
    "classifier": "classifier/reference.safetensors",
    "clip": "clip/open_clip_model.safetensors",
    "measure": "quality.json",
    "card": "MODEL_CARD.md",
}
"""The file that each stage writes last, in the assets' folder."""


@dataclass(frozen=True)
class Workshop:
    """One build: `run(stage)` makes a stage's output in `out`, keeping what it can resume from in `work`."""

    data: Path
    """Folder of the dataset's files."""
    out: Path
    """The assets' folder."""
    work: Path
    """Checkpoints, cached latents, measured times."""
    device: torch.device
    unet_updates: int | None = None
    """Updates of the U-Net's training, or None for the shipped number."""

    @cached_property
    def train(self) -> Split:
        return dataset.load_split(self.data, "train")

    @cached_property
    def test(self) -> Split:
        return dataset.load_split(self.data, "t10k")

    @property
    def pipeline(self) -> Path:
        return self.out / "pipeline"

    def tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.pipeline / "tokenizer")

    def vae(self) -> AutoencoderKL:
        vae: AutoencoderKL = AutoencoderKL.from_pretrained(self.pipeline / "vae")
        return vae.to(self.device).eval()

    def output(self, stage: str) -> Path:
        """The file that a stage writes last."""
        return self.out / LAST_FILES[stage]

    def is_done(self, stage: str) -> bool:
        """Whether a stage's last file exists."""
        return self.output(stage).is_file()

    def run(self, stage: str) -> None:
        """Run one stage, whether or not it is done."""
        stages: dict[str, Callable[[], None]] = {
            "data": self._data,
            "tokenizer": self._tokenizer,
            "vae": self._vae,
            "unet": self._unet,
            "classifier": self._classifier,
            "clip": self._clip,
            "measure": self._measure,
            "card": self._card,
        }
        stages[stage]()
        for file in (path for path in self.out.rglob("*") if path.is_file()):
            file.chmod(0o644)  # safetensors writes files that only their owner can read
        assert self.is_done(stage), f"stage {stage} did not write {self.output(stage)}"

    @property
    def _times_file(self) -> Path:
        return self.work / "seconds.json"

    def times(self) -> dict[str, float]:
        """Seconds that each stage took, over all the runs that it was resumed in."""
        if not self._times_file.is_file():
            return {}
        return {str(k): float(v) for k, v in json.loads(self._times_file.read_text()).items()}

    def is_begun(self, stage: str) -> bool:
        """Whether a stage has a checkpoint to resume from."""
        return (self.work / f"{stage}.pt").is_file()

    def record_time(self, stage: str, seconds: float, *, resumed: bool) -> None:
        """Keep a stage's time for the model card; a resumed stage adds to what it took before."""
        times = self.times()
        times[stage] = round(seconds + (times.get(stage, 0.0) if resumed else 0.0), 1)
        self._times_file.parent.mkdir(parents=True, exist_ok=True)
        self._times_file.write_text(json.dumps(times))

    def _data(self) -> None:
        dataset.write_parquet(self.train, self.out / "data" / "train.parquet")
        dataset.write_prompts(self.out / "data" / "prompts.txt")

    def _tokenizer(self) -> None:
        from ddil_dist.builtin.training.tokenizer import build_tokenizer

        build_tokenizer(all_captions(), self.pipeline / "tokenizer")

    def _vae(self) -> None:
        from ddil_dist.builtin.training.vae import train_vae

        vae = train_vae(self.train, checkpoint=self.work / "vae.pt", device=self.device)
        vae.half().save_pretrained(self.pipeline / "vae")

    def latents(self) -> Tensor:
        """Posterior mean and standard deviation (4 + 4 channels) of the training images: [60000, 8, 8, 8], once."""
        from ddil_dist.builtin.training.vae import encode_all

        path = self.work / "latents.safetensors"
        if not path.is_file():
            self.work.mkdir(parents=True, exist_ok=True)
            moments = encode_all(self.vae(), self.train, device=self.device)
            save_file({"moments": moments.half().contiguous()}, path)
        return load_file(path)["moments"].float()

    def _unet(self) -> None:
        from ddil_dist.builtin.training.pipeline import save_pipeline
        from ddil_dist.builtin.training.unet import PLAN, train_teacher

        plan = replace(PLAN, updates=self.unet_updates or PLAN.updates)
        vae, tokenizer = self.vae(), self.tokenizer()
        teacher = train_teacher(
            self.latents(),
            self.train.captions(),
            tokenizer,
            scaling_factor=vae.config.scaling_factor,
            plan=plan,
            checkpoint=self.work / "unet.pt",
            device=self.device,
        )
        # a tokenizer that has padded would save that as its default, so a fresh one is saved
        save_pipeline(teacher, vae=vae, tokenizer=self.tokenizer(), out=self.pipeline)

    def _classifier(self) -> None:
        from ddil_dist.builtin.classifier import read_classifier, save_classifier
        from ddil_dist.builtin.training.classifier import train_classifier, write_reference

        folder = self.out / "classifier"
        classifier = train_classifier(self.train, checkpoint=self.work / "classifier.pt", device=self.device)
        save_classifier(classifier, folder)
        shipped = read_classifier(folder)
        accuracy = write_reference(shipped, self.test, folder / "reference.safetensors", device=self.device)
        print(f"test accuracy {accuracy:.4f}", flush=True)

    def _clip(self) -> None:
        from ddil_dist.builtin.training.clip import train_clip, zero_shot_accuracy

        folder = self.out / "clip"
        checkpoint = self.work / "clip.pt"
        captions = self.train.captions()
        train_clip(self.train, captions, self.tokenizer(), folder, checkpoint=checkpoint, device=self.device)
        print(f"zero-shot accuracy {zero_shot_accuracy(folder, self.test, device=self.device):.4f}", flush=True)

    def _measure(self) -> None:
        from ddil_dist.builtin.training.measure import measure, write_quality, write_sheet

        quality, sheet = measure(self.out, self.train, self.test, device=self.device)
        write_sheet(sheet, self.out / "samples.png")
        write_quality(quality, self.output("measure"))

    def _card(self) -> None:
        from ddil_dist.builtin.training.card import write_card
        from ddil_dist.builtin.training.measure import read_quality
        from ddil_dist.builtin.training.unet import PLAN

        on_gpu = self.device.type == "cuda"
        write_card(
            self.out,
            read_quality(self.output("measure")),
            unet_updates=self.unet_updates or PLAN.updates,
            seconds=self.times(),
            hardware=torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores",
        )
