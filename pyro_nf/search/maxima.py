"""All maxima of a posterior that many climbs find; counts bound the search, and no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_nf.model.density import LogDensity
from pyro_nf.search.ascent import BatchedLBFGS
from pyro_nf.search.effort import Effort
from pyro_nf.search.gaussians import StudentT, curvature_scale
from pyro_nf.train.budget import Budget

# A point is a maximum if a Newton step would gain less (twice, in nats) than the first; it is
# brought to the second if that can be.
_AT_REST, _REST = 0.5, 1e-2
# Newton steps that a point may make to come to rest, and the longest in its own sds.
_POLISH, _LONGEST = 5, 3.0
# Distinct maxima, and ends in a row that may turn out to be none.
MOST_MAXIMA, _MOST_FAILURES = 32, 6
# Maxima as near as this, in squared local sds and in nats, are one.
_SAME = 1.0
# A maximum whose local mass is this much smaller (nats) than the largest is left out.
_NEGLIGIBLE = 12.0


@dataclass(frozen=True)
class Maximum:
    r"""A maximum m of the density.

    Attributes:
        near: A Student-t there with :math:`L L^\top = |-\nabla^2 \log p(m)|^{-1}`.
        log_density: :math:`\log p(m)`.
    """

    near: StudentT
    log_density: float

    @property
    def log_mass(self) -> float:
        r"""Laplace's local mass, :math:`\log p(m) + \log\det L + \frac D2 \log 2\pi`."""
        dim = len(self.near.loc)
        return self.log_density + float(self.near.log_det) + 0.5 * dim * math.log(2 * math.pi)


@dataclass(frozen=True)
class Maxima:
    """What many climbs found.

    Attributes:
        found: The distinct maxima that hold mass, by Laplace's approximation, the heaviest first.
        bare: Ends of climbs at which the density has no finite curvature, ``(N, D)``.
        unfinished: Why the search ended before its end, or "".
    """

    found: tuple[Maximum, ...]
    bare: Tensor
    unfinished: str = ""


def find_maxima(
    joint: LogDensity,
    points: Tensor,
    effort: Effort,
    *,
    least_mass: float = -math.inf,
    budget: Budget | None = None,
) -> Maxima:
    """Climbs from all points at once and tells the maxima at their ends apart.

    An end that Newton's steps bring to rest is a maximum, and all ends near it whose density is
    what its curvature predicts are the same one. The highest end that is left is tried, and one at
    random, in turns: a narrow maximum is high, and one that many climbs reach need not be.

    Args:
        joint: The log joint density.
        points: Where to start, ``(N, D)``.
        effort: How many steps they may make.
        least_mass: Log mass below which a maximum is not worth to be noted.
        budget: A bound of seconds, if there is one; without it the same points give the same
            maxima to the last bit.
    """
    budget = budget or Budget()
    if budget.is_spent():  # a climb's first look at all points may be dear
        return Maxima((), points[:0], "the seconds ended it after 0 steps of the climbs")
    ends, steps = _climb(joint, points, effort.max_steps, budget)
    maxima, bare = _distinct(joint, ends, least_mass, budget)
    unfinished = ""
    if budget.is_spent():
        unfinished = f"the seconds ended it after {steps} steps of the climbs"
    elif effort.is_cut_short:
        unfinished = f"the log joint is too dear for more than {effort.max_steps} steps of a climb"
    return Maxima(tuple(maxima), torch.stack(bare) if bare else points[:0], unfinished)


