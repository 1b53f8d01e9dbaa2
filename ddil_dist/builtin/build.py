"""Rebuild every built-in asset from Fashion-MNIST's files: `python -m ddil_dist.builtin.build`.

Stages run in order: data, tokenizer, vae, unet, classifier, clip, measure, card. A stage whose output exists is
skipped, and a training that was interrupted resumes from its checkpoint in `--work`. Seeds are fixed; a GPU is used
where there is one.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

STAGES = ("data", "tokenizer", "vae", "unet", "classifier", "clip", "measure", "card")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; torch is imported only afterwards."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser = argparse.ArgumentParser(
        prog="python -m ddil_dist.builtin.build", description="Rebuild the built-in assets from Fashion-MNIST's files."
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of the dataset's four .gz files (default: %(default)s, of Debian's dataset-fashion-mnist)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "assets", help="where the assets go (default: %(default)s)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=cache / "ddil_dist" / "builtin-build",
        help="where checkpoints and cached latents go (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch (default: %(default)s)")
    parser.add_argument("--only", choices=STAGES, help="run this stage alone, again if it is done already")
    parser.add_argument("--unet-updates", type=int, help="optimizer updates of the U-Net (default: as shipped)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages that are not done yet."""
    args = parse_args(argv)

    import torch

    from ddil_dist.builtin.training.stages import Workshop

    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workshop = Workshop(data=args.data, out=args.out, work=args.work, device=device, unet_updates=args.unet_updates)
    for stage in [args.only] if args.only else STAGES:
        if not args.only and workshop.is_done(stage):
            print(f"{stage}: done already", flush=True)
            continue
        start, resumed = time.monotonic(), workshop.is_begun(stage)
        try:
            workshop.run(stage)
        finally:
            workshop.record_time(stage, time.monotonic() - start, resumed=resumed)
        print(f"{stage}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
