"""Is there covariate shift, where, and would DDIL help? `python -m ddil_dist.analyze demo`.

Compares a student with its teacher at the states that it reaches, at the teacher's, and at forward-diffused data, and
lets the two share trajectories. Writes analysis.json and rewrites the run's report.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_dist.config import RunConfig, load_config
from ddil_dist.errors import ConfigError, DdilError
from ddil_dist.runs import CONFIG_FILE, add_run, run_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ddil_dist.analysis.results import Analysis
    from ddil_dist.problem import ImitationProblem

NUM_STATES = 256
"""At every point. Ratios are then known to some 10%."""
MIN_STATES = 8


def analyze_run(config: RunConfig, *, student: Path, num_states: int, num_images: int, console: Console) -> Analysis:
    """Measure `student`, a pipeline's directory, against the run's teacher on the run's grid and data.

    num_states: trajectories for the shift; as many rows of data are read again for its distances. num_images: of every
    mixture; 0: none are made. Raises ConfigError or DataError before anything is sampled where it cannot be.
    """
    import diffusers
    import torch

    from ddil_dist.analysis.mixtures import measure_mixtures, num_mixtures
    from ddil_dist.analysis.path import SharedPath
    from ddil_dist.analysis.results import Analysis
    from ddil_dist.analysis.shift import measure_shift
    from ddil_dist.evaluation.runs import evaluation_networks, evaluation_prompts
    from ddil_dist.problem import ImitationProblem, default_device

    problem = ImitationProblem.create(config, default_device())
    path = SharedPath.create(problem, _open_student(problem, student))
    prompts = evaluation_prompts(config, problem, num_images)
    networks = evaluation_networks(config, problem) if num_images else None
    seed, size = config.evaluation.seed, config.evaluation.batch_size
    latents, captions = problem.forward_data(seed=seed).next(2 * num_states)
    with _progress("states", num_states, console) as advance:
        shift = measure_shift(path, latents, captions, seed=seed, batch_size=size, advance=advance)

    def measure(images: torch.Tensor) -> dict[str, float]:
        from ddil_dist.metrics.evaluate import evaluate_images

        return {} if networks is None else evaluate_images(images, prompts.captions, prompts.classes, networks)

    mixtures = []
    if num_images:
        with _progress("mixtures", num_images * num_mixtures(path), console) as advance:
            mixtures = measure_mixtures(path, prompts.captions, measure, seed=seed, batch_size=size, advance=advance)
    protocol = {
        "num_states": num_states,
        "num_images": num_images,
        "seed": seed,
        "guidance_scale": config.evaluation_guidance_scale,
        "timesteps": path.timesteps,
        "substeps": problem.grid.substeps,
        "error": "of x_0 at the end" if path.student.uses_noise else "of the next latents",
        "feature_network": None if networks is None else networks.feature_name,
        "clip_model": None if networks is None else networks.clip_name,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    return Analysis(protocol=protocol, shift=shift, mixtures=mixtures)


def _open_student(problem: ImitationProblem, directory: Path) -> Any:
    """The pipeline's U-Net. Raises ConfigError where it is not one of the problem's latents and grid."""
    import diffusers

    from ddil_dist.models.log_filters import quiet_bars

    settings = directory / "scheduler" / "scheduler_config.json"
    if not (directory / "unet" / "config.json").is_file() or not settings.is_file():
        raise ConfigError(
            f"--student: {str(directory)!r} is no pipeline's directory (unet/ and scheduler/); give a finished run's "
            "student/, or train the run to its end"
        )
    with quiet_bars():
        unet = diffusers.UNet2DConditionModel.from_pretrained(directory, subfolder="unet")
    channels = problem.teacher.latent_shape[0]
    if unet.config.in_channels != channels:
        raise ConfigError(
            f"--student: {str(directory)!r} takes latents of {unet.config.in_channels} channels, the teacher's have "
            f"{channels}; give a student of this teacher"
        )
    scheduler = getattr(diffusers, json.loads(settings.read_text(encoding="utf-8"))["_class_name"])
    own, wanted = scheduler.from_pretrained(directory, subfolder="scheduler"), problem.student_scheduler()
    steps = problem.config.student.steps
    for each in (own, wanted):
        each.set_timesteps(steps)
    if own.timesteps.tolist() != wanted.timesteps.tolist():
        raise ConfigError(
            f"--student: {str(directory)!r} runs on the timesteps {own.timesteps.tolist()}, the run's grid is "
            f"{wanted.timesteps.tolist()}; both must share their points: set student.steps and student.spacing, or "
            "student.timesteps, as they were for that student"
        )
    return unet.to(problem.device)


def shift_table(analysis: Analysis) -> Table:
    """The shift at every point, for the terminal."""
    from rich.table import Table

    table = Table(title="error of one step, by whose states", header_style="bold")
    for name in ("t", "forward", "teacher's", "reached", "reached / forward", "final error"):
        table.add_column(name, justify="right")
    for point in analysis.shift.points:
        errors = (point.error_forward, point.error_teacher, point.error_visited)
        table.add_row(
            str(point.timestep),
            *(f"{error.value:.3g}" for error in errors),
            point.ratio.show(),
            f"{point.final_error.value:.3g}",
        )
    return table


def mixtures_table(analysis: Analysis) -> Table:
    """Every mixture's metrics, for the terminal."""
    from rich.table import Table

    from ddil_dist.metrics.protocol import METRICS

    known = {key for mixture in analysis.mixtures for key in mixture.metrics}
    metrics = [metric for metric in METRICS if metric.key in known]
    table = Table(title="trajectories that both share", header_style="bold")
    table.add_column("transitions by")
    for metric in metrics:
        table.add_column(metric.narrow_label, justify="right", vertical="bottom")
    for mixture in analysis.mixtures:
        table.add_row(mixture.name, *(metric.show(mixture.metrics.get(metric.key)) for metric in metrics))
    return table


