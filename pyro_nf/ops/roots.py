"""Roots of increasing functions, elementwise, with derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Bisection alone gains a bit each step, so this is enough for a float64 of any exponent in reach;
# Newton's steps make most solves end after less than ten.
MAX_ITERATIONS = 200
# The stated tolerance: how far, in units of rounding of the larger of |target| and 1, the value at
# the root may be from the target.
TOLERANCE_ULPS = 64.0


def solve_increasing(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    target: Tensor,
    lower: Tensor,
    upper: Tensor,
    owner: str,
) -> Tensor:
    r"""Solves :math:`f(a) = t` elementwise for an increasing ``f`` with a known bracket.

    Newton's step is taken where it stays inside the bracket, bisection elsewhere. Two more Newton
    steps then run under autograd: by the implicit function theorem the first makes the first
    derivatives of the root right, the second makes those up to the third order right.

    Args:
        function: Returns ``f(a)`` and its slope ``f'(a) > 0``, both of the shape of ``a``.
        target: The wanted value ``t``.
        lower: A point with ``f(lower) <= t``.
        upper: A point with ``f(upper) >= t``.
        owner: Who asks, for the message.

    Raises:
        RuntimeError: If a root is not found to the tolerance.
    """
    with torch.no_grad():
        low, high = torch.broadcast_tensors(lower, upper)
        root = (low + high) / 2
        tolerance = TOLERANCE_ULPS * torch.finfo(target.dtype).eps * target.abs().clamp_min(1.0)
        for _ in range(MAX_ITERATIONS):
            value, slope = function(root)
            excess = value - target
            done = excess.abs() <= tolerance
            if bool(done.all()):
                break
            low = torch.where(excess < 0, root, low)
            high = torch.where(excess > 0, root, high)
            newton = root - excess / slope
            good = (newton > low) & (newton < high) & newton.isfinite()
            step = torch.where(good, newton, (low + high) / 2)
            root = torch.where(done, root, step)
        else:
            # A bracket that has shrunk to neighbouring floats cannot be improved either.
            if not bool(
                (
                    done
                    | ((high - low) <= 4 * torch.finfo(root.dtype).eps * root.abs().clamp_min(1.0))
                ).all()
            ):
                raise RuntimeError(
                    f"{owner}: the numeric inverse did not converge: after {MAX_ITERATIONS} steps "
                    f"the largest residual is {excess.abs().max().item():.3g}, wanted "
                    f"{tolerance.min().item():.3g}. Check the input for NaN or inf, or use float64."
                )
    for _ in range(2):
        value, slope = function(root)
        root = root - (value - target) / slope
    return root
