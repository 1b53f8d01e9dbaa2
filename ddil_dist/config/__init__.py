"""The configuration of a run: frozen, typed, checked before any work starts. Imports no torch.

A run's configuration is a YAML file plus `key=value` overrides; OmegaConf merges them, the models of `sections`
validate them. With neither, it is the embedded default. Every model rejects unknown keys; `loading` turns each problem
into one line that names the key, the value, the rule and, for a misspelt key, the nearest valid one.
"""

from ddil_dist.config.curriculum import CurriculumConfig
from ddil_dist.config.loading import changes, dump_config, load_config, parse_config, resolve_stages
from ddil_dist.config.objectives import (
    ConsistencyConfig,
    DistributionMatching,
    DistributionMatchingConfig,
    DmdConfig,
    GanConfig,
    GuidanceConfig,
    Objective,
    ProgressiveConfig,
    VelocityConfig,
)
from ddil_dist.config.priors import PriorConfig, PriorPart
from ddil_dist.config.sections import (
    BUILTIN,
    AutoscaleConfig,
    DataConfig,
    Deadlines,
    DynamicThresholding,
    EvaluationConfig,
    GuidanceRange,
    LearnerConfig,
    NoThresholding,
    OptimizerConfig,
    RedisConfig,
    ReflectThresholding,
    ReplayConfig,
    RolloutConfig,
    RunConfig,
    RunSection,
    StaticThresholding,
    TeacherConfig,
    Thresholding,
)
from ddil_dist.config.student import LoraConfig, StudentConfig

__all__ = [
    "BUILTIN",
    "AutoscaleConfig",
    "ConsistencyConfig",
    "CurriculumConfig",
    "DataConfig",
    "Deadlines",
    "DistributionMatching",
    "DistributionMatchingConfig",
    "DmdConfig",
    "DynamicThresholding",
    "EvaluationConfig",
    "GanConfig",
    "GuidanceConfig",
    "GuidanceRange",
    "LearnerConfig",
    "LoraConfig",
    "NoThresholding",
    "Objective",
    "OptimizerConfig",
    "PriorConfig",
    "PriorPart",
    "ProgressiveConfig",
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
    "VelocityConfig",
    "changes",
    "dump_config",
    "load_config",
    "parse_config",
    "resolve_stages",
]
