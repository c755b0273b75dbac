"""The rational-quadratic spline as a pure function of its knots."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# No bin may be thinner than this share of the interval, and no slope flatter than this: both keep
# the inverse well conditioned.
MIN_BIN = 1e-3
MIN_SLOPE = 1e-3
# softplus(SLOPE_AT_ZERO) = 1 - MIN_SLOPE, so that a raw slope of 0 is a slope of 1.
SLOPE_AT_ZERO = math.log(math.expm1(1 - MIN_SLOPE))


class Bin(NamedTuple):
    """The bin that a point falls into: its corner, width, height and the slopes at its ends."""

    x0: Tensor
    y0: Tensor
    w: Tensor
    h: Tensor
    d0: Tensor
    d1: Tensor


def find_bin(
    value: Tensor, raw_sizes: Tensor, raw_slopes: Tensor, low: float, high: float, axis: int
) -> Bin:
    """Finds the bin of each ``value`` among the knots on one axis.

    Args:
        value: Points inside ``(low, high)``, shape ``(...)``.
        raw_sizes: Unconstrained widths and heights, shape ``(2, K, ...)``: bins come first, so that
            each is one piece of memory.
        raw_slopes: Unconstrained slopes at all knots, shape ``(K + 1, ...)``.
        low: Left end of the interval, on both axes.
        high: Right end of the interval, on both axes.
        axis: 0 to compare with the knots on the x axis, 1 with those on the y axis.
    """
    count_bins = raw_sizes.shape[1]
    scale = 1 - MIN_BIN * count_bins
    shares = raw_sizes.softmax(1)
    sums = shares.cumsum(1)
    # value >= knot j, solved for the running sum at j: all knots need no other arithmetic
    least = torch.arange(1, count_bins, dtype=value.dtype, device=value.device) * (MIN_BIN / scale)
    unit = (value - low) / ((high - low) * scale)
    k = (unit - least.reshape(-1, *(1,) * value.dim()) >= sums[axis, :-1]).sum(0, keepdim=True)
    both = k.expand(2, 1, *value.shape)
    w, h = (high - low) * (MIN_BIN + scale * shares.gather(1, both).squeeze(1))
    x1, y1 = low + (high - low) * (MIN_BIN * (k + 1) + scale * sums.gather(1, both).squeeze(1))
    raw = raw_slopes.gather(0, torch.cat((k, k + 1)))
    d0, d1 = MIN_SLOPE + F.softplus(raw + SLOPE_AT_ZERO)
    return Bin(x1 - w, y1 - h, w, h, d0, d1)


def forward_in_bin(x: Tensor, bin: Bin) -> tuple[Tensor, Tensor]:
    r"""Evaluates the spline, with :math:`\xi = (x - x_0) / w` and :math:`s = h / w`.

    .. math:: y = y_0 + h \frac{s \xi^2 + d_0 \xi (1 - \xi)}{s + (d_0 + d_1 - 2 s) \xi (1 - \xi)}
    """
    x0, y0, w, h, d0, d1 = bin
    s, xi = h / w, (x - x0) / w
    u = xi * (1 - xi)
    y = y0 + h * (s * xi * xi + d0 * u) / (s + (d0 + d1 - 2 * s) * u)
    return y, _log_slope(xi, s, d0, d1)


def inverse_in_bin(y: Tensor, bin: Bin) -> tuple[Tensor, Tensor]:
    r"""Solves the quadratic :math:`a \xi^2 + b \xi + c = 0`; the ladj is that of the inverse."""
    x0, y0, w, h, d0, d1 = bin
    s, v = h / w, y - y0
    t = v * (d0 + d1 - 2 * s)
    a, b, c = h * (s - d0) + t, h * d0 - t, -s * v
    root = (b * b - 4 * a * c).clamp_min(torch.finfo(y.dtype).tiny).sqrt()
    xi = 2 * c / (-b - root)  # the form that does not cancel when a is near 0
    return x0 + w * xi, -_log_slope(xi, s, d0, d1)


def _log_slope(xi: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    r"""log dy/dx = log [s^2 (d1 xi^2 + 2 s xi (1 - xi) + d0 (1 - xi)^2) / (s + (...) u)^2]."""
    u = xi * (1 - xi)
    top = s * s * (d1 * xi * xi + 2 * s * u + d0 * (1 - xi) * (1 - xi))
    return top.log() - 2 * (s + (d0 + d1 - 2 * s) * u).log()
