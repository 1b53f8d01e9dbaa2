"""The command: parse and validate, then hand over. Nothing heavy is imported before the configuration is known good."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ddil_dist.config import BUILTIN, RunConfig, load_config, resolve_stages
from ddil_dist.ending import EXIT_INTERRUPTED, EXIT_UNMEASURED
from ddil_dist.errors import ConfigError, DataError, DdilError, EnvironmentFailure, EvaluationStoppedError

EXIT_REFUSED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    The exit code: 0 done, 1 failed, 2 refused before any work, 3 trained, but stopped in its evaluation, 130 stopped
    before that.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.help is not None:
            return _help(options.help)
        return _launch(options)
    except (ConfigError, EnvironmentFailure, DataError) as error:
        _complain(error)
        return EXIT_REFUSED
    except EvaluationStoppedError as error:
        _complain(error)
        return EXIT_UNMEASURED
    except DdilError as error:
        _complain(error)
        return 1
    except Exception as error:
        if getattr(error, "errno", None) != errno.ENOSPC and os.strerror(errno.ENOSPC) not in str(error):
            raise  # safetensors has the words, and not the number
        print(f"ddil_dist: {error}; free some room, and run the same command again to resume", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ddil_dist: stopped; run the same command again to resume", file=sys.stderr)
        return EXIT_INTERRUPTED


def _help(key: str) -> int:
    """Print what the command takes, or of a key, or of every key of a section, what it means."""
    if not key:
        _parser().print_help()
        return 0
    from ddil_dist.config.reference import describe

    print("\n".join(describe(key)))
    return 0


def _launch(options: argparse.Namespace) -> int:
    from ddil_dist.launch.prepare import prepared_run, settle_paths

    config = load_config(options.config, options.overrides)
    _check_own_pipeline_has_data(config)
    config = settle_paths(config)
    from ddil_dist.launch.ours import claim

    for name in claim():
        print(f"ddil_dist: passing over {Path(name).resolve()}, which has the name of a package of ours")
    if options.dry_run:
        from ddil_dist.launch.plan import print_plan

        print_plan(config)
        return 0
    stages = resolve_stages(config)
    _check_inputs(stages)
    with prepared_run(config):
        if config.curriculum is None:
            return _run(config)
        from ddil_dist.launch.stages import run_stages

        return run_stages(config, stages, _run)


def _run(config: RunConfig) -> int:
    from ddil_dist.launch.finish import finish_run, is_trained, reopen_run

    if not is_trained(config):
        reopen_run(config)
        if not _train(config):
            print(f"ddil_dist: stopped at a checkpoint in {config.run.path}; run the same command again to resume")
            return EXIT_INTERRUPTED
    try:
        finish_run(config)
    except (ConfigError, EnvironmentFailure, DataError) as error:  # not refused before any work: failed after it
        raise DdilError(str(error)) from error
    return 0


def _train(config: RunConfig) -> bool:
    if config.run.execution == "inline":
        from ddil_dist.launch.inline import run_inline

        return run_inline(config)
    from ddil_dist.launch.cluster import run_cluster

    return run_cluster(config)


def _check_inputs(stages: Sequence[RunConfig]) -> None:
    """Refuse a pipeline or data set that is not there, or timesteps that it has not, before anything starts."""
    from ddil_dist.builtin import evaluation_prompts
    from ddil_dist.evaluation.choice import NetworkChoice
    from ddil_dist.sources import check_hub, resolve_data, resolve_pipeline, train_timesteps

    config = stages[0]
    pipeline = resolve_pipeline(config.teacher.pipeline)
    check_hub(pipeline, timeout_s=config.deadlines.hub_s)
    timesteps = train_timesteps(pipeline)
    if timesteps is not None:
        for stage in stages:  # every student has its teacher's
            stage.objective.check_timesteps(stage, timesteps)
    if config.needs_data:
        resolve_data(config.data)
        if config.data.window is not None:
            from ddil_dist.data.windows import list_files

            list_files(config.data)
    if not config.evaluation.num_images:
        return
    if config.data.path == BUILTIN:
        evaluation_prompts(config.evaluation.num_images)
        return
    choice = NetworkChoice.of_run(config)
    choice.check()
    for sentence in choice.missing():
        print(f"not measured at the end: {sentence}")


def _check_own_pipeline_has_data(config: RunConfig) -> None:
    """Refuse to train a pipeline of one's own on the built-in pictures where nobody asked for them."""
    if config.teacher.pipeline != BUILTIN and "path" not in config.data.model_fields_set and config.needs_data:
        raise ConfigError(
            f"data.path: is not given, and teacher.pipeline is {config.teacher.pipeline!r}: it would be trained on the "
            "built-in pictures; set data.path to images of its kind (or to builtin, if you mean those)"
        )


def _complain(error: DdilError) -> None:
    for line in str(error).splitlines():
        print(f"ddil_dist: {line}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddil_dist.launch",
        description="Distil a text-to-image diffusion pipeline into a few-step student. With no arguments: the "
        "built-in pipeline, a local Ray and an embedded Redis, in minutes on two cores. An existing run is resumed.",
        add_help=False,
        epilog="keys: --help KEY tells of one or of a section, such as learner; docs/configuration.md has all. "
        "examples: learner.updates=200 rollout.actors=2 | --config deploy/runs/builtin_pd.yaml run.name=mine",
    )
    parser.add_argument(
        "-h", "--help", nargs="?", const="", metavar="KEY", help="this help, or what a key of the configuration means"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the run; see deploy/runs/")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and the plan, and exit"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override one key of the configuration")
    return parser


if __name__ == "__main__":
    sys.exit(main())