@contextmanager
def _progress(what: str, total: int, console: Console) -> Iterator[Callable[[int], Any]]:
    """A bar with the time left; the block is given what advances it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda rows: bar.advance(task, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddil_dist.analyze", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run(parser, overrides=True)
    parser.add_argument("--student", type=Path, metavar="DIR", help="a pipeline; default: the student of the run")
    parser.add_argument(
        "--states", type=int, default=NUM_STATES, metavar="N", help=f"trajectories for the shift ({NUM_STATES})"
    )
    parser.add_argument(
        "--images", type=int, metavar="N", help="of every mixture; 0: no mixtures; default: evaluation.num_images"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Analyse a finished run, print what was found, write it, and rewrite the run's report."""
    options = _parser().parse_args(arguments)
    try:
        if options.states < MIN_STATES:
            raise ConfigError(f"--states: {options.states}; must be {MIN_STATES} or more, an interval needs them")
        path = run_of(options)
        config = load_config(path / CONFIG_FILE, options.overrides)
        num_images = config.evaluation.num_images if options.images is None else options.images
        if num_images < 0 or num_images == 1:
            raise ConfigError(f"--images: {num_images}; must be 0, or 2 or more: metrics compare images")
        from rich.console import Console

        from ddil_dist.analysis.results import ANALYSIS_FILE, write_analysis
        from ddil_dist.analysis.verdict import verdict
        from ddil_dist.report import write_report

        console = Console()
        student = options.student or path / "student"
        analysis = analyze_run(
            config, student=student, num_states=options.states, num_images=num_images, console=console
        )
        write_analysis(path / ANALYSIS_FILE, analysis)
        console.print(shift_table(analysis))
        if analysis.mixtures:
            console.print(mixtures_table(analysis))
        found = verdict(analysis.shift, num_states=options.states)
        console.print(f"[bold]{found.sentences[0]}[/bold]", *found.sentences[1:], highlight=False)
        console.print(f"report   {write_report(path)}", highlight=False, soft_wrap=True)
    except DdilError as error:
        print(f"ddil_dist: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
