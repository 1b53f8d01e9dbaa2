"""What feedback the student is given at a state: one section an objective, chosen by `objective.type`.

Defaults are the original papers'. Where implementations of one method disagree, the choice is a key, and the
original's value its default.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ddil_dist.config.base import NonNegative, Positive, PositiveFloat, Probability, Section

Weighting = Literal["truncated_snr", "snr_plus_one", "snr"]


class ProgressiveConfig(Section):
    """Progressive distillation: one student step equals teacher.steps / student.steps guided teacher steps."""

    type: Literal["progressive"] = Field("progressive", description="progressive distillation")
    weighting: Weighting = Field("truncated_snr", description="of the loss by signal-to-noise ratio")


class VelocityConfig(Section):
    """Velocity conversion: the student's v against the teacher's, on the teacher's own steps.

    With a range of guidance scales it conditions the student on guidance at the same time.
    """

    type: Literal["velocity"] = Field("velocity", description="conversion to v prediction")


class GuidanceConfig(Section):
    """Guidance conditioning: one call of the student against the guided teacher's two (Meng et al. 2023, stage one)."""

    type: Literal["guidance"] = Field("guidance", description="conditioning on the guidance scale")
    weighting: Weighting = Field("truncated_snr", description="of the loss by signal-to-noise ratio")


class ConsistencyConfig(Section):
    """Latent consistency distillation (Luo et al. 2023): neighbours on the solver's grid give the same x_0."""

    type: Literal["consistency"] = Field("consistency", description="latent consistency distillation")
    solver_steps: Annotated[int, Field(ge=2, le=500)] = Field(
        50, description="guided DDIM steps of the teacher's whole trajectory; 50 skip k = 20 training timesteps"
    )
    sampler_steps: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        (3, 4, 5), description="steps of a student rollout, drawn anew for each"
    )
    target: Literal["average", "online"] = Field(
        "average", description="network of the target: a moving average of the student, or itself (LCM-LoRA)"
    )
    target_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="of the average, an update")
    huber_c: PositiveFloat = Field(0.001, description="c of the pseudo-Huber loss sqrt(d^2 + c^2) - c")
    huber: Literal["element", "sample"] = Field(
        "element", description="d is a latent's element, or the distance of whole latents"
    )

    @model_validator(mode="after")
    def _on_the_grid(self) -> ConsistencyConfig:
        if 1000 % self.solver_steps:
            raise ValueError(
                f"solver_steps ({self.solver_steps}) does not divide 1000: diffusers' LCMScheduler skips whole "
                "timesteps, and would sample the student on another grid; choose a divisor such as 50"
            )
        if max(self.sampler_steps) > self.solver_steps:
            raise ValueError(
                f"sampler_steps: {max(self.sampler_steps)} exceeds solver_steps ({self.solver_steps}), the points that "
                "there are"
            )
        return self


class GanConfig(Section):
    """The discriminator of distribution matching: a head on a U-Net's bottleneck (Yin et al. 2024, DMD2)."""

    generator_weight: NonNegative = Field(5e-3, description="of softplus(-D(fake)) in the generator's loss")
    critic_weight: NonNegative = Field(1e-2, description="of the discriminator's loss beside the critic's")
    features: Literal["fake_score", "teacher"] = Field(
        "fake_score", description="whose bottleneck: the critic's, trained with the head, or the frozen teacher's"
    )
    max_timestep: Probability = Field(1.0, description="inputs are noised to t in [0, this) T; 0: not noised")


class DistributionMatching(Section):
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


class DistributionMatchingConfig(DistributionMatching):
    """DMD2 (Yin et al. 2024): few steps, no teacher pairs, two time scales, a discriminator."""

    type: Literal["distribution_matching"] = Field("distribution_matching", description="DMD2")
    generator_every: Positive = Field(5, description="updates of the critic to one of the generator")
    gan: GanConfig | None = Field(GanConfig(), description="the discriminator; null: none")
    generator_input: Literal["backward_simulation", "prior"] = Field(
        "backward_simulation",
        description="the generator's x_t: its own x_0 noised afresh down the grid, or the state that the prior drew "
        "(DDIL: mixed rollouts)",
    )

    @model_validator(mode="after")
    def _both_learn(self) -> DistributionMatchingConfig:
        if self.critic == "alternating" and self.generator_every == 1:
            raise ValueError("critic: 'alternating' with generator_every = 1 would never train the critic; raise it")
        return self


class DmdConfig(DistributionMatching):
    """DMD (Yin et al. 2023): one step, the same gradient, and regression to the teacher's own samples."""

    type: Literal["dmd"] = Field("dmd", description="DMD: one step")
    regression_weight: NonNegative = Field(0.25, description="of |x - teacher's sample from the same noise|^2")

    @model_validator(mode="after")
    def _critic_learns(self) -> DmdConfig:
        if self.critic == "alternating":
            raise ValueError("critic: 'alternating' would never train it, as DMD's generator learns in every update")
        return self


Objective = Annotated[
    ProgressiveConfig | VelocityConfig | GuidanceConfig | ConsistencyConfig | DistributionMatchingConfig | DmdConfig,
    Field(discriminator="type"),
]
