"""Does every method learn? Each built-in recipe, run from its beginning: `python -m tests.benchmarks.methods`.

A method's student is measured before and after its training, on the same prompts and from the same noise, under its
own sampler. Beside the gain stands the metric's noise: how far the trained student's FID moves between evaluation
seeds. One training seed a method: this shows that each learns, and ranks none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RECIPES = (
    "builtin_pd",
    "builtin_pd_backward",
    "builtin_lcm",
    "builtin_lcm_lora",
    "builtin_tcd",
    "builtin_dmd2",
    "builtin_dmd",
    "builtin_ladd",
    "builtin_ufogen",
)
RUNS = Path(__file__).parents[2] / "deploy" / "runs"
SEEDS = (1234, 1, 2)
"""The first is the run's own evaluation seed."""


def train(recipe: str, directory: Path, images: int) -> tuple[Path, float]:
    """Run a recipe in one process; its directory, and the seconds that it took."""
    begun = time.monotonic()
    arguments = [f"run.directory={directory}", f"run.name={recipe}", "run.execution=inline"]
    arguments += [f"evaluation.num_images={images}", "learner.sample_every=0"]
    command = [sys.executable, "-m", "ddil_dist.launch", "--config", str(RUNS / f"{recipe}.yaml"), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return directory / recipe, time.monotonic() - begun


def results_of(run: Path) -> dict[str, dict[str, Any]]:
    """The policies of a run's table, by role and then the rest of their entries."""
    policies = json.loads((run / "results.json").read_text())["policies"]
    return {policy["name"].split(",")[0]: policy for policy in policies}


def measure(run: Path, seed: int) -> None:
    """Measure a finished run again, with other prompts' noise."""
    command = [sys.executable, "-m", "ddil_dist.evaluate", str(run), f"evaluation.seed={seed}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def row(recipe: str, directory: Path, images: int) -> str:
    run, seconds = train(recipe, directory, images)
    found = results_of(run)
    fids = [found["student"]["metrics"]["fid"]]
    for seed in SEEDS[1:]:
        measure(run, seed)
        fids.append(results_of(run)["student"]["metrics"]["fid"])
    before, after = found["student before"], found["student"]
    gain, noise = before["metrics"]["fid"] - fids[0], statistics.stdev(fids)
    return (
        f"| `{recipe}` | {after['protocol']['steps']} | {after['protocol']['sampler']} "
        f"| {before['metrics']['fid']:.2f} | {fids[0]:.2f} | {gain:.2f} | {noise:.2f} | {gain / noise:.0f} "
        f"| {before['metrics']['agreement']:.3f} | {after['metrics']['agreement']:.3f} | {seconds:.0f} |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.methods", description=__doc__)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), metavar="RECIPE", help="of deploy/runs/")
    parser.add_argument("--images", type=int, default=500, help="per policy and seed")
    options = parser.parse_args(arguments)
    print(
        "| recipe | steps | sampler | FID before | after | gain | noise | gain / noise | agreement before | after | s |"
    )
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    with TemporaryDirectory() as directory:
        for recipe in options.recipes:
            print(row(recipe, Path(directory), options.images), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