def _distinct(
    joint: LogDensity, ends: _Ends, least_mass: float, budget: Budget
) -> tuple[list[Maximum], list[Tensor]]:
    """The maxima among the ends of climbs, and ends without a curvature."""
    z, value = ends.z, ends.value
    near = max(9.0, 2.0 * z.shape[-1])
    left, maxima, bare = value.isfinite(), list[Maximum](), list[Tensor]()
    luck = torch.rand(len(z)).to(value)
    failures = {"highest": 0, "any": 0}
    while not budget.is_spent():
        going = [way for way, count in failures.items() if count < _MOST_FAILURES]
        if len(maxima) >= MOST_MAXIMA or not going or not bool(left.any()):
            break
        for way in going:
            calm = left & (ends.gain < _AT_REST)  # those first whose climb came to rest
            candidates = calm if bool(calm.any()) else left
            order = value if way == "highest" else luck
            i = int(torch.where(candidates, order, -torch.inf).argmax())
            left[i] = False
            scale, maximum = _polished(joint, z[i], ends.grad[i], float(value[i]))
            if scale is None:
                bare.append(z[i])
            if maximum is None or maximum.log_mass < least_mass:
                failures[way] += 1
                continue
            distance = maximum.near.distance(z)
            # At another maximum the density is higher than the curvature here predicts.
            gap = (value - (maximum.log_density - 0.5 * distance)).abs()
            left &= ~((distance < near) & (gap < 1 + 0.1 * distance))
            if any(_are_same(maximum, other) for other in maxima):
                failures[way] += 1
            else:
                failures[way] = 0
                maxima.append(maximum)
    maxima.sort(key=lambda m: -m.log_mass)
    return [m for m in maxima if m.log_mass > maxima[0].log_mass - _NEGLIGIBLE], bare


def _are_same(one: Maximum, other: Maximum) -> bool:
    """By squared distance under the curvature of the second, and by value."""
    distance = float(other.near.distance(one.near.loc.unsqueeze(0)))
    return distance < _SAME and abs(one.log_density - other.log_density) < _SAME


def _polished(
    joint: LogDensity, z: Tensor, grad: Tensor, value: float
) -> tuple[Tensor | None, Maximum | None]:
    """Newton's steps from the end of a climb: the scale there, and the maximum if there is one."""
    scale = curvature_scale(joint, z)
    for _ in range(_POLISH):
        if scale is None:
            return None, None
        white = scale * grad if scale.dim() == 1 else scale.mT @ grad
        decrement = float(white.square().sum())
        if decrement < _REST:
            return scale, Maximum(StudentT(z, scale), value)
        step = scale * white if scale.dim() == 1 else scale @ white
        step = step * min(1.0, _LONGEST / math.sqrt(decrement))
        tries = z + z.new_tensor([1.0, 0.3, 0.1, 0.03]).unsqueeze(-1) * step
        values, grads = joint.value_and_grad(tries)
        best = int(values.argmax())
        if not float(values[best]) > value:
            break
        z, grad, value = tries[best], grads[best], float(values[best])
        scale = curvature_scale(joint, z)
    if scale is None or decrement >= _AT_REST:
        return scale, None
    return scale, Maximum(StudentT(z, scale), value)


@dataclass(frozen=True)
class _Ends:
    """Where climbs ended: points (N, D), densities, gradients, and what is left to gain (N,)."""

    z: Tensor
    value: Tensor
    grad: Tensor
    gain: Tensor


def _climb(joint: LogDensity, z: Tensor, max_steps: int, budget: Budget) -> tuple[_Ends, int]:
    """The ends of climbs from all points, of which none is left behind, and the steps made."""
    climb, index = BatchedLBFGS(joint.value_and_grad, z), torch.arange(len(z)).to(z.device)
    ends = _Ends(z.clone(), climb.value.clone(), climb.grad.clone(), climb.expected_gain)
    steps = 0
    while steps < max_steps and not bool(climb.done.all()) and not budget.is_spent():
        climb.step()
        steps += 1
        ends.z[index], ends.value[index], ends.grad[index] = climb.z, climb.value, climb.grad
        ends.gain[index] = climb.expected_gain
        if 4 * int(climb.done.sum()) > len(index):  # those at their ends cost no more
            index = index[~climb.done]
            climb.select(~climb.done)
    return ends, steps
