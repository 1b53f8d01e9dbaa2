"""Distribution matching beside NVIDIA's, `modelopt.torch.fastgen`; skipped where it is not installed (`peers`)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from learner.methods.distribution_matching import matching_gradient


@pytest.fixture(scope="module")
def losses() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of versions that it was not tested with
        return pytest.importorskip("modelopt.torch.fastgen.losses", exc_type=ImportError)


def triple() -> tuple[Tensor, Tensor, Tensor]:
    """Generated x, and the x_0 of teacher and critic at it."""
    generator = torch.Generator().manual_seed(0)
    x, real, fake = (torch.randn(5, 4, 8, 8, generator=generator) for _ in range(3))
    return x, real * torch.tensor([0.1, 1, 2, 5, 10]).view(-1, 1, 1, 1), fake


def test_loss_and_gradient_of_the_generator(losses: Any) -> None:
    x, real, fake = triple()
    theirs = x.clone().requires_grad_()
    wanted = losses.vsd_loss(theirs, real, fake)
    wanted.backward()
    ours = x.clone().requires_grad_()
    gradient = matching_gradient(x, real, fake)
    loss = 0.5 * (ours.double() - (x.double() - gradient)).square().mean()
    loss.backward()
    # Theirs adds 1e-6 to the normaliser.
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert theirs.grad is not None
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-9)


def test_losses_of_discriminator_and_generator(losses: Any) -> None:
    fake, real = torch.linspace(-3, 2, 7), torch.linspace(-1, 4, 7)
    told_apart = (softplus(fake) + softplus(-real)).mean()
    assert told_apart.item() == pytest.approx(losses.gan_disc_loss(real.unsqueeze(1), fake.unsqueeze(1)).item())
    assert softplus(-fake).mean().item() == pytest.approx(losses.gan_gen_loss(fake.unsqueeze(1)).item())


@pytest.mark.parametrize("kind", ["eps", "x0"])
def test_the_critics_denoising_loss(losses: Any, kind: str) -> None:
    from tests.learner.support import SCHEDULE
    from tests.learner.test_distribution_matching import Affine, batch_of, scores_of

    batch, network = batch_of(6), Affine(0.2, 0.7)
    own: Any = {"eps": "epsilon", "x0": "sample"}[kind]
    torch.manual_seed(4)
    loss = scores_of(network, network, kind=own).denoising(batch.x_t, batch).mean()
    torch.manual_seed(4)
    t, noise = torch.randint(0, 1000, (6,)), torch.randn(batch.x_t.shape)
    told = 0.2 + 0.7 * SCHEDULE.add_noise(batch.x_t, noise, t)
    assert loss.item() == pytest.approx(losses.dsm_loss(kind, told, x0=batch.x_t, eps=noise).item(), rel=1e-3)
