"""One resumable training loop for all of the built-in networks.

Each update's samples and noise depend on nothing but the seed and the update's number, so a training that was stopped
and resumed from its checkpoint sees what an uninterrupted one sees. The learning rate warms up, stays constant, then
falls linearly to zero; a run can therefore be given fewer updates at any time before its fall begins and is then
identical to a run that was planned that short from the start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how fast one network trains."""

    updates: int
    """Optimizer updates, at least 1."""
    batch_size: int
    """Samples an update."""
    lr: float
    """Highest learning rate of AdamW."""
    warmup: int = 200
    """Updates over which the learning rate rises from zero."""
    fall: float = 0.3
    """Share of the updates, at the end, over which the learning rate falls to zero; in (0, 1]."""
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which is what the training returns."""
    seed: int = 0

    def lr_factor(self, update: int) -> float:
        """The learning rate of `update` (from 0) as a share of `lr`."""
        rise = (update + 1) / max(self.warmup, 1)
        fall = (self.updates - update) / max(self.updates * self.fall, 1.0)
        return max(0.0, min(1.0, rise, fall))


def _batch_indices(plan: Plan, update: int, num_samples: int) -> Tensor:
    """[B] int64 sample indices of an update: epoch after epoch, each a fresh permutation."""
    batches_per_epoch = num_samples // plan.batch_size
    epoch, position = divmod(update, batches_per_epoch)
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch))
    return order[position * plan.batch_size : (position + 1) * plan.batch_size]


def _write_atomically(state: dict[str, object], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def fit(
    model: nn.Module,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    *,
    plan: Plan,
    num_samples: int,
    checkpoint: Path,
    device: torch.device,
    checkpoint_every: int = 250,
) -> nn.Module:
    """Train `model` in place and leave the averaged weights in it, in evaluation mode.

    `loss` gets sample indices ([B] int64, on `device`) and a generator on `device` for its noise, and returns a scalar.
    The state is written to `checkpoint` every `checkpoint_every` updates and at the end; an existing one is resumed.
    """
    model.to(device).train()
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=plan.lr, betas=(0.9, 0.99), weight_decay=plan.weight_decay)
    first = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averages = [a.to(device) for a in state["averages"]]
        first = int(state["update"])

    def save(update: int) -> None:
        _write_atomically(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "averages": averages, "update": update},
            checkpoint,
        )

    generator = torch.Generator(device=device)
    smooth = float("nan")
    bar = tqdm(range(first, plan.updates), initial=first, total=plan.updates, desc=checkpoint.stem, mininterval=5)
    for update in bar:
        generator.manual_seed(plan.seed * 1_000_003 + update + 17)
        value = loss(_batch_indices(plan, update, num_samples).to(device), generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * plan.lr_factor(update)
        optimizer.step()
        decay = min(plan.ema_decay, (1 + update) / (10 + update))
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 1 - decay)
        if update % 25 == 0:
            smooth = value.item() if smooth != smooth else 0.9 * smooth + 0.1 * value.item()
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (update + 1) % checkpoint_every == 0:
            save(update + 1)
    if first < plan.updates:
        save(plan.updates)
    with torch.no_grad():
        torch._foreach_copy_(params, averages)
    return model.eval()
