"""Thresholding limits from the data's latents: `python -m ddil_dist.limits --config FILE`.

Static and reflected thresholding project a predicted x_0 onto the support of the data, a box [-c, c] with one c a
channel. This prints the box that holds a given share of the data's latent values, as a snippet for the configuration.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ddil_dist.config import RunConfig, load_config
from ddil_dist.errors import DdilError

if TYPE_CHECKING:
    from ddil_dist.problem import ImitationProblem

POSITIONS = 256
"""Values of a latent's channel that are kept, at places drawn anew for each latent; the largest is never missed."""


class LatentMagnitudes:
    """|x_0| by channel: a sample for quantiles, and the maximum over everything.

    Use: `add` batches of latents, then `limits(quantile)`.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self._generator = np.random.default_rng(seed)
        self._kept: list[npt.NDArray[np.float32]] = []
        self._most: npt.NDArray[np.float32] | None = None
        self.num_latents = 0

    def add(self, latents: npt.NDArray[np.float32]) -> None:
        """Latents [B, C, H, W]."""
        magnitudes = np.abs(latents).reshape(len(latents), latents.shape[1], -1)
        most = magnitudes.max((0, 2))
        self._most = most if self._most is None else np.maximum(self._most, most)
        for latent in magnitudes:
            places = latent.shape[1]
            if places > POSITIONS:
                latent = latent[:, self._generator.choice(places, POSITIONS, replace=False)]
            self._kept.append(latent)
        self.num_latents += len(latents)

    def limits(self, quantile: float) -> list[float]:
        """One limit a channel, [C]: the quantile of |x_0|; at 1 the largest of all."""
        assert self._most is not None, "no latents"
        if quantile == 1:
            return [float(limit) for limit in self._most]
        return [float(limit) for limit in np.quantile(np.concatenate(self._kept, axis=1), quantile, axis=1)]


def measure(problem: ImitationProblem, *, num: int, batch_size: int) -> LatentMagnitudes:
    """The magnitudes of `num` of the data's latents, in the order of the run's seed, with a progress bar."""
    from tqdm import tqdm

    data = problem.forward_data(seed=problem.config.run.seed)
    magnitudes = LatentMagnitudes(seed=problem.config.run.seed)
    with tqdm(total=num, desc="latents", unit="image", mininterval=1) as bar:
        while magnitudes.num_latents < num:
            rows = min(batch_size, num - magnitudes.num_latents)
            magnitudes.add(data.next(rows)[0].cpu().numpy())
            bar.update(rows)
    return magnitudes


def snippet(config: RunConfig, limits: Sequence[float], *, num: int, quantile: float, kind: str) -> str:
    """The `thresholding` section that the limits make, as YAML, saying where they are from."""
    share = "all" if quantile == 1 else f"{100 * quantile:g} % of all"
    lines = [
        f"# {share} values of each channel, over {num} latents of {config.data.path}, encoded by "
        f"{config.teacher.pipeline}",
        "thresholding:",
        f"  type: {kind}",
        f"  limit: [{', '.join(f'{limit:.4g}' for limit in limits)}]",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the snippet; 0, or 2 where the configuration or the data cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        from ddil_dist.problem import ImitationProblem, default_device

        problem = ImitationProblem.create(config, default_device())
        num = min(options.images, len(problem.open_data()))
        limits = measure(problem, num=num, batch_size=options.batch_size).limits(options.quantile)
    except DdilError as error:
        print(f"ddil_dist: {error}", file=sys.stderr)
        return 2
    print(snippet(config, limits, num=num, quantile=options.quantile, kind=options.type))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ddil_dist.limits", description=__doc__)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the run; see deploy/runs/")
    parser.add_argument("--images", type=_positive, default=10_000, metavar="N", help="images to encode (10000)")
    parser.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="images encoded at once (32)")
    parser.add_argument(
        "--quantile", type=_share, default=0.999, metavar="Q", help="share of a channel's values to hold (0.999)"
    )
    parser.add_argument("--type", choices=("reflect", "static"), default="reflect", help="thresholding to print")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.path=/data/captioned.parquet")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must be over 0, and at most 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
