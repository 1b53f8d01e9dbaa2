"""What a network predicts (eps, v or x_0), and the way between. x_t = alpha x_0 + sigma eps, v = alpha eps - sigma x_0.

All tensors [B, C, H, W]; alpha, sigma broadcast as [B, 1, 1, 1] float32 (Salimans & Ho 2022, Appendix D).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


def x_0_from_prediction(
    prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, *, prediction_type: PredictionType
) -> Tensor:
    """The x_0 that a network's output at x_t implies."""
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction) / alpha
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * prediction
    return prediction


def prediction_from_x_0(
    x_0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, *, prediction_type: PredictionType
) -> Tensor:
    """The output that a network of this type would have to give for x_0 at x_t; sigma > 0 except for "sample"."""
    if prediction_type == "epsilon":
        return eps_from_x_0(x_0, x_t, alpha, sigma)
    if prediction_type == "v_prediction":
        return v_from_x_0(x_0, x_t, alpha, sigma)
    return x_0


def eps_from_x_0(x_0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """eps = (x_t - alpha x_0) / sigma; sigma > 0."""
    return (x_t - alpha * x_0) / sigma


def v_from_x_0(x_0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = alpha eps - sigma x_0 = (alpha x_t - x_0) / sigma; sigma > 0."""
    return (alpha * x_t - x_0) / sigma
