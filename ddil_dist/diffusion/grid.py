"""Which timesteps the student visits, and the teacher's substeps between them. The grid is data, not a convention.

diffusers' schedulers mean different grids by one word, and a student is only as good as the grid it is run on; so
the grid is computed here, travels with the student, and the exported scheduler must reproduce it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ddil_dist.errors import ConfigError
from ddil_dist.types import FINAL_TIMESTEP

Spacing = Literal["linspace", "trailing", "leading"]


def timestep_grid(num_steps: int, *, spacing: Spacing, num_train_timesteps: int = 1000) -> tuple[int, ...]:
    """`num_steps` descending training timesteps, those of DPM-Solver++ in diffusers under the same spacing.

    linspace: linspace(0, T - 1, N + 1) rounded, last dropped: 999, 749, 500, 250 for N = 4.
    trailing: T, T - T/N, ... rounded, less one: 999, 749, 499, 249 for N = 4.
    leading:  multiples of T // (N + 1), plus one: 801, 601, 401, 201 for N = 4.
    Raises ConfigError for more steps than half of T: neighbours could coincide.
    """
    if not 1 <= num_steps <= num_train_timesteps // 2:
        raise ConfigError(
            f"teacher.steps: {num_steps} steps; must be 1 to {num_train_timesteps // 2}, half of the timesteps that "
            "the teacher was trained on"
        )
    if spacing == "linspace":
        points = np.linspace(0, num_train_timesteps - 1, num_steps + 1).round()[::-1][:-1]
    elif spacing == "leading":
        points = np.linspace(num_steps, 1, num_steps) * (num_train_timesteps // (num_steps + 1)) + 1
    else:
        points = np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps).round()[:num_steps] - 1
    return tuple(int(point) for point in points)


@dataclass(frozen=True)
class TrajectoryGrid:
    """The student's timesteps and, within each of its steps, the teacher's.

    student:  N descending timesteps.
    teacher:  N rows of K + 1 timesteps: row i begins at student[i] and ends at student[i + 1], the last row at
              FINAL_TIMESTEP. One student step equals the K teacher steps of its row.
    """

    student: tuple[int, ...]
    teacher: tuple[tuple[int, ...], ...]

    @classmethod
    def create(
        cls, student_steps: int, teacher_steps: int, *, spacing: Spacing, num_train_timesteps: int = 1000
    ) -> TrajectoryGrid:
        """Both grids under one spacing; teacher_steps must be a multiple of student_steps."""
        assert teacher_steps % student_steps == 0
        substeps = teacher_steps // student_steps
        student = timestep_grid(student_steps, spacing=spacing, num_train_timesteps=num_train_timesteps)
        if spacing == "leading":  # its finer grids do not hold the points of its coarser ones
            return cls.through(student, substeps)
        fine = timestep_grid(teacher_steps, spacing=spacing, num_train_timesteps=num_train_timesteps)
        # A real that ends in .5, such as 499.5, may round up on one grid and down on the other. The student's point
        # stands: the scheduler that it is exported with reproduces it.
        points = [student[i // substeps] if i % substeps == 0 else t for i, t in enumerate(fine)]
        points.append(FINAL_TIMESTEP)
        return cls(student, tuple(tuple(points[i : i + substeps + 1]) for i in range(0, teacher_steps, substeps)))

    @classmethod
    def through(cls, student: Sequence[int], substeps: int) -> TrajectoryGrid:
        """The student's points as given, descending, with `substeps` teacher steps spread evenly between neighbours.

        Raises ConfigError where two points have fewer timesteps between them than the teacher has substeps.
        """
        rows = []
        for t, s in itertools.pairwise((*student, FINAL_TIMESTEP)):
            if not t - s >= substeps:
                raise ConfigError(
                    f"teacher.steps: {substeps} teacher steps do not fit between the student's timesteps {t} and "
                    f"{max(s, 0)}; lower teacher.steps"
                )
            rows.append(tuple(int(point) for point in np.linspace(t, s, substeps + 1).round()))
        return cls(tuple(student), tuple(rows))

    @property
    def num_steps(self) -> int:
        return len(self.student)

    @property
    def substeps(self) -> int:
        """K, teacher steps in one student step."""
        return len(self.teacher[0]) - 1

    def next_timestep(self, step_index: int) -> int:
        """Where the student's step at `step_index` ends."""
        return self.teacher[step_index][-1]

    def teacher_table(self) -> Tensor:
        """[N, K + 1] int64, `teacher` for gathering by step index."""
        return torch.tensor(self.teacher, dtype=torch.int64)

    def step_index(self, t: Tensor) -> Tensor:
        """Positions on the student grid, [B] int64, of timesteps t [B]; every t must be on the grid."""
        index = (t.unsqueeze(1) == torch.tensor(self.student, device=t.device)).int()
        assert bool((index.sum(1) == 1).all()), "a timestep is not on the student grid"
        return index.argmax(1)
