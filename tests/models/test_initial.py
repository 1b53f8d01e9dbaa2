"""A finished student as the next one's beginning, and as its teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddil_dist.errors import ConfigError
from ddil_dist.export import export_student
from ddil_dist.models.student import GUIDANCE_PROJECTION
from learner.methods import create_objective
from tests.learner.test_velocity_and_guidance import batch_of
from tests.support.problem import draw_states, perturbed, tiny_problem

Exported = tuple[Path, dict[str, torch.Tensor]]
CONVERSION = ("objective.type=velocity", "teacher.steps=8", "student.steps=8")


@pytest.fixture(scope="module")
def converted(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A student that says v and is told the guidance scale, exported, and its weights."""
    problem = tiny_problem(tiny_directory, *CONVERSION)
    weights = perturbed(problem.new_student()).state_dict()
    path = tmp_path_factory.mktemp("stage") / "student"
    export_student(problem, weights, path)
    return path, weights


def test_a_student_begins_as_the_last_one_under_the_original_teacher(tiny_directory: Path, converted: Exported) -> None:
    path, weights = converted
    problem = tiny_problem(tiny_directory, f"student.initial={path}")
    own = problem.new_student().state_dict()
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[name], weight) for name, weight in weights.items())
    assert (problem.teacher.prediction_type, problem.student_prediction_type) == ("epsilon", "v_prediction")
    assert problem.student_scheduler().config.prediction_type == "v_prediction"
    critic = problem.new_networks("fake_score")["fake_score"].state_dict()
    teacher = problem.teacher.unet.state_dict()
    assert all(torch.equal(critic[name], weight) for name, weight in teacher.items())


def test_the_last_student_teaches_the_next_in_one_call_a_step(tiny_directory: Path, converted: Exported) -> None:
    path, weights = converted
    stage = tiny_problem(tiny_directory, f"teacher.pipeline={path}", f"student.initial={path}")
    assert stage.teacher.prediction_type == stage.student_prediction_type == "v_prediction"
    before = tiny_problem(tiny_directory, *CONVERSION)
    network = before.new_student()
    network.load_state_dict(weights)
    x_t, index, conditioning, scales = draw_states(before, 8)
    t = torch.tensor(before.grid.student)[index]
    with torch.no_grad():
        taught = stage.teacher_policy().predict_x_0(x_t, t, conditioning, scales)
        own = before.student_policy(network).predict_x_0(x_t, t, conditioning, scales)
        assert torch.allclose(taught, own, atol=1e-5)
        # The expert's answer is two of the last student's steps.
        policy = before.student_policy(network)
        even = torch.tensor([0, 2, 4, 6])
        told = (conditioning.select(even), scales[:4])
        two = policy.step(policy.step(x_t[:4], even, *told), even + 1, *told)
        assert torch.allclose(stage.teacher_policy().solve(x_t[:4], even // 2, *told), two, atol=1e-4)


def test_a_student_of_its_teachers_steps_has_no_loss_under_itself(tiny_directory: Path, converted: Exported) -> None:
    path, _ = converted
    same = tiny_problem(
        tiny_directory, f"teacher.pipeline={path}", f"student.initial={path}", "teacher.steps=4", "student.steps=4"
    )
    (phase,) = create_objective(same.config, same, {"student": same.new_student()}).phases(0)
    with torch.no_grad():
        assert float(phase.loss(batch_of(same, torch.linspace(1, 8, 4))).loss) < 1e-6


def test_an_initial_student_that_is_not_told_the_scale_stays_indifferent_to_it(
    tiny_directory: Path, tmp_path: Path
) -> None:
    bare = tiny_problem(tiny_directory, "student.guidance_embedding=false")
    export_student(bare, perturbed(bare.new_student()).state_dict(), tmp_path / "student")
    problem = tiny_problem(tiny_directory, f"student.initial={tmp_path / 'student'}")
    assert problem.new_student().get_parameter(GUIDANCE_PROJECTION).abs().max() == 0


def test_what_no_student_can_begin_as_is_refused(tiny_directory: Path, tmp_path: Path, converted: Exported) -> None:
    path, _ = converted
    with pytest.raises(ConfigError, match=r"^student.initial: .*nowhere' is no pipeline's directory"):
        tiny_problem(tiny_directory, f"student.initial={tmp_path / 'nowhere'}")
    told = tiny_problem(tiny_directory, f"student.initial={path}", "student.guidance_embedding=false")
    with pytest.raises(ConfigError, match=r"is not the student's: it differs in time_embedding.cond_proj.weight and 0"):
        told.new_student()
    with pytest.raises(ConfigError, match=r"^student\.initial: an adapter stands on the teacher's network"):
        tiny_problem(tiny_directory, f"student.initial={path}", "student.lora={rank: 2}")


def test_a_network_that_is_told_the_scale_cannot_forget_it(converted: Exported, tiny_directory: Path) -> None:
    path, _ = converted
    stage = tiny_problem(tiny_directory, f"teacher.pipeline={path}", "student.guidance_embedding=false")
    with pytest.raises(ConfigError, match=r"student\.guidance_embedding: false, but the teacher's network"):
        stage.new_student()
    adapter = tiny_problem(tiny_directory, f"teacher.pipeline={path}", "student.lora={rank: 2}")
    assert adapter.student_denoiser(adapter.new_student()).embeds_guidance
