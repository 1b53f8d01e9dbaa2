"""Latents at rest: their bytes are the tensor's, in every dtype, and nobody else's."""

from __future__ import annotations

import pytest
import torch

from ddil_dist.latents import to_latent, to_latents, to_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_come_back_as_they_were_and_share_no_memory(dtype: torch.dtype) -> None:
    batch = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = batch.clone()
    rest = to_latents(batch[:, :, :, :1].transpose(2, 3))
    batch.zero_()
    for latent, row in zip(rest, wanted, strict=True):
        assert latent.dtype == str(dtype).removeprefix("torch.")
        assert latent.array.nbytes == row[:, :, :1].nbytes
        assert latent.array.base is None, "a row does not keep its batch in memory"
        assert torch.equal(to_tensor(latent.array, latent.dtype), row[:, :, :1].transpose(1, 2))
    assert torch.equal(to_tensor(to_latent(wanted[1]).array, rest[1].dtype), wanted[1])
