"""Distribution matching distillation: DMD2 (Yin et al. 2024), and what DMD (Yin et al. 2023) shares with it.

Defaults are the original papers'. Where implementations disagree, the choice is a key, and the original's value its
default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import Field, model_validator

from ddil_dist.methods.base import Method, check_no_labels, check_whole_substeps
from ddil_dist.section import NonNegative, Positive, Probability, Section

if TYPE_CHECKING:
    from ddil_dist.config import RunConfig
    from ddil_dist.models.scheduler import Sampler

FAKE_SCORE: Final = "fake_score"
"""The role of the critic, which learns the score of the student's samples."""


class Gan(Section):
    """The discriminator of distribution matching: a head on a U-Net's bottleneck (Yin et al. 2024, DMD2)."""

    generator_weight: NonNegative = Field(5e-3, description="of softplus(-D(fake)) in the generator's loss")
    critic_weight: NonNegative = Field(1e-2, description="of the discriminator's loss beside the critic's")
    features: Literal["fake_score", "teacher"] = Field(
        "fake_score", description="whose bottleneck: the critic's, trained with the head, or the frozen teacher's"
    )
    max_timestep: Probability = Field(1.0, description="inputs are noised to t in [0, this) T; 0: not noised")


class DistributionMatching(Method):
    """What DMD and DMD2 share: the gradient between real and fake scores, and the critic that learns the fake one."""

    min_timestep: Probability = Field(0.02, description="share of T; the gradient's noise level is drawn above it")
    max_timestep: Probability = Field(0.98, description="share of T; the gradient's noise level is drawn up to it")
    outside_weight: NonNegative = Field(
        1.0,
        description="of the generated samples' mean squared distance from the support that thresholding assumes, in "
        "the generator's loss; stock pipelines may not hold a student there, so it must learn to stay",
    )
    critic: Literal["every", "alternating"] = Field(
        "every", description="the critic learns in every update, or in those alone where the generator does not"
    )
    critic_target: Literal["prediction", "epsilon", "v_prediction", "sample"] = Field(
        "prediction", description="space of the critic's denoising loss; prediction: what its network predicts"
    )

    @model_validator(mode="after")
    def _levels_ordered(self) -> DistributionMatching:
        if self.min_timestep >= self.max_timestep:
            raise ValueError(f"min_timestep ({self.min_timestep:g}) must be under max_timestep ({self.max_timestep:g})")
        return self

    @property
    def roles(self) -> tuple[str, ...]:
        return (FAKE_SCORE,)


class Dmd2(DistributionMatching):
    """DMD2 (Yin et al. 2024): few steps, no teacher pairs, two time scales, a discriminator."""

    title: ClassVar[str] = "distribution matching distillation (DMD2)"
    losses: ClassVar[str] = "learner.methods.distribution_matching"
    sampler: ClassVar[Sampler] = "renoising"
    uses_labels: ClassVar[bool] = False
    projects_student: ClassVar[bool] = True

    type: Literal["distribution_matching"] = Field("distribution_matching", description="DMD2")
    generator_every: Positive = Field(5, description="updates of the critic to one of the generator")
    gan: Gan | None = Field(Gan(), description="the discriminator; null: none")
    generator_input: Literal["backward_simulation", "prior"] = Field(
        "backward_simulation",
        description="the generator's x_t: its own x_0 noised afresh down the grid, or the state that the prior drew "
        "(DDIL: mixed rollouts)",
    )

    @model_validator(mode="after")
    def _both_learn(self) -> Dmd2:
        if self.critic == "alternating" and self.generator_every == 1:
            raise ValueError("critic: 'alternating' with generator_every = 1 would never train the critic; raise it")
        return self

    def check(self, config: RunConfig) -> None:
        check_whole_substeps(config)
        check_no_labels(config)
        if self.makes_inputs and any(part.forward < 1 for part in config.prior.parts):
            raise ValueError(
                "objective.generator_input: 'backward_simulation' makes its own inputs and would never look at the "
                "rollouts that prior.parts wants; set generator_input=prior, or prior.parts=[{until: 1, forward: 1, "
                "student: 0, teacher: 0}]"
            )

    @property
    def uses_images(self) -> bool:
        return self.gan is not None

    @property
    def makes_inputs(self) -> bool:
        return self.generator_input == "backward_simulation"
