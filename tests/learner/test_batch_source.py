"""Training batches: the prior's shares, labels from either side, and exact resumption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine import RolloutEngine, RolloutSettings
from ddil_dist.config import PriorConfig, PriorPart, ReplayConfig
from ddil_dist.errors import RecordError, WaitTimeoutError
from ddil_dist.methods import Dmd2, Progressive
from ddil_dist.methods.rollouts import MixedMode
from ddil_dist.problem import ImitationProblem
from ddil_dist.replay.codec import Codec
from ddil_dist.replay.memory import InMemoryReplay
from ddil_dist.states import States
from ddil_dist.types import NO_POLICY, Draw, StateSource
from learner.batch_source import ROLLOUT_SOURCES, BatchSource
from tests.learner.support import make_state, make_states
from tests.support.problem import CPU, perturbed, tiny_problem
from tests.support.states import Wider, rows, weights_at

GUIDANCE = (2.0, 8.0)
FORWARD_ONLY = "prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]"
BATCH = 16


@pytest.fixture(scope="module")
def problem(tiny_directory: Path) -> ImitationProblem:
    return tiny_problem(tiny_directory)


def buffer_of(states: States[Any]) -> InMemoryReplay:
    config = ReplayConfig(capacity=1000, min_size=1, samples_per_insert=1000.0, error_buffer=1e9)
    replay = InMemoryReplay(config, seed=0)
    replay.insert(states, writer="w", batch_id=0, timeout_s=1.0)
    return replay


def empty_buffer() -> InMemoryReplay:
    return InMemoryReplay(ReplayConfig(), seed=0)


class Noting:
    """A replay buffer that notes what was drawn."""

    def __init__(self, replay: InMemoryReplay) -> None:
        self._replay = replay
        self.draws: list[list[Draw]] = []

    def sample(self, draws: Sequence[Draw], *, timeout_s: float) -> States[Any]:
        self.draws.append(list(draws))
        return self._replay.sample(draws, timeout_s=timeout_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replay, name)


def prior(*parts: tuple[float, float]) -> PriorConfig:
    """Parts of (until, forward share)."""
    return PriorConfig(
        parts=tuple(PriorPart(until=until, forward=share, student=1 - share, teacher=0.0) for until, share in parts)
    )


def source_of(
    problem: ImitationProblem, replay: Any, shares: PriorConfig, *, at_learner: bool = False, seed: int = 3
) -> BatchSource:
    return BatchSource(
        replay=replay,
        prior=shares,
        encoder=problem.encoder,
        schedule=problem.teacher.schedule,
        timesteps=problem.grid.student,
        batch_size=BATCH,
        guidance=GUIDANCE,
        seed=seed,
        timeout_s=1.0,
        device=CPU,
        labels_by_actors=not at_learner,
        expert=problem.teacher_policy() if at_learner else None,
        forward=problem.forward_data(seed=seed) if at_learner else None,
    )


def mixed_states(*, labelled: bool = True) -> States[Any]:
    kinds = (StateSource.FORWARD, StateSource.STUDENT, StateSource.TEACHER)
    versions = (None, 3, None)
    return States.join(
        [make_state(i, source=kinds[i % 3], labelled=labelled, version=versions[i % 3]) for i in range(60)]
    )


def test_replayed_rows_arrive_whole(problem: ImitationProblem) -> None:
    replay = buffer_of(mixed_states())
    replay.note_weights(weights_at(10))
    batch = source_of(problem, replay, prior((1.0, 0.5))).next(progress=0.0)
    assert len(batch) == BATCH
    assert batch.label is not None
    for row in range(BATCH):
        index = int(batch.x_t[row, 0, 0, 0])
        state = rows(mixed_states())[index]
        assert torch.equal(batch.x_t[row], torch.full((4, 4, 4), float(index)))
        assert torch.equal(batch.label[row], torch.full((4, 4, 4), -float(index)))
        assert batch.step_index[row] == state.step_index
        assert batch.guidance_scale[row] == state.guidance_scale
        assert batch.source[row] == state.source
        student = state.source is StateSource.STUDENT
        assert batch.policy_version[row] == (3 if student else NO_POLICY)
        assert batch.staleness[row] == (7 if student else 0)
        told = problem.encoder.encode([state.prompt]).embeddings[0]
        assert torch.equal(batch.conditioning.embeddings[row], told)


@pytest.mark.parametrize("at_learner", [False, True])
def test_a_field_more_arrives_with_the_batch(problem: ImitationProblem, at_learner: bool) -> None:
    replay = InMemoryReplay(ReplayConfig(min_size=1, samples_per_insert=1000.0, error_buffer=1e9), seed=0, kind=Wider)
    plain = mixed_states()
    columns = {name: getattr(plain, name) for name in Codec().values}
    states = Wider.of(columns | {"reward": np.arange(60) / 2}, x_t=plain.x_t, label=plain.label)
    replay.insert(states, writer="w", batch_id=0, timeout_s=1.0)
    batch = source_of(problem, replay, prior((1.0, 0.5)), at_learner=at_learner).next(progress=0.0)
    assert isinstance(batch, Wider)
    diffused_here = (batch.source == StateSource.FORWARD) & at_learner
    expected = torch.where(diffused_here, -1.5, batch.x_t[:, 0, 0, 0] / 2)
    assert torch.equal(batch.reward, expected)
    assert len(batch.split(5)[0].reward) == 5


@pytest.mark.parametrize("at_learner", [False, True])
def test_the_forward_share_is_the_priors_part_by_part(problem: ImitationProblem, at_learner: bool) -> None:
    source = source_of(problem, buffer_of(mixed_states()), prior((0.25, 0.8), (1.0, 0.3)), at_learner=at_learner)
    source._expert = None  # the labels cost time and do not matter here
    for progress, share in ((0.0, 0.8), (0.24, 0.8), (0.25, 0.3), (1.0, 0.3)):
        num = 25
        batches = [source.next(progress=progress) for _ in range(num)]
        assert all(len(batch) == BATCH for batch in batches)
        forward = sum(int((batch.source == StateSource.FORWARD).sum()) for batch in batches)
        deviation = (share * (1 - share) / (num * BATCH)) ** 0.5
        assert abs(forward / (num * BATCH) - share) < 4 * deviation
        counts = {int((batch.source == StateSource.FORWARD).sum()) for batch in batches}
        assert len(counts) > 2, "the share is drawn per sample, not rounded per batch"


def test_every_source_is_drawn_by_its_own_share(problem: ImitationProblem) -> None:
    shares = {StateSource.FORWARD: 0.5, StateSource.STUDENT: 0.4, StateSource.TEACHER: 0.1}
    part = PriorPart(until=1.0, forward=0.5, student=0.4, teacher=0.1)
    source = source_of(problem, buffer_of(mixed_states()), PriorConfig(parts=(part,)))
    drawn = torch.cat([source.next(progress=0.0).source for _ in range(50)])
    for kind, share in shares.items():
        deviation = (share * (1 - share) / len(drawn)) ** 0.5
        assert abs(float((drawn == kind).float().mean()) - share) < 4 * deviation


def test_one_rollout_policy_stands_in_until_the_other_has_made_a_state(problem: ImitationProblem) -> None:
    teacher_only = make_states(0, 20, source=StateSource.TEACHER, version=None)
    replay = Noting(buffer_of(teacher_only))
    source = source_of(problem, replay, prior((1.0, 0.0)))
    assert bool((source.next(progress=0.0).source == StateSource.TEACHER).all())
    assert replay.draws[-1] == [Draw(BATCH, ROLLOUT_SOURCES)]
    student = make_states(20, 24, source=StateSource.STUDENT, version=1)
    replay.insert(student, writer="w", batch_id=1, timeout_s=1.0)
    assert bool((source.next(progress=0.0).source == StateSource.STUDENT).all())
    assert replay.draws[-1] == [Draw(BATCH, frozenset({StateSource.STUDENT}))]


def test_what_is_live_stands_in_for_a_kind_until_it_has_made_a_state(problem: ImitationProblem) -> None:
    parts = [(0.25, 1.0, 0.0, 0.0), (0.5, 0.0, 0.5, 0.5), (1.0, 0.9, 0.1, 0.0)]
    shares = PriorConfig(
        parts=tuple(PriorPart(until=until, forward=f, student=s, teacher=t) for until, f, s, t in parts)
    )
    forward = make_states(0, 20, source=StateSource.FORWARD, version=None)
    replay = Noting(buffer_of(forward))
    source = source_of(problem, replay, shares)
    assert bool((source.next(progress=0.0).source == StateSource.FORWARD).all())
    assert bool((source.next(progress=0.25).source == StateSource.FORWARD).all()), "before there is any rollout"
    assert replay.draws[-1] == [Draw(BATCH, None)]
    student = make_states(20, 24, source=StateSource.STUDENT, version=1)
    rollouts = buffer_of(student)  # the forward states have died out, unused
    rollouts.note_weights(weights_at(1))
    replay = Noting(rollouts)
    source._replay = replay
    assert bool((source.next(progress=0.25).source == StateSource.STUDENT).all())
    assert {draw.sources for draw in replay.draws[-1]} == {frozenset({StateSource.STUDENT}), ROLLOUT_SOURCES}
    assert bool((source.next(progress=0.5).source == StateSource.STUDENT).all()), "before there is a forward state"
    replay.insert(forward, writer="w", batch_id=1, timeout_s=1.0)
    source.next(progress=0.5)
    assert frozenset({StateSource.FORWARD}) in {draw.sources for draw in replay.draws[-1]}
    assert None not in {draw.sources for draw in replay.draws[-1]}


def test_others_stand_in_for_a_kind_that_died_out(problem: ImitationProblem) -> None:
    source = source_of(problem, buffer_of(mixed_states()), prior((1.0, 0.5)))
    source.next(progress=0.0)
    teacher_only = make_states(0, 20, source=StateSource.TEACHER, version=None)
    replay = Noting(buffer_of(teacher_only))
    source._replay = replay
    assert bool((source.next(progress=0.0).source == StateSource.TEACHER).all())
    waited = len(replay.draws)
    source.next(progress=0.0)
    assert len(replay.draws) == waited + 1, "it is waited for once"


def test_others_stand_in_for_a_kind_that_has_grown_too_old(problem: ImitationProblem) -> None:
    config = ReplayConfig(capacity=100, min_size=1, samples_per_insert=1000.0, error_buffer=1e9, max_staleness=2)
    replay = InMemoryReplay(config, seed=0)
    for kind, version in ((StateSource.STUDENT, 0), (StateSource.TEACHER, None)):
        states = make_states(0, 4, source=kind, version=version)
        replay.insert(states, writer="w", batch_id=int(kind), timeout_s=1.0)
    replay.note_weights(weights_at(10))
    source = source_of(problem, replay, prior((1.0, 0.5)))
    assert bool((source.next(progress=0.0).source == StateSource.TEACHER).all())


def test_a_buffer_without_any_state_is_waited_for_in_vain(problem: ImitationProblem) -> None:
    config = ReplayConfig(capacity=1000, min_size=1, samples_per_insert=1000.0, error_buffer=1e9)
    excuses = [True, True, False]
    calls: list[int] = []
    source = source_of(problem, InMemoryReplay(config, seed=0), prior((1.0, 0.5)))
    source._timeout_s = 0.01
    source._is_excused = lambda: excuses.pop(0)
    with pytest.raises(WaitTimeoutError):
        source.next(progress=0.0, on_wait=lambda: calls.append(len(excuses)))
    assert calls == [2, 1], "called while there is an excuse"


def test_labels_at_the_learner_are_those_of_the_engine_at_the_same_states(problem: ImitationProblem) -> None:
    engine = RolloutEngine(
        teacher=problem.teacher_policy(),
        student=problem.student_policy(perturbed(problem.new_student()).eval()),
        schedule=problem.teacher.schedule,
        encoder=problem.encoder,
        prompts=["a red square", "a blue circle"],
        forward=None,
        latent_shape=problem.teacher.latent_shape,
        device=CPU,
        settings=RolloutSettings(
            batch_size=4,
            student_batch_size=1,
            labels=True,
            guidance=GUIDANCE,
            seed=1,
            mode=MixedMode(problem.grid.num_steps - 1),
        ),
    )
    engine.set_policy(0, student_probability=0.5, forward_share=0.0)
    states = States.join([made for _ in range(16) for made in engine.tick()])
    bare = replace(states, label=None)
    batch = source_of(problem, buffer_of(bare), prior((1.0, 0.0)), at_learner=True).next(progress=0.0)
    assert batch.label is not None
    for row in range(BATCH):
        (state,) = (one for one in rows(states) if torch.equal(one.x_t, batch.x_t[row]))
        torch.testing.assert_close(batch.label[row], state.label, rtol=2e-3, atol=2e-3)


def test_states_diffused_here_are_noised_data_with_its_captions_and_the_experts_answers(
    problem: ImitationProblem,
) -> None:
    batch = source_of(problem, empty_buffer(), prior((1.0, 1.0)), at_learner=True).next(progress=0.0)
    x_0, captions = problem.forward_data(seed=3).next(BATCH)
    told = problem.encoder.encode(captions)
    assert torch.equal(batch.conditioning.embeddings, told.embeddings)
    t = torch.tensor(problem.grid.student)[batch.step_index]
    schedule = problem.teacher.schedule
    noise = (batch.x_t - schedule.alpha(t) * x_0) / schedule.sigma(t)
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    # Row by row, so that a row noised for another's timestep shows.
    assert (noise.std((1, 2, 3)) - 1).abs().max() < 4 / (2 * noise[0].numel()) ** 0.5
    assert set(batch.step_index.tolist()) == {0, 1, 2, 3}
    assert ((batch.guidance_scale >= GUIDANCE[0]) & (batch.guidance_scale <= GUIDANCE[1])).all()
    assert batch.guidance_scale.std() > 0.5
    assert (batch.source == StateSource.FORWARD).all()
    assert (batch.policy_version == NO_POLICY).all()
    assert not batch.staleness.any()
    answer = problem.teacher_policy().solve(batch.x_t, batch.step_index, told, batch.guidance_scale)
    assert batch.label is not None
    torch.testing.assert_close(batch.label, answer, rtol=1e-3, atol=1e-3)


def same(one: States[torch.Tensor], other: States[torch.Tensor]) -> bool:
    columns = ("x_t", "step_index", "guidance_scale", "label", "source", "policy_version", "staleness")
    return torch.equal(one.conditioning.embeddings, other.conditioning.embeddings) and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in columns
    )


def test_a_resumed_source_makes_the_same_batches(problem: ImitationProblem) -> None:
    shares = prior((1.0, 1.0))
    source = source_of(problem, empty_buffer(), shares, at_learner=True)
    source.next(progress=0.0)
    state = source.state_dict()
    wanted = [source.next(progress=0.5) for _ in range(3)]
    resumed = source_of(problem, empty_buffer(), shares, at_learner=True, seed=3)
    resumed.load_state_dict(state)
    assert all(same(resumed.next(progress=0.5), batch) for batch in wanted)
    assert not same(wanted[0], wanted[1])
    fresh = source_of(problem, empty_buffer(), shares, at_learner=True, seed=4)
    assert not same(fresh.next(progress=0.0), wanted[0])


def test_a_resumed_source_makes_the_same_draws_from_replay(problem: ImitationProblem) -> None:
    replay = Noting(buffer_of(mixed_states()))
    shares = prior((1.0, 0.5))
    source = source_of(problem, replay, shares)
    source.next(progress=0.0)
    state = source.state_dict()
    for _ in range(5):
        source.next(progress=0.0)
    resumed = source_of(problem, replay, shares, seed=99)
    resumed.load_state_dict(state)
    for _ in range(5):
        resumed.next(progress=0.0)
    assert replay.draws[1:6] == replay.draws[6:]


def test_states_without_labels_name_the_setting(problem: ImitationProblem) -> None:
    source = source_of(problem, buffer_of(mixed_states(labelled=False)), prior((1.0, 0.5)))
    with pytest.raises(RecordError, match=r"rollout\.labels is 'actors'.*run of another name"):
        source.next(progress=0.0)


class Away(Noting):
    """A replay buffer whose server is away for `away_s` of what it is waited for."""

    def __init__(self, replay: InMemoryReplay, *, away_s: float) -> None:
        super().__init__(replay)
        self._away_s = away_s

    def stats(self, *, timeout_s: float | None = None) -> Any:
        if (30.0 if timeout_s is None else timeout_s) < self._away_s:
            raise WaitTimeoutError("statistics waited for the replay server")
        return self._replay.stats()


@pytest.mark.parametrize("away_s", [250.0, 350.0])
def test_a_server_may_be_away_for_as_long_as_a_sample_may_wait(problem: ImitationProblem, away_s: float) -> None:
    replay = Away(buffer_of(mixed_states()), away_s=away_s)
    source = source_of(problem, replay, prior((1.0, 0.5)))
    source._timeout_s = 300.0
    source.next(progress=0.0)
    stood_in = None in {draw.sources for draw in replay.draws[0]}
    assert stood_in is (away_s > 300)


def test_shares_hold_where_somebody_led_to_a_state_and_noise_has_the_first_point(problem: ImitationProblem) -> None:
    kinds = (StateSource.FORWARD, StateSource.STUDENT, StateSource.TEACHER, StateSource.NOISE)
    replay = buffer_of(
        States.join([make_state(i, source=kinds[i % 4], version=3 if i % 4 == 1 else None) for i in range(80)])
    )
    source = source_of(problem, replay, PriorConfig(parts=(PriorPart(until=1, forward=0.2, student=0.6, teacher=0.2),)))
    source._noise_share = problem.noise_share
    assert problem.noise_share == 0.25
    num = 60
    drawn = Counter(kind for _ in range(num) for kind in source.next(progress=0.0).source.tolist())
    for kind, share in zip(kinds, (0.2, 0.45, 0.15, 0.2), strict=True):
        deviation = (share * (1 - share) / (num * BATCH)) ** 0.5
        assert abs(drawn[int(kind)] / (num * BATCH) - share) < 4 * deviation


@pytest.mark.parametrize(
    ("overrides", "share"),
    [
        ((), 1 / 4),
        (("student.steps=2",), 1 / 2),
        (("student.steps=1",), 1.0),
        (("rollout.until_timestep=500",), 1 / 3),
        (("objective.type=consistency", "objective.sampler_steps=[1, 3]", FORWARD_ONLY), 2 / 4),
    ],
)
def test_the_share_of_noise_is_that_of_where_rollouts_stop(
    tiny_directory: Path, overrides: tuple[str, ...], share: float
) -> None:
    assert tiny_problem(tiny_directory, *overrides).noise_share == pytest.approx(share)


def test_shares_that_are_one_whole_but_for_rounding_are_drawn(problem: ImitationProblem) -> None:
    shares = PriorConfig(parts=(PriorPart(until=1, forward=0.5, student=0.5 + 9e-7, teacher=0.0),))
    assert len(source_of(problem, buffer_of(mixed_states()), shares).next(progress=0.0)) == BATCH


def test_inputs_that_are_not_looked_at_are_not_encoded(
    problem: ImitationProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("an image was encoded")

    source = source_of(problem, empty_buffer(), prior((1.0, 1.0)), at_learner=True)
    captions = problem.forward_data(seed=3).next(BATCH)[1]
    monkeypatch.setattr(type(problem.teacher), "image_posterior", refuse)
    source._expert = None
    source._unused_shape = (4, 4, 4)
    batch = source.next(progress=0.0)
    assert batch.x_t.shape == (BATCH, 4, 4, 4)
    assert torch.equal(batch.conditioning.embeddings, problem.encoder.encode(captions).embeddings)
    assert source.state_dict()["forward"] == {"position": BATCH}


def test_only_backward_simulation_makes_all_of_its_inputs() -> None:
    assert Dmd2().makes_inputs
    assert not Dmd2(generator_input="prior").makes_inputs
    assert not Progressive().makes_inputs
