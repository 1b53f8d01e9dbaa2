"""What an update of DMD2 costs, ours beside NVIDIA's `modelopt.torch.fastgen`: `python -m tests.benchmarks.objectives`.

Both make a generator's step and a critic's on the same networks (the built-in pipeline's U-Net as teacher, student and
critic), batch, guidance and device, without a discriminator: the student's samples, their score under guided teacher
and critic, the loss, its gradient, the optimizer. The two take turns, so that a busy machine slows both; the ratio is
that of the medians. Without `nvidia-modelopt` it times ours alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddil_dist.config import load_config
from ddil_dist.methods import FAKE_SCORE, Dmd2
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.policy import RenoisingStudentPolicy
from ddil_dist.problem import ImitationProblem, default_device
from learner.methods import STUDENT
from learner.methods.distribution_matching import DistributionMatchingObjective, ScoreDifference
from tests.support.states import train_batch

GUIDANCE = 1.75
Step = Callable[[], None]


def problem_of(device: torch.device) -> ImitationProblem:
    config = load_config(
        None,
        [
            "objective={type: distribution_matching, gan: null, generator_input: prior}",
            "rollout.labels=learner",
            "student.spacing=trailing",
        ],
    )
    return ImitationProblem.create(config, device)


def networks_of(problem: ImitationProblem) -> dict[str, nn.Module]:
    """Student and critic: copies of the teacher's network, as it is."""
    return {role: copy.deepcopy(problem.teacher.unet).train().requires_grad_(True) for role in (STUDENT, FAKE_SCORE)}


def optimizers_of(networks: dict[str, nn.Module]) -> dict[str, torch.optim.Optimizer]:
    return {role: torch.optim.AdamW(network.parameters(), lr=1e-6) for role, network in networks.items()}


def train_only(networks: dict[str, nn.Module], trained: str) -> None:
    for role, network in networks.items():
        network.requires_grad_(role == trained)


def our_update(problem: ImitationProblem, batch_size: int) -> Step:
    """One generator's and one critic's step of this project."""
    config = problem.config.objective
    assert isinstance(config, Dmd2)
    networks = networks_of(problem)
    optimizers = optimizers_of(networks)
    kind = problem.teacher.prediction_type
    critic = Denoiser(networks[FAKE_SCORE], problem.teacher.schedule, kind)
    student = Denoiser(networks[STUDENT], problem.teacher.schedule, kind)
    scores = ScoreDifference(config, teacher=problem.teacher_policy(), critic=critic, threshold=lambda x_0: x_0)
    policy = RenoisingStudentPolicy(student, problem.grid, problem.device)
    objective = DistributionMatchingObjective(
        config, student=policy, scores=scores, critic=critic, real=None, projection=lambda x_0: x_0
    )
    whole = torch.zeros(batch_size, dtype=torch.int64, device=problem.device)
    prompts = problem.encoder.encode(["a photo of a bag"] * batch_size)
    scales = torch.full((batch_size,), GUIDANCE, device=problem.device)

    def update() -> None:
        x_t = torch.randn(batch_size, *problem.teacher.latent_shape, device=problem.device)
        batch = train_batch(x_t, whole, prompts, scales, None, whole.to(torch.uint8), whole - 1, whole)
        for phase in objective.phases(0):
            train_only(networks, phase.role)
            phase.loss(batch).loss.backward()
            optimizers[phase.role].step()
            optimizers[phase.role].zero_grad()

    return update


def their_update(problem: ImitationProblem, batch_size: int) -> Step | None:
    """The same by `DMDPipeline`; None without it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from modelopt.torch.fastgen import DMDConfig, DMDPipeline
    except ImportError:
        return None

    class Called(nn.Module):
        """A U-Net under the names that the pipeline calls networks by."""

        def __init__(self, unet: nn.Module) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            output: Tensor = self.unet(hidden_states, timestep, encoder_hidden_states, return_dict=False)[0]
            return output

    networks = {role: Called(network) for role, network in networks_of(problem).items()}
    optimizers = optimizers_of(dict(networks))
    settings = {"num_train_timesteps": 1000, "fake_score_pred_type": "eps", "guidance_scale": GUIDANCE}
    pipeline: Any = DMDPipeline(
        networks[STUDENT], Called(problem.teacher.unet), networks[FAKE_SCORE], DMDConfig(pred_type="eps", **settings)
    )
    prompts = problem.encoder.encode(["a photo of a bag"] * batch_size).embeddings
    null = problem.encoder.encode([""] * batch_size).embeddings

    def update() -> None:
        shape = (batch_size, *problem.teacher.latent_shape)
        latents, noise = torch.zeros(shape, device=problem.device), torch.randn(shape, device=problem.device)
        train_only(dict(networks), STUDENT)
        losses = pipeline.compute_student_loss(latents, noise, prompts, negative_encoder_hidden_states=null)
        losses["total"].backward()
        optimizers[STUDENT].step()
        optimizers[STUDENT].zero_grad()
        train_only(dict(networks), FAKE_SCORE)
        pipeline.compute_fake_score_loss(latents, noise, prompts)["total"].backward()
        optimizers[FAKE_SCORE].step()
        optimizers[FAKE_SCORE].zero_grad()

    return update


def timed(step: Step, device: torch.device) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the medians, and the ratio of ours to theirs, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.objectives", description=__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    device = default_device()
    torch.manual_seed(0)
    problem = problem_of(device)
    steps = {"ours": our_update(problem, options.batch_size), "fastgen": their_update(problem, options.batch_size)}
    seconds: dict[str, list[float]] = {name: [] for name, step in steps.items() if step is not None}
    for number in tqdm(range(options.rounds + 2), desc="rounds"):
        for name in seconds:
            step = steps[name]
            assert step is not None
            taken = timed(step, device)
            if number >= 2:  # the first two warm up
                seconds[name].append(taken)
    medians = {name: round(1000 * statistics.median(values), 2) for name, values in seconds.items()}
    best = {name: round(1000 * min(values), 2) for name, values in seconds.items()}
    ratio = round(medians["ours"] / medians["fastgen"], 3) if "fastgen" in medians else None
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(device)
                if device.type == "cuda"
                else f"{torch.get_num_threads()} CPU",
                "batch_size": options.batch_size,
                "rounds": options.rounds,
                "median_ms": medians,
                "best_ms": best,
                "ratio_of_medians": ratio,
            }
        )
    )


if __name__ == "__main__":
    main()
