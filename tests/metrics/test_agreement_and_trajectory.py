"""Agreement and the paired trajectory error on cases counted by hand."""

from __future__ import annotations

import torch

from ddil_dist.metrics.agreement import agreements
from ddil_dist.metrics.trajectory import paired_errors, paired_trajectory_error


def test_agreement_counts_the_images_of_the_prompted_class() -> None:
    # The "class" of an image is its brightest channel.
    images = torch.zeros(5, 3, 2, 2)
    for index, channel in enumerate((0, 1, 2, 2, 1)):
        images[index, channel] = 1
    classify = lambda batch: batch.mean(dim=(2, 3))  # noqa: E731
    assert agreements(images, [0, 1, 2, 0, 0], classify, batch_size=2).tolist() == [1, 1, 1, 0, 0]


def test_paired_error_is_the_mean_square_of_the_difference() -> None:
    teacher = torch.zeros(2, 1, 2, 2)
    student = torch.zeros(2, 1, 2, 2)
    student[1] = 3.0
    student[0, 0, 0, 0] = 2.0
    assert paired_errors(student, teacher).tolist() == [1.0, 9.0]
    assert paired_trajectory_error(student, teacher) == 5.0


def test_half_precision_latents_are_compared_in_double() -> None:
    # 300^2 overflows float16.
    assert paired_trajectory_error(torch.full((1, 1, 1, 1), 300.0).half(), torch.zeros(1, 1, 1, 1).half()) == 90_000
