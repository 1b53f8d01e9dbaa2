"""The run configurations that ship."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest

from ddil_dist.config import RunConfig, load_config, resolve_stages
from ddil_dist.problem import ImitationProblem
from learner.methods import STUDENT, create_networks, create_objective
from learner.optimization import learning_rate
from tests.support.problem import CPU

RUNS = Path(__file__).parents[1] / "deploy" / "runs"
RECIPES = sorted(RUNS.glob("*.yaml"))


def named(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_recipe_loads(path: Path) -> None:
    config = load_config(path)
    assert config.learner.updates > 0
    if path.stem != "builtin_pd":
        assert config.run.name == path.stem.removeprefix("builtin_"), "runs of two recipes must not meet"


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_recipe_can_be_posed(path: Path, tiny_directory: Path) -> None:
    """On a tiny pipeline: grid, exported scheduler, networks and phases are what the recipe's objective needs."""
    small = [f"teacher.pipeline={tiny_directory / 'pipeline'}", f"data.path={tiny_directory / 'data.parquet'}"]
    more = ["teacher.precision=float32", "rollout.precision=float32", "learner.keep_best=null"]
    config = resolve_stages(load_config(path, [*small, *more]))[0]
    problem = ImitationProblem.create(config, CPU)
    networks = create_networks(config, problem)
    objective = create_objective(config, problem, networks)
    roles = [phase.role for phase in objective.phases(0)]
    assert roles[0] == STUDENT
    assert set(roles) == networks.keys()
    if problem.grid.num_steps == config.student.steps and config.student.spacing == "trailing":
        assert problem.grid.student == {4: (999, 749, 499, 249), 1: (999,)}[config.student.steps]


def test_the_paper_s_updates_are_those_of_its_recipes() -> None:
    stages = resolve_stages(load_config(RUNS / "sd15_pd_ddil.yaml"))
    assert [stage.student.steps for stage in stages] == [32, 32, 16, 8, 4, 2]
    assert [stage.learner.updates for stage in stages] == [4000, 4000, 5000, 10_000, 14_000, 14_000]
    parts = [[round(part.until * stage.learner.updates) for part in stage.prior.parts] for stage in stages]
    assert parts == [[4000], [4000], [5000], [6000, 10_000], [8000, 14_000], [8000, 14_000]]
    for name in ("sd15_pd", "sd15_pd_ddil"):
        for stage, ends in zip(resolve_stages(load_config(RUNS / f"{name}.yaml")), parts, strict=True):
            optimizer, peak = stage.learner.optimizer, stage.learner.optimizer.learning_rate
            for begin, end in itertools.pairwise((0, *ends)):
                at = (begin, begin + 499, end - 1)
                rates = [learning_rate(optimizer, update, updates=stage.learner.updates) for update in at]
                assert rates == pytest.approx([peak / 500, peak, peak / (end - begin - 500)])
    for name, guided in (("sd15_lcm", (6, 16)), ("sd15_lcm_lora", (8.5, 8.5)), ("ssd1b_dmd2", (8, 8))):
        guidance = load_config(RUNS / f"{name}.yaml").teacher.guidance
        assert (guidance.min, guidance.max) == guided


@pytest.mark.parametrize("name", ["sd15_pd", "sd15_pd_ddil"])
def test_velocity_comes_before_guidance_and_the_original_guides(
    name: str, tiny_directory: Path, tmp_path: Path
) -> None:
    path, pipeline = RUNS / f"{name}.yaml", tiny_directory / "pipeline"
    data = [f"data.path={tiny_directory / 'data.parquet'}", "teacher.precision=float32", "rollout.precision=float32"]
    velocity, guidance, halved = resolve_stages(load_config(path, data))[:3]
    assert [stage.objective.type for stage in (velocity, guidance, halved)] == ["velocity", "guidance", "progressive"]
    assert (velocity.teacher.guidance.min, velocity.teacher.guidance.max) == (1, 1)
    assert (guidance.teacher.guidance.min, guidance.teacher.guidance.max) == (2, 14)
    assert guidance.teacher.pipeline == velocity.teacher.pipeline, "who learnt without guidance cannot guide"
    assert guidance.student.initial == str(velocity.run.path / "student")
    assert halved.teacher.pipeline == halved.student.initial == str(guidance.run.path / "student")

    small = {"pipeline": str(pipeline)}
    first = velocity.model_copy(update={"teacher": velocity.teacher.model_copy(update=small)})
    converted = tmp_path / "student"
    shutil.copytree(pipeline, converted)
    told = json.loads((converted / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    told["prediction_type"] = "v_prediction"
    (converted / "scheduler" / "scheduler_config.json").write_text(json.dumps(told), encoding="utf-8")
    second = guidance.model_copy(
        update={
            "teacher": guidance.teacher.model_copy(update=small),
            "student": guidance.student.model_copy(update={"initial": str(converted)}),
        }
    )
    for config, embeds in ((first, False), (second, True)):
        problem = ImitationProblem.create(config, CPU)
        networks = create_networks(config, problem)
        assert problem.student_prediction_type == "v_prediction"
        assert problem.student_denoiser(networks[STUDENT]).embeds_guidance is embeds
        assert not problem.teacher_denoiser().embeds_guidance
        create_objective(config, problem, networks)


@pytest.mark.parametrize("name", ["sd15_lcm", "sd15_lcm_lora", "sd15_lcm_reflected_ddil"])
def test_consistency_has_the_paper_s_batch_a_gpu(name: str) -> None:
    learner = load_config(RUNS / f"{name}.yaml").learner
    assert (learner.updates, learner.workers, learner.worker_batch_size) == (8000, 6, 60)


def test_dmd2_has_its_published_steps_and_batch() -> None:
    learner = load_config(RUNS / "sdxl_dmd2.yaml").learner
    assert (learner.updates, learner.batch_size, learner.micro_batch_size) == (20_000, 128, 2)


def test_a_mixed_rollout_gives_the_generator_the_latent_that_it_results_in() -> None:
    rollout = load_config(RUNS / "ssd1b_dmd2_reflected_ddil.yaml").rollout
    assert (rollout.until_timestep, rollout.record) == (499, "last")


def test_the_adapter_that_a_header_advises_is_dmd2_s() -> None:
    path = RUNS / "sdxl_dmd2.yaml"
    advice = re.findall(r"^#     (\S+=.*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(advice) == 2
    lora = load_config(path, advice).student.lora
    assert lora is not None
    assert (lora.rank, lora.alpha) == (64, 8)


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_every_stage_is_evaluated_where_it_was_trained(path: Path) -> None:
    for stage in resolve_stages(load_config(path)):
        guidance = stage.teacher.guidance
        assert guidance.min <= stage.evaluation_guidance_scale <= guidance.max
        if path.stem.startswith("builtin_"):
            assert stage.evaluation_guidance_scale == 1.5


def test_embedded_default_is_written_out_truly() -> None:
    assert load_config(RUNS / "builtin_pd.yaml") == RunConfig()
