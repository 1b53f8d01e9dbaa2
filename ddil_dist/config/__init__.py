"""The configuration of a run: frozen, typed, checked before any work starts. Imports no torch.

A run's configuration is a YAML file plus `key=value` overrides; OmegaConf merges them, the models here validate
them. With neither, it is the embedded default. Every model rejects unknown keys; `loading` turns each problem
into one line that names the key, the value, the rule and, for a misspelt key, the nearest valid one.
"""

from ddil_dist.config.curriculum import CurriculumConfig
from ddil_dist.config.data import BUILTIN, DataConfig
from ddil_dist.config.deadlines import Deadlines
from ddil_dist.config.evaluation import EvaluationConfig
from ddil_dist.config.learner import KeepBestConfig, LearnerConfig, OptimizerConfig
from ddil_dist.config.loading import changes, dump_config, load_config, parse_config, resolve_stages
from ddil_dist.config.priors import PriorConfig, PriorPart
from ddil_dist.config.replay import RedisConfig, ReplayConfig
from ddil_dist.config.rollout import AutoscaleConfig, RolloutConfig
from ddil_dist.config.run import RunConfig, RunSection
from ddil_dist.config.student import LoraConfig, StudentConfig
from ddil_dist.config.teacher import GuidanceRange, TeacherConfig
from ddil_dist.config.thresholding import (
    DynamicThresholding,
    NoThresholding,
    ReflectThresholding,
    StaticThresholding,
    Thresholding,
)

__all__ = [
    "BUILTIN",
    "AutoscaleConfig",
    "CurriculumConfig",
    "DataConfig",
    "Deadlines",
    "DynamicThresholding",
    "EvaluationConfig",
    "GuidanceRange",
    "KeepBestConfig",
    "LearnerConfig",
    "LoraConfig",
    "NoThresholding",
    "OptimizerConfig",
    "PriorConfig",
    "PriorPart",
    "RedisConfig",
    "ReflectThresholding",
    "ReplayConfig",
    "RolloutConfig",
    "RunConfig",
    "RunSection",
    "StaticThresholding",
    "StudentConfig",
    "TeacherConfig",
    "Thresholding",
    "changes",
    "dump_config",
    "load_config",
    "parse_config",
    "resolve_stages",
]
