"""Every error that `ddil_dist` raises on purpose, in one small tree.

DdilError
├── ConfigError              what the user wrote cannot be run (exit code 2)
├── EnvironmentFailure       the machine, cluster or server cannot run it (exit code 2)
├── WaitTimeoutError         a peer did not answer before the deadline
├── ReplayError
│   ├── RecordError          a replay record is malformed; it is counted and skipped
│   └── ReplayFullError      the server has no room and none appeared before the deadline
├── OutOfMemoryError         a batch does not fit on its device
├── WeightsError             published weights are torn, mismatched or gone
├── EvaluationStoppedError   a person ended an evaluation before it was whole (exit code 3)
├── CheckpointError          a checkpoint is damaged or belongs to another run
├── ExportError              an exported pipeline is not the student that was trained
├── DataError                a data set has nothing usable
└── DivergenceError          the loss or a gradient is not finite

A message says what was found, the rule, and the remedy. `assert` is for our own bugs.
"""

from __future__ import annotations


class DdilError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(DdilError, ValueError):
    """The configuration breaks a rule: names the key, the value, the rule and the remedy."""


class EnvironmentFailure(DdilError, RuntimeError):  # noqa: N818 - EnvironmentError is Python's own
    """Something outside the configuration is missing: a server, a resource, a directory, a password."""


class WaitTimeoutError(DdilError, TimeoutError):
    """A wait reached its deadline: names who waited, for whom, how long, and the next step."""


class ReplayError(DdilError):
    """Base of the replay buffer's errors."""


class RecordError(ReplayError, ValueError):
    """A replay record is truncated, of a newer schema, of a wrong type, or absurd in size."""


class ReplayFullError(ReplayError, WaitTimeoutError):
    """The replay server stayed full until the deadline."""


class OutOfMemoryError(DdilError, MemoryError):
    """A batch does not fit into the memory of the device that it was meant for."""


class WeightsError(DdilError):
    """Published weights are torn, do not fit the network, or are gone."""


class EvaluationStoppedError(DdilError):
    """An evaluation was ended by a person: names what it has not measured, and how to go on."""


class CheckpointError(DdilError):
    """A checkpoint is damaged, incomplete, or does not fit the configuration."""


class ExportError(DdilError):
    """An exported pipeline, run by stock diffusers, does not make the student's latents."""


class DataError(DdilError, ValueError):
    """A data set is missing, unreadable, or has nothing usable in it."""


class DivergenceError(DdilError, ArithmeticError):
    """Training produced a value that is not finite: names the loss, the update and the last good checkpoint."""
