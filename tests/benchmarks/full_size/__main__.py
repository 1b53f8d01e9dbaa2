"""The command: `python -m tests.benchmarks.full_size [sd15 | sdxl ...] [--updates N] [--rows N] [--tiny]`. Needs a GPU.

Prints tables in Markdown. The share of the peak is that of the forward and backward passes' own operations, what
checkpointing recomputes not among them, in the whole time of an update.
"""

from __future__ import annotations

import argparse
import platform
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch

from ddil_dist.problem import default_device
from tests.benchmarks.full_size import learner, rollout
from tests.benchmarks.full_size.models import SIZES, TINY, Model, flops_per_image

PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "L4": 121.0,
    "L40S": 362.0,
}
"""Dense bf16 by the makers' data sheets, by a part of the device's name; the longest that fits counts."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations a second; None where the device is not in the table."""
    fitting = [part for part in PEAK_TFLOPS if re.search(rf"\b{re.escape(part)}\b", device_name)]
    return PEAK_TFLOPS[max(fitting, key=len)] * 1e12 if fitting else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the chosen networks."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.full_size")
    parser.add_argument("networks", nargs="*", metavar="sd15 | sdxl", help="default: both")
    parser.add_argument("--updates", type=int, default=10, help="measured of each variant, after two; also of calls")
    parser.add_argument("--rows", type=int, help="of a batch; default: 16 for sd15, 4 for sdxl")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled variants out")
    parser.add_argument("--tiny", action="store_true", help="tiny networks of the same layouts, for any machine")
    options = parser.parse_args(arguments)
    unknown = set(options.networks) - SIZES.keys()
    if unknown:
        parser.error(f"no such networks: {', '.join(sorted(unknown))}; there are {', '.join(SIZES)}")
    diffusers.utils.logging.set_verbosity_error()  # it has something to say at every cast
    device = default_device()
    if device.type != "cuda" and not options.tiny:
        parser.error("full-size networks need a GPU, and torch sees none; --tiny runs anywhere")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}")
    for key in options.networks or SIZES:
        model = (TINY if options.tiny else SIZES)[key]
        compiled = (False,) if options.no_compile else (False, True)
        with tempfile.TemporaryDirectory() as folder:
            measure(model, Path(folder), device, name, options.rows or model.rows, options.updates, compiled)


def measure(
    model: Model, folder: Path, device: torch.device, name: str, rows: int, updates: int, compiled: Sequence[bool]
) -> None:
    """Print a network's two tables."""
    flops, peak = flops_per_image(model), peak_flops(name)
    print(f"\n## {model.title} on {name}\n\nUpdates of {rows} images, bf16; {flops / 1e12:.3g} TFLOP an image.\n")
    print("| checkpointing | compiled | images/s | peak memory, GB | share of peak | rows a pass | first update, s |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for variant in learner.VARIANTS:
        if variant.compile not in compiled:
            continue
        found = learner.measure(model, variant, folder, device, rows=rows, updates=updates)
        head = f"| {yes(variant.gradient_checkpointing)} | {yes(variant.compile)} |"
        if found is None:
            print(f"{head} out of memory | | | | |", flush=True)
            continue
        memory = "unknown" if found.memory_bytes is None else f"{found.memory_bytes / 1e9:.1f}"
        share = "unknown" if peak is None else f"{found.images_per_s * flops / peak:.1%}"
        print(
            f"{head} {found.images_per_s:.2f} | {memory} | {share} | {found.rows} | {found.first_s:.1f} |", flush=True
        )
    print(f"\nCalls of the rollout engine, {rows} images, bfloat16.\n\n| call | compiled | images/s |")
    print("| --- | --- | ---: |")
    for compiles in compiled:
        speeds = rollout.measure(model, folder, device, compiled=compiles, rows=rows, calls=updates)
        for call, speed in speeds.items():
            print(f"| {call} | {yes(compiles)} | {'out of memory' if speed is None else f'{speed:.2f}'} |", flush=True)


def yes(value: bool) -> str:
    """In a table."""
    return "yes" if value else "no"


if __name__ == "__main__":
    main()
