"""The run's directory: where it is, what it was started with, and whether the present configuration may go on in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ddil_dist.config import BUILTIN, RunConfig, changes, dump_config, load_config, parse_config
from ddil_dist.data.places import is_pattern, local
from ddil_dist.errors import ConfigError
from ddil_dist.locks import TRAINING_LOCK, hold_lock
from ddil_dist.runs import CONFIG_FILE, base_directory
from ddil_dist.status import own_run

FIXED_SECTIONS = ("teacher", "student", "thresholding", "objective", "data")
"""What the states in replay and the weights in checkpoints were made under: a resumed run cannot change it."""
FIXED_KEYS = (("run", "seed"), ("rollout", "labels"), ("learner", "batch_size"))


PATHS = (
    ("data", "prompts"),
    ("data", "cache"),
    ("data", "download"),
    ("redis", "password_file"),
    ("evaluation", "inception"),
    ("evaluation", "hps"),
)
"""Keys that hold a path of the launcher's, if anything."""


def settle_paths(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths, so that every process of the run means the same files."""
    raw = config.model_dump(mode="json")
    raw["run"]["directory"] = str(base_directory() / config.run.directory.expanduser())
    if Path(config.teacher.pipeline).is_dir():
        raw["teacher"]["pipeline"] = str(Path(config.teacher.pipeline).resolve())
    place = local(config.data.path)
    if config.data.path != BUILTIN and (Path(place).exists() or is_pattern(place)):
        raw["data"]["path"] = str(Path(place).resolve())
    for section, key in PATHS:
        if raw[section][key] is not None:
            raw[section][key] = str(Path(raw[section][key]).expanduser().resolve())
    return parse_config(raw)


@contextmanager
def prepared_run(config: RunConfig) -> Iterator[None]:
    """The run's directory, this process's alone for as long as the block lasts, with the configuration written down.

    Raises ConfigError if another process holds it, or naming every key that a resumed run cannot change.
    """
    path = config.run.path / CONFIG_FILE
    with own_run(config.run.path):
        if path.is_file():
            before = load_config(path)
            _check_resumable(before, config)
            _tell_changes(before, config)
        (config.run.path / ".rayignore").write_text("*\n", encoding="utf-8")  # no job takes a run's files along
        with suppress(ConfigError), hold_lock(config.run.path, TRAINING_LOCK):  # else it describes one that is going on
            staged = path.with_suffix(".partial")
            try:
                staged.write_text(dump_config(config), encoding="utf-8")
                staged.replace(path)
            finally:
                staged.unlink(missing_ok=True)
        yield


def _tell_changes(before: RunConfig, now: RunConfig) -> None:
    """Say what a resumed run goes on with that is not as it was; Redis's section may hold a password."""
    old, new = (config.model_dump(mode="json", exclude={"redis"}) for config in (before, now))
    for key, was, wanted in changes(old, new):
        print(f"ddil_dist: {key} was {was!r} so far, and is {wanted!r} from now on")


def _check_resumable(before: RunConfig, now: RunConfig) -> None:
    problems = []
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    keys = [(section, key) for section in FIXED_SECTIONS for key in old[section].keys() | new[section].keys()]
    for section, key in sorted(keys) + list(FIXED_KEYS):
        was, wanted = old[section].get(key), new[section].get(key)
        if was != wanted:
            problems.append(
                f"{section}.{key}: the run in {now.run.path} was started with {was!r} and cannot go on with "
                f"{wanted!r}; set it back, or choose another run.name"
            )
    for role in sorted({"student", *before.learner.optimizers, *now.learner.optimizers}):
        kind, other = before.learner.optimizer_of(role).type, now.learner.optimizer_of(role).type
        if kind != other:
            problems.append(
                f"learner.optimizer.type: the {role} of the run in {now.run.path} was trained by {kind!r}, whose state "
                f"{other!r} cannot take up; set it back, or choose another run.name"
            )
    if problems:
        raise ConfigError("\n".join(problems))
