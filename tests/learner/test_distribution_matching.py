"""Distribution matching against Gaussian closed forms and definitions; who learns when, from what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddil_dist.config import ReflectThresholding, StaticThresholding, Thresholding
from ddil_dist.diffusion.grid import TrajectoryGrid
from ddil_dist.diffusion.parameterization import PredictionType
from ddil_dist.diffusion.thresholding import outside, reflect, straight_through
from ddil_dist.methods import Dmd, Dmd2
from ddil_dist.models.conditioning import Conditioning
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.policy import RenoisingStudentPolicy, StudentPolicy, TeacherPolicy
from ddil_dist.states import States
from ddil_dist.types import StateSource
from learner.methods import create_networks, create_objective
from learner.methods.distribution_matching import DistributionMatchingObjective, ScoreDifference, matching_gradient
from learner.methods.dmd import DmdObjective
from tests.learner.gaussian import GaussianNetwork
from tests.learner.support import SCHEDULE, make_batch
from tests.support.problem import CPU, draw_states, tiny_problem

GRID = TrajectoryGrid.create(4, 4, spacing="trailing")
DATA_ONLY = "prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]"


class Affine(nn.Module):
    """A generator ("sample") of N(mean, std^2) from x_T's noise: what it says of x_t is mean + std x_t."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.config = {"time_cond_proj_dim": None}
        self.mean = nn.Parameter(torch.tensor(float(mean)))
        self.std = nn.Parameter(torch.tensor(float(std)))

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (self.mean + self.std * x,)


def identity(x_0: Tensor) -> Tensor:
    return x_0


def teacher_of(network: nn.Module, grid: TrajectoryGrid = GRID) -> TeacherPolicy:
    return TeacherPolicy(Denoiser(network, SCHEDULE, "sample"), Conditioning(torch.zeros(1, 4, 8)), identity, grid)


def scores_of(real: nn.Module, fake: nn.Module, *, kind: PredictionType = "sample", **settings: Any) -> ScoreDifference:
    config = Dmd2(**settings)
    critic = Denoiser(fake, SCHEDULE, kind)
    return ScoreDifference(config, teacher=teacher_of(real), critic=critic, threshold=identity)


def objective_of(generator: nn.Module, real: nn.Module, fake: nn.Module, **settings: Any) -> Any:
    critic = Denoiser(fake, SCHEDULE, "sample")
    config = Dmd2(gan=None, **settings)
    return DistributionMatchingObjective(
        config,
        student=RenoisingStudentPolicy(Denoiser(generator, SCHEDULE, "sample"), GRID, CPU),
        scores=ScoreDifference(config, teacher=teacher_of(real), critic=critic, threshold=identity),
        critic=critic,
        real=None,
        projection=identity,
    )


def made_by_the_student(batch: States[torch.Tensor]) -> States[torch.Tensor]:
    return replace(batch, source=torch.full_like(batch.source, int(StateSource.STUDENT)))


def batch_of(num: int, *, seed: int = 0) -> States[torch.Tensor]:
    return make_batch(np.random.default_rng(seed), num)


def gaussian(mean: float, std: float) -> GaussianNetwork:
    return GaussianNetwork(SCHEDULE, mean, std)


