"""What a running run is: its configuration and its code. A launcher that finds it alive checks that it is its own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ddil_dist.config import RunConfig, dump_config
from ddil_dist.errors import ConfigError

PACKAGES = ("ddil_dist", "actors", "learner")


@dataclass(frozen=True)
class RunIdentity:
    """config: the resolved configuration as YAML, without secrets. code: digest of the packages' source."""

    config: str
    code: str

    @classmethod
    def of(cls, config: RunConfig) -> RunIdentity:
        """The identity that a run of `config` with the code at hand has."""
        return cls(dump_config(config), code_digest())

    def check_same(self, living: RunIdentity, run: str) -> None:
        """Raises ConfigError where the living run is another."""
        remedy = f"stop it with python -m ddil_dist.stop --run {run} and launch again, or choose another run.name"
        if self.code != living.code:
            raise ConfigError(f"run.name: {run!r} is going on with other code than this; {remedy}")
        if self.config != living.config:
            was, now = living.config.splitlines(), self.config.splitlines()
            changed = "; ".join(line.strip() for line in now if line not in was) or "keys left out"
            raise ConfigError(f"run.name: {run!r} is going on with another configuration ({changed}); {remedy}")


def code_digest() -> str:
    """Digest of every Python and Lua file of the packages."""
    root = Path(__file__).parents[2]
    digest = hashlib.blake2b(digest_size=16)
    for package in PACKAGES:
        for path in sorted([*(root / package).rglob("*.py"), *(root / package).rglob("*.lua")]):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
