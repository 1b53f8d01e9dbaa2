"""Teacher and student side by side, from the same noise and prompts: `python -m ddil_dist.evaluate demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddil_dist.config import BUILTIN, load_config
from ddil_dist.config.curriculum import STUDENT_DIRECTORY
from ddil_dist.ending import EXIT_UNMEASURED, end_run
from ddil_dist.errors import DdilError, EnvironmentFailure, EvaluationStoppedError
from ddil_dist.evaluation.runs import evaluate_run
from ddil_dist.runs import CONFIG_FILE, add_run, run_of
from ddil_dist.status import own_run, read_status

if TYPE_CHECKING:
    pass


def _pipelines_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddil_dist.evaluate",
        description="Measure any pipelines of diffusers by one protocol, from the same noise and captions. Images stay "
        "in --out, and a restart makes those that are missing.",
    )
    parser.add_argument("--pipelines", nargs="+", required=True, metavar="PIPELINE", help="directories or hub ids")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--guidance", type=float, default=1.0, help="as the pipelines' call takes it (default: 1)")
    parser.add_argument("--sampler", choices=("own", "ddim", "dpmsolver++", "lcm"), default="own")
    parser.add_argument("--data", default=BUILTIN, help="captions and real images: as data.path, or COCO's folder")
    parser.add_argument("--preset", choices=("coco2017-5k", "coco2014-30k"), help="the COCO in --data as papers use it")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="other captions, one a line")
    parser.add_argument("--images", type=int, metavar="N", help="of each pipeline; default: one of every caption")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--inception", type=Path, metavar="FILE", help="weights of Inception v3, torch-fidelity's port")
    parser.add_argument("--clip", metavar="MODEL", help="OpenCLIP's name/weights, or local-dir:FOLDER")
    parser.add_argument("--hps", type=Path, metavar="FILE", help="HPSv2's weights")
    parser.add_argument(
        "--diversity", action="store_true", help="LPIPS diversity: ten images more of each of fifty captions"
    )
    parser.add_argument("--lpips", type=Path, metavar="FILE", help="weights of AlexNet, torchvision's, for it")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR")
    return parser


def _evaluate_pipelines(arguments: Sequence[str]) -> int:
    options = _pipelines_parser().parse_args(arguments)
    from rich.console import Console

    from ddil_dist.evaluation.choice import NetworkChoice
    from ddil_dist.evaluation.pipelines import PipelineEvaluation, evaluate_pipelines
    from ddil_dist.evaluation.stock import Sampling
    from ddil_dist.metrics.results import RESULTS_FILE
    from ddil_dist.metrics.table import results_table
    from ddil_dist.problem import default_device

    console = Console()
    request = PipelineEvaluation(
        pipelines=list(dict.fromkeys(options.pipelines)),
        sampling=Sampling(options.sampler, options.steps, options.guidance),
        num_images=options.images,
        seed=options.seed,
        batch_size=options.batch_size,
        precision=options.precision,
        networks=NetworkChoice(options.inception, options.clip, options.hps, options.lpips),
        data=options.data,
        preset=options.preset,
        prompts=options.prompts,
        out=options.out,
        diversity=options.diversity or options.lpips is not None,
    )
    results = evaluate_pipelines(request, device=default_device(), console=console)
    console.print(results_table(results.policies))
    for name, found in results.facts["differences"].items():
        told = ", ".join(f"{key} {value:+.4g} ({low:+.4g} to {high:+.4g})" for key, (value, low, high) in found.items())
        console.print(f"{name} less {results.policies[0].name}: {told}", highlight=False, soft_wrap=True)
    console.print(f"results  {options.out / RESULTS_FILE}", highlight=False, soft_wrap=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate a trained run, again or to its end, and rewrite its report; or, with `--pipelines`, any pipelines.

    The exit code: 0 done, 1 failed, 2 refused, 3 a run's evaluation was stopped before it was whole.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if any(word.split("=")[0] == "--pipelines" for word in arguments):
            return _evaluate_pipelines(arguments)
        return _evaluate_run(arguments)
    except EvaluationStoppedError as error:
        print(f"ddil_dist: {error}", file=sys.stderr)
        return EXIT_UNMEASURED
    except DdilError as error:
        print(f"ddil_dist: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ddil_dist: stopped; its figures are those of before", file=sys.stderr)
        return 130


def _evaluate_run(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ddil_dist.evaluate",
        description=__doc__,
        epilog="any pipelines of diffusers: --pipelines A B --steps 4 --data DATA; --pipelines --help says more",
    )
    add_run(parser, overrides=True)
    options = parser.parse_args(arguments)
    path = run_of(options)
    config = load_config(path / CONFIG_FILE, options.overrides)
    if not (path / STUDENT_DIRECTORY).is_dir():
        raise EnvironmentFailure(
            f"run {path.name!r} in {path.parent} has no student to evaluate; the same launch makes it"
        )
    from rich.console import Console

    with own_run(path):
        before = read_status(path)  # of an end that was not whole, where this is one
        try:
            end_run(config, evaluate_run, console=Console(), closes=before is not None and before.closes)
        except EvaluationStoppedError:
            raise
        except DdilError as error:  # not refused before any work: failed in it
            print(f"ddil_dist: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