def test_the_gradient_between_gaussians_is_the_closed_form() -> None:
    batch = batch_of(6)
    x = batch.x_t.clone().requires_grad_()
    torch.manual_seed(3)
    loss, magnitude = scores_of(gaussian(0.5, 0.6), gaussian(-0.2, 0.9)).matching(x, batch)
    loss.mean().backward()
    torch.manual_seed(3)
    t = torch.randint(20, 981, (6,))
    noise = torch.randn(x.shape).double().numpy()
    alpha, sigma = (value.double().numpy() for value in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    clean = x.detach().double().numpy()
    x_t = alpha * clean + sigma * noise

    def posterior(mean: float, std: float) -> Any:
        return (mean * sigma**2 + alpha * std**2 * x_t) / (alpha**2 * std**2 + sigma**2)

    real, fake = posterior(0.5, 0.6), posterior(-0.2, 0.9)
    distance = np.abs(clean - real)
    mean = distance.mean((1, 2, 3), keepdims=True)
    gradient = (fake - real) / mean
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy() * x.numel(), gradient, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss.detach().numpy(), 0.5 * (gradient**2).mean((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(magnitude.numpy(), np.abs(gradient).mean((1, 2, 3)), rtol=1e-4)


def test_the_gradient_vanishes_where_real_and_fake_agree() -> None:
    batch = batch_of(6)
    x = batch.x_t.clone().requires_grad_()
    loss, _ = scores_of(gaussian(0.5, 0.6), gaussian(0.5, 0.6)).matching(x, batch)
    loss.mean().backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) == float(loss.detach().max()) == 0


def test_what_is_no_number_is_no_gradient() -> None:
    x = torch.randn(3, 1, 2, 2)
    real, fake = x.clone(), x.clone()  # 0 / 0, then 1 / 0, in the first two samples
    fake[1] += 1
    real[2] -= 2
    gradient = matching_gradient(x, real, fake)
    assert gradient.dtype == torch.float64
    assert gradient[:2].abs().max() == 0
    np.testing.assert_allclose(gradient[2].numpy(), np.ones((1, 2, 2)))


def test_a_generator_that_follows_the_gradient_becomes_the_data() -> None:
    """With a critic that always knows the generator, mean and deviation go where the teacher's are."""
    generator = Affine(-0.5, 0.3)
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.02)
    torch.manual_seed(0)
    for seed in range(200):
        batch = replace(batch_of(16, seed=seed), step_index=torch.zeros(16, dtype=torch.int64))
        fake = gaussian(generator.mean.item(), generator.std.item())
        objective = objective_of(generator, gaussian(0.4, 0.7), fake, generator_input="prior")
        objective.generator_loss(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert generator.mean.item() == pytest.approx(0.4, abs=0.06)
    assert generator.std.item() == pytest.approx(0.7, abs=0.08)


@pytest.mark.parametrize("target", ["prediction", *get_args(PredictionType)])
@pytest.mark.parametrize("own", get_args(PredictionType))
def test_the_critics_loss_is_the_denoising_error_in_its_space(target: Any, own: PredictionType) -> None:
    batch = batch_of(6)
    torch.manual_seed(1)
    network = Affine(0.1, 0.8)
    loss = scores_of(network, network, kind=own, critic_target=target).denoising(batch.x_t, batch)
    torch.manual_seed(1)
    t = torch.randint(0, 1000, (6,))
    x_0, eps = batch.x_t.double().numpy(), torch.randn(batch.x_t.shape).double().numpy()
    alpha, sigma = (value.double().numpy() for value in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    x_t = alpha * x_0 + sigma * eps
    said = 0.1 + 0.8 * x_t
    error = {
        "sample": said - x_0,
        "epsilon": -(sigma / alpha) * (said - eps),
        "v_prediction": -sigma * (said - (alpha * eps - sigma * x_0)),
    }[own]  # of x_0
    factor = {"sample": 1.0, "epsilon": alpha / sigma, "v_prediction": 1 / sigma}[
        own if target == "prediction" else target
    ]
    np.testing.assert_allclose(loss.detach().numpy(), ((factor * error) ** 2).mean((1, 2, 3)), rtol=2e-3)


def test_the_exact_score_is_where_the_critics_loss_is_least() -> None:
    batch = replace(batch_of(48), x_t=0.3 + 0.5 * torch.randn(48, 4, 4, 4, generator=torch.Generator().manual_seed(0)))
    losses = {}
    for mean, std in ((0.3, 0.5), (0.1, 0.5), (0.3, 0.8), (0.3, 0.2)):
        torch.manual_seed(5)
        network = gaussian(mean, std)
        losses[mean, std] = float(scores_of(network, network).denoising(batch.x_t, batch).detach().mean())
    assert min(losses, key=losses.__getitem__) == (0.3, 0.5)


def roles(objective: Any, updates: int) -> list[str]:
    return ["+".join(phase.role for phase in objective.phases(update)) for update in range(updates)]


def test_two_time_scales() -> None:
    both, fake = "student+fake_score", "fake_score"
    three = objective_of(Affine(0, 1), gaussian(0, 1), gaussian(0, 1), generator_every=3)
    assert roles(three, 7) == [both, fake, fake, both, fake, fake, both]
    alternating = objective_of(Affine(0, 1), gaussian(0, 1), gaussian(0, 1), generator_every=3, critic="alternating")
    assert roles(alternating, 5) == ["student", fake, fake, "student", fake]
    assert Dmd2().generator_every == 5
    assert [alternating._critic_turns(update) for update in range(7)] == [0, 0, 1, 2, 2, 3, 4]
    assert [three._critic_turns(update) for update in range(4)] == [0, 1, 2, 3]


def test_the_critic_learns_from_what_the_generator_has_just_made() -> None:
    calls: list[int] = []

    class Counted(Affine):
        def forward(self, x: Tensor, *rest: Any, **more: Any) -> tuple[Tensor]:
            calls.append(len(x))
            return super().forward(x, *rest, **more)

    batch = made_by_the_student(batch_of(6))
    objective = objective_of(Counted(0.3, 0.5), gaussian(0, 1), gaussian(0, 1), generator_input="prior")
    seen: list[Tensor] = []
    denoising = objective._scores.denoising
    objective._scores.denoising = lambda x, batch: seen.append(x) or denoising(x, batch)
    for update in (0, 1):
        for phase in objective.phases(update):
            for micro in batch.split(4):
                phase.loss(micro)
    assert calls == [4, 2, 4, 2]  # the generator's phase of the first update, and the critic's of the second
    for made in (seen[:2], seen[2:]):
        torch.testing.assert_close(torch.cat(made), 0.3 + 0.5 * batch.x_t)
        assert not any(x.requires_grad for x in made)


def test_a_phase_that_is_made_anew_forgets_its_samples_and_sees_the_same_data() -> None:
    class Seeks:
        turns: list[int]

        def seek(self, turn: int) -> None:
            self.turns.append(turn)

    objective = objective_of(Affine(0.3, 0.5), gaussian(0, 1), gaussian(0, 1), generator_input="prior")
    objective._real = Seeks()
    objective._real.turns = []
    objective.phases(7)
    objective.generator_loss(batch_of(6))
    objective.retry(7)
    assert objective._real.turns == [7, 7]
    seen: list[Tensor] = []
    objective._scores.denoising = lambda x, batch: seen.append(x) or torch.zeros(len(x))
    objective.critic_loss(batch_of(3, seed=1))
    assert len(seen[0]) == 3


def test_the_prior_decides_where_the_generator_starts() -> None:
    """But where it drew data at the grid's first point, the generator starts from pure noise."""
    batch = batch_of(13)
    objective = objective_of(Affine(0.3, 0.5), gaussian(0, 1), gaussian(0, 1), generator_input="prior")
    drawn = made_by_the_student(batch)
    torch.testing.assert_close(objective.generate(drawn), 0.3 + 0.5 * batch.x_t)
    torch.manual_seed(2)
    x = objective.generate(batch)
    torch.manual_seed(2)
    noise = torch.randn(batch.x_t.shape)
    pure = [row for row in range(13) if batch.source[row] == StateSource.FORWARD and batch.step_index[row] == 0]
    assert pure == [0, 12]
    for row in range(13):
        wanted = noise[row] if row in pure else batch.x_t[row]
        torch.testing.assert_close(x[row], 0.3 + 0.5 * wanted)


def test_backward_simulation_renoises_the_students_own_estimates() -> None:
    batch = replace(batch_of(4), step_index=torch.full((4,), 2))
    objective = objective_of(Affine(0.3, 0.5), gaussian(0, 1), gaussian(0, 1))
    torch.manual_seed(7)
    x = objective.generate(batch)
    torch.manual_seed(7)
    state = torch.randn(4, 4, 4, 4)
    for timestep in (749, 499):
        t = torch.full((4,), timestep)
        state = SCHEDULE.alpha(t) * (0.3 + 0.5 * state) + SCHEDULE.sigma(t) * torch.randn(4, 4, 4, 4)
    torch.testing.assert_close(x.detach(), 0.3 + 0.5 * state)
    # However far its samples go, a batch costs as many calls, for workers that share the network among them.
    calls: list[int] = []

    class Counted(Affine):
        def forward(self, x: Tensor, *rest: Any, **more: Any) -> tuple[Tensor]:
            calls.append(len(x))
            return super().forward(x, *rest, **more)

    counted = objective_of(Counted(0.3, 0.5), gaussian(0, 1), gaussian(0, 1))
    for indices in ([0, 0, 0, 0], [0, 1, 1, 3], [3, 3, 3, 3]):
        torch.manual_seed(8)
        noise = torch.randn(4, 4, 4, 4)
        torch.manual_seed(8)
        states = counted._simulated(replace(batch, step_index=torch.tensor(indices)))
        for row, index in enumerate(indices):
            assert torch.equal(states[row], noise[row]) == (index == 0)
    assert calls == [1, 1, 1, 3, 1, 1, 4, 4, 4]
    # Each sample goes only as far as its own grid time: with a constant estimate the marginals are known.
    many = replace(batch_of(4000), step_index=torch.arange(4000) % 4)
    constant = objective_of(Affine(2.0, 0.0), gaussian(0, 1), gaussian(0, 1))
    states = constant._simulated(many)
    for index, timestep in enumerate(GRID.student):
        rows = states[many.step_index == index]
        time = torch.tensor([timestep])
        mean, std = (2 * SCHEDULE.alpha(time).item(), SCHEDULE.sigma(time).item()) if index else (0.0, 1.0)
        assert float(rows.mean()) == pytest.approx(mean, abs=0.02)
        assert float(rows.std()) == pytest.approx(std, abs=0.02)


def test_noise_levels_of_the_gradient_are_from_two_to_ninety_eight_hundredths() -> None:
    seen: list[Tensor] = []

    class Recorder(GaussianNetwork):
        def forward(self, x: Tensor, t: Tensor, *rest: Any, **more: Any) -> tuple[Tensor]:
            seen.append(t)
            return super().forward(x, t, *rest, **more)

    recorder = Recorder(SCHEDULE, 0.0, 1.0)
    batch = batch_of(6000)
    scores_of(gaussian(0, 1), recorder).matching(batch.x_t[:, :1, :1, :1], batch)
    scores_of(gaussian(0, 1), recorder).denoising(batch.x_t[:, :1, :1, :1], batch)
    gradient, denoising = seen
    assert (int(gradient.min()), int(gradient.max())) == (20, 980)
    assert float(gradient.float().mean()) == pytest.approx(500, abs=12)
    assert int(denoising.min()) < 2
    assert int(denoising.max()) > 997


def test_teacher_and_critic_are_projected_and_so_is_their_gradient() -> None:
    """Reflected: with both estimates folded into [-0.3, 0.3], by their own thresholds."""
    batch = batch_of(6)

    def fold(x_0: Tensor) -> Tensor:
        return reflect(x_0, limit=torch.tensor(0.3))

    teacher = TeacherPolicy(
        Denoiser(gaussian(0.5, 0.6), SCHEDULE, "sample"), Conditioning(torch.zeros(1, 4, 8)), fold, GRID
    )
    critic = Denoiser(gaussian(-0.2, 0.9), SCHEDULE, "sample")
    scores = ScoreDifference(Dmd2(), teacher=teacher, critic=critic, threshold=fold)
    x = batch.x_t.clone().requires_grad_()
    torch.manual_seed(3)
    scores.matching(x, batch)[0].mean().backward()
    torch.manual_seed(3)
    t, noise = torch.randint(20, 981, (6,)), torch.randn(x.shape)
    x_t = SCHEDULE.add_noise(batch.x_t, noise, t)
    told = (t, batch.conditioning.embeddings, None, False)
    with torch.no_grad():
        real, fake = (fold(gaussian(mean, std)(x_t, *told)[0]) for mean, std in ((0.5, 0.6), (-0.2, 0.9)))
    assert x.grad is not None
    wanted = (fake - real) / (batch.x_t - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(x.grad * x.numel(), wanted, rtol=1e-4, atol=1e-4)


def test_dmd_adds_regression_to_the_teachers_samples() -> None:
    grid = TrajectoryGrid.create(1, 8, spacing="trailing")
    generator, real = Affine(0.3, 0.5), gaussian(0.4, 0.7)
    config = Dmd(regression_weight=0.25)
    scores = ScoreDifference(
        config, teacher=teacher_of(real, grid), critic=Denoiser(real, SCHEDULE, "sample"), threshold=identity
    )
    policy = StudentPolicy(Denoiser(generator, SCHEDULE, "sample"), grid, CPU)
    objective = DmdObjective(config, student=policy, scores=scores, projection=identity)
    assert [phase.role for phase in objective.phases(1)] == ["student", "fake_score"]
    batch = replace(batch_of(6), step_index=torch.zeros(6, dtype=torch.int64))
    assert batch.label is not None
    output = objective.generator_loss(batch)
    # Real and fake agree, so that regression is all there is.
    wanted = 0.25 * (0.3 + 0.5 * batch.x_t - batch.label).square().mean((1, 2, 3))
    torch.testing.assert_close(output.per_sample, wanted)
    output.loss.backward()
    error = 0.3 + 0.5 * batch.x_t - batch.label
    assert generator.mean.grad is not None
    assert generator.mean.grad.item() == pytest.approx(0.5 * error.mean().item(), rel=1e-4)
    with pytest.raises(AssertionError, match="needs the teacher's samples"):
        objective.generator_loss(replace(batch, label=None))


@pytest.mark.parametrize("thresholding", [ReflectThresholding(limit=1.0), StaticThresholding(limit=1.0)])
def test_a_sample_outside_the_support_is_led_back_into_it(thresholding: Thresholding) -> None:
    projection = thresholding.projection()
    raw = torch.full((1, 1, 2, 2), 1.3, requires_grad=True)
    x = straight_through(raw, projection)
    torch.testing.assert_close(x, torch.ones_like(x))
    (x - 0.5).square().mean().backward()
    assert raw.grad is not None
    assert (raw.grad > 0).all(), "down the gradient is towards 0.5"
    raw.grad = None
    distance, share = outside(raw, projection)
    assert distance.tolist() == pytest.approx([0.09])
    assert share.tolist() == [1.0]
    distance.mean().backward()
    torch.testing.assert_close(raw.grad, torch.full_like(raw, 2 * 0.3 / 4))
    inside = torch.full((1, 1, 2, 2), 0.9)
    assert torch.equal(straight_through(inside, projection), inside)
    assert [value.tolist() for value in outside(inside, projection)] == [[0.0], [0.0]]


@pytest.mark.parametrize("kind", ["distribution_matching", "dmd"])
def test_a_generator_is_held_in_the_support_and_says_how_much_was_not(tiny_directory: Path, kind: str) -> None:
    learner = ["rollout.labels=learner", DATA_ONLY] if kind == "distribution_matching" else ["student.steps=1"]
    problem = tiny_problem(
        tiny_directory,
        *(f"objective.type={kind}", *learner, "student.spacing=trailing"),
        "thresholding={type: reflect, limit: 0.3}",
    )
    networks = create_networks(problem.config, problem)
    objective = create_objective(problem.config, problem, networks)
    x_t, index, told, scale = draw_states(problem, 6)
    index = index % problem.grid.num_steps
    batch = replace(batch_of(6), x_t=x_t, step_index=index, conditioning=told, guidance_scale=scale, label=x_t)
    generator, critic = (phase.loss(batch) for phase in objective.phases(0))
    assert 0 < float(generator.metrics["outside"]) <= 1
    generator.loss.backward()
    assert torch.isfinite(critic.loss)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in networks["student"].parameters())
