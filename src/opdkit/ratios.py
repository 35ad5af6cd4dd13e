"""Probability ratios between two policies: formed from log-probs, and clipped as PPO does.

Axes: any; ratio and signal have the same shape. Left out: what a ratio weighs (`opdkit.losses`, `opdkit.weights`).
"""

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # nats; verl's limit before a log ratio is exponentiated


def ratio(logp: Tensor, old: Tensor) -> Tensor:
    """p / p_old, differentiable in `logp`; beyond LOG_RATIO_LIMIT either way it is constant."""
    return (logp - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped(r: Tensor, signal: Tensor, low: float | None, high: float | None, dual: float | None) -> Tensor:
    """The ratio that counts: at most 1 + high where the signal is positive; from 1 - low to `dual` elsewhere.

    Signal x this is min(r A, clip(r) A), for A < 0 at least dual x A; its gradient is 0 beyond each bound.
    """
    rising = r if high is None else r.clamp(max=1 + high)
    falling = r if low is None else r.clamp(min=1 - low)
    return torch.where(signal > 0, rising, falling if dual is None else falling.clamp(max=dual))


def check_clip(low: float | None, high: float | None, dual: float | None) -> None:
    """Raise ValueError for bounds of a clip that cannot bind, or would bind at ratio 1."""
    if low is not None and not 0 < low < 1:
        raise ValueError(
            f"low = {low} must lie strictly between 0 and 1: a ratio is clipped below 1 - low; None is open"
        )
    if high is not None and high <= 0:
        raise ValueError(f"high = {high} must be positive: a ratio is clipped above 1 + high; None is open")
    if dual is not None and dual <= 1:
        raise ValueError(
            f"dual = {dual} must be above 1: it bounds the ratio where the signal is negative; None is open"
        )
