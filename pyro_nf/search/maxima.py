"""All maxima of a posterior that many climbs find; counts bound the search, and no clock."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_nf.model.joint import LogJoint
from pyro_nf.search.climbs import BatchedLBFGS
from pyro_nf.search.gaussians import MAX_FULL_DIM, diagonal_precision, laplace_scale
from pyro_nf.sites.latents import init_anywhere
from pyro_nf.sites.substitute import fast_pyro
from pyro_nf.sites.supports import bijection
from pyro_nf.train.budget import Budget

# What a call of an operation and one of its numbers count, in seconds of a machine that serves as
# the measure: the same model always costs the same, whatever this machine is busy with.
_CALL, _NUMBER = 5e-6, 1.5e-9
# Numbers that a step of the climbs itself handles for each coordinate of a point.
_CLIMB_NUMBERS = 60
# The most and the fewest points that climb, and how many steps.
MOST_STARTS, FEWEST_STARTS, _STEPS = 8192, 64, 100
# Costs, by that measure, at which fewer points climb, and at which they make fewer steps.
_FEWER_STARTS, _FEWER_STEPS = 2.0, 12.0
# The cost of all draws of the prior where each takes a run of the model.
_PRIOR_COST = 0.5
# Batches in which the operations are counted. No recording is made for such sizes.
_COUNTED = (3, 9)
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
# Step of a difference of gradients, in sds of its coordinate.
_DIFFERENCE = 0.25
# Degrees of freedom of the Student-t at a maximum.
_DEGREES = 5.0


class _OperationCount(TorchDispatchMode):
    """Counts the operations of torch and the numbers that they make, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.numbers = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if _is_tensor(t)]
        # A product or a factorisation of matrices makes each number from a row.
        product = any(word in str(func) for word in ("mm", "linalg", "cholesky", "solve"))
        width = max([1, *(a.shape[-1] for a in args if _is_tensor(a) and a.dim() and product)])
        self.calls += 1
        self.numbers += width * sum(t.numel() for t in made)
        return out


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def nominal_cost(joint: LogJoint) -> tuple[float, float]:
    """What a step of climbs costs, by counted operations and not by a clock.

    Args:
        joint: The log joint density.

    Returns:
        Seconds of a nominal machine for a step of no points, and for each point more; the same for
        the same model wherever and whenever it runs.
    """
    costs = []
    for rows in _COUNTED:
        with _OperationCount() as counted:
            joint.value_and_grad(joint.init_loc.expand(rows, -1))
        own = _CLIMB_NUMBERS * rows * joint.latent_dim
        costs.append(_CALL * counted.calls + _NUMBER * (counted.numbers + own))
    each = (costs[1] - costs[0]) / (_COUNTED[1] - _COUNTED[0])
    return max(costs[0] - _COUNTED[0] * each, 0.0), each


@dataclass(frozen=True)
class Effort:
    """How far is looked.

    Attributes:
        count_starts: Points that climb.
        max_steps: Steps that each of them may make.
        count_points: Points at which guide and posterior are compared.
    """

    count_starts: int
    max_steps: int = _STEPS
    count_points: int = 4096

    @classmethod
    def for_joint(cls, joint: LogJoint) -> Effort:
        """As much as a log joint density of this cost allows, by a rule that asks no clock."""
        fixed, each = nominal_cost(joint)
        count = MOST_STARTS
        while count > FEWEST_STARTS and _STEPS * (fixed + count * each) > _FEWER_STARTS:
            count //= 2
        affordable = int(_FEWER_STEPS / (fixed + count * each))
        return cls(count, min(_STEPS, max(1, affordable)), min(4096, max(256, count)))

    @property
    def is_cut_short(self) -> bool:
        """Whether the climbs have fewer steps than they want."""
        return self.max_steps < _STEPS


@dataclass(frozen=True)
class StudentT:
    """A multivariate Student-t with 5 degrees of freedom.

    Attributes:
        loc: m, ``(D,)``.
        scale: L, lower triangular ``(D, D)``, or its diagonal ``(D,)`` in high dimensions.
    """

    loc: Tensor
    scale: Tensor

    @property
    def log_det(self) -> Tensor:
        """log det L, ``()``."""
        diagonal = self.scale if self.scale.dim() == 1 else self.scale.diagonal()
        return diagonal.abs().log().sum()

    def distance(self, z: Tensor) -> Tensor:
        r"""Squared Mahalanobis distance :math:`|L^{-1}(z - m)|^2` of ``z (S, D)``, ``(S,)``."""
        centred = z - self.loc
        if self.scale.dim() == 1:
            return (centred / self.scale).square().sum(-1)
        white = torch.linalg.solve_triangular(self.scale, centred.mT, upper=False)
        return white.square().sum(0)

    def sample(self, count: int) -> Tensor:
        """Draws, ``(count, D)``."""
        chi2 = torch.distributions.Chi2(torch.full((count, 1), _DEGREES)).sample()
        eps = (torch.randn(count, len(self.loc)) * (_DEGREES / chi2).sqrt()).to(self.loc)
        return self.loc + (self.scale * eps if self.scale.dim() == 1 else eps @ self.scale.mT)

    def log_prob(self, z: Tensor) -> Tensor:
        """The log density at ``z (S, D)``, ``(S,)``."""
        nu, dim = _DEGREES, len(self.loc)
        norm = math.lgamma((nu + dim) / 2) - math.lgamma(nu / 2) - dim / 2 * math.log(nu * math.pi)
        return norm - self.log_det - (nu + dim) / 2 * (self.distance(z) / nu).log1p()


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


# ---- where to start


def prior_draws(joint: LogJoint, count: int, budget: Budget | None = None) -> Tensor:
    """Coordinates of draws of the prior, by one run of the model if it runs on a batch.

    Else they come one by one, as many as the cost of a run allows. Flat priors have no draws: there
    the coordinates are 0.

    Args:
        joint: The log joint density.
        count: How many draws are wanted.
        budget: A bound of seconds, asked between single draws, if there is one.

    Returns:
        Finite draws ``(N, D)``; fewer than asked for, or none, where the model cannot give them.
    """
    draws: Tensor | None = None
    if joint.kind in _PRIOR_WAYS and not joint._centring:
        # A model that fails in this way is asked in another.
        with contextlib.suppress(Exception):
            draws = _PRIOR_WAYS[joint.kind](joint, count)
    if draws is None:
        affordable = max(FEWEST_STARTS // 4, int(_PRIOR_COST / sum(nominal_cost(joint))))
        singles = []
        for seed in torch.randint(2**31, (min(count, affordable),)).tolist():
            if budget is not None and budget.is_spent():
                break
            # With some draws of the prior the model cannot run.
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                singles.append(joint.prior_draw(seed))
        draws = torch.stack(singles) if singles else joint.init_loc.new_zeros(0, joint.latent_dim)
    return draws[draws.isfinite().all(-1)].clamp(-1e6, 1e6)


def _prior_sites(joint: LogJoint, *around: Any) -> dict[str, Tensor]:
    """The unconstrained coordinates of each site of one run that draws the prior."""
    draw = InitMessenger(init_anywhere(init_to_sample, joint.init_loc.dtype, joint.init_loc.device))
    with contextlib.ExitStack() as stack:
        for context in (torch.no_grad(), fast_pyro(), poutine.block(), draw, *around):
            stack.enter_context(context)
        trace = poutine.trace(joint.model).get_trace(*joint.args, **joint.kwargs)
    nodes: dict[str, Any] = dict(trace.nodes)
    coordinates = {}
    for name, site in joint.sites.items():
        node = nodes[name]
        transform = bijection(name, node["fn"]) if joint.dynamic_sites else site.transform
        coordinates[name] = transform.inv(node["value"]).to(joint.init_loc.dtype)
    return coordinates


def _prior_by_batch(joint: LogJoint, count: int) -> Tensor | None:
    depth = joint.max_batch_ndim
    coordinates = _prior_sites(joint, pyro.plate("_draws", count, dim=-1 - depth))
    for name, site in joint.sites.items():
        pad = (1,) * (depth - site.batch_ndim)
        if coordinates[name].shape != (count, *pad, *site.unconstrained_shape):
            return None
    lead = torch.Size((count,))
    return torch.cat([site.flat(coordinates[n], lead) for n, site in joint.sites.items()], -1)


def _prior_by_vmap(joint: LogJoint, count: int) -> Tensor | None:
    def one(_: Tensor) -> Tensor:
        values, lead = _prior_sites(joint), torch.Size()
        return torch.cat([site.flat(values[n], lead) for n, site in joint.sites.items()])

    return torch.func.vmap(one, randomness="different")(joint.init_loc.new_zeros(count))


_PRIOR_WAYS = {"batched": _prior_by_batch, "vmap": _prior_by_vmap}


def prior_reference(joint: LogJoint, prior: Tensor) -> StudentT:
    """Where the prior lies: the median of its draws and half the way between 16 % and 84 %.

    Args:
        joint: The log joint density; without draws its initial point and a scale of 1 are taken.
        prior: Draws of the prior, ``(N, D)``.
    """
    one = torch.ones_like(joint.init_loc)
    if len(prior) < 2:
        return StudentT(joint.init_loc, one)
    low, middle, high = prior.quantile(prior.new_tensor([0.16, 0.5, 0.84]), 0)
    return StudentT(middle, torch.where(high > low, 0.5 * (high - low), one))


def starts(
    joint: LogJoint, prior: Tensor, reference: StudentT, known: Tensor, count: int
) -> Tensor:
    """Points from which to climb: of the prior, around what is known, and in balls of all sizes.

    Args:
        joint: The log joint density.
        prior: Draws of the prior, ``(N, D)``.
        reference: Where the prior lies.
        known: Draws of what is known already, ``(S, D)``.
        count: How many points.

    Returns:
        ``(count, D)``.
    """
    middle, spread = reference.loc, reference.scale
    noise = torch.randn(count, len(middle)).to(middle)
    # Flat priors have no draws; they are stood in for by those of a normal.
    flat = (prior == 0).all(0)
    draws = torch.where(flat, noise[: len(prior)], prior)
    around, balls = noise[len(draws) :].tensor_split([count // 8])
    widths = middle.new_tensor([0.0, 1.0, 2.0, 4.0])[torch.arange(len(around)) % 4].unsqueeze(-1)
    sd = known.std(0) if len(known) > 1 else torch.ones_like(middle)
    around = known[torch.randint(len(known), (len(around),))] + widths * sd * around
    # Radii are uniform in their logarithm, from a twentieth of the prior's spread to twice of it.
    radii = (math.log(0.05) + math.log(40.0) * torch.rand(len(balls), 1)).exp().to(middle)
    centres = torch.stack([middle, torch.zeros_like(middle), joint.init_loc])
    balls = centres[torch.arange(len(balls)) % len(centres)] + radii * spread * balls
    balls[-1:] = joint.init_loc
    return torch.cat([draws, around, balls])


# ---- climbs


@dataclass(frozen=True)
class _Ends:
    """Where climbs ended: points (N, D), densities, gradients, and what is left to gain (N,)."""

    z: Tensor
    value: Tensor
    grad: Tensor
    gain: Tensor


def _climb(joint: LogJoint, z: Tensor, max_steps: int, budget: Budget) -> tuple[_Ends, int]:
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


# ---- curvature


def curvature_scale(joint: LogJoint, z: Tensor) -> Tensor | None:
    """L of Laplace's approximation at one point ``(D,)``; None where there is no curvature.

    The second derivative by backward passes is NaN where ``logsumexp`` meets pieces that are far
    apart, although the gradient is right. There it comes from differences of gradients.

    Args:
        joint: The log joint density.
        z: The point.
    """
    if len(z) > MAX_FULL_DIM:
        try:
            return diagonal_precision(joint, z, torch.Generator().manual_seed(0)).rsqrt()
        except (ValueError, RuntimeError):
            return None
    for hessian in _hessians(joint, z):
        if bool(hessian.isfinite().all()):
            try:
                return laplace_scale(hessian)
            except (ValueError, RuntimeError):
                continue
    return None


def _hessians(joint: LogJoint, z: Tensor) -> Iterator[Tensor]:
    with contextlib.suppress(RuntimeError):  # an operation without a second derivative
        yield joint.hessian(z)
    yield difference_hessian(joint, z)


def difference_hessian(joint: LogJoint, z: Tensor) -> Tensor:
    r"""The Hessian at one point from central differences of gradients, ``(D, D)``.

    .. math:: H_{\cdot d} = \frac{g(z + h_d e_d) - g(z - h_d e_d)}{2 h_d}

    Each step :math:`h_d` becomes a quarter of :math:`|H_{dd}|^{-1/2}`, the scale of its coordinate.

    Args:
        joint: The log joint density.
        z: The point ``(D,)``.
    """
    dim = len(z)
    h = 1e-2 * torch.ones_like(z)
    for _ in range(12):
        steps = h.diag_embed()
        _, grad = joint.value_and_grad(torch.cat([z + steps, z - steps]))
        hessian = (grad[:dim] - grad[dim:]) / (2 * h).unsqueeze(-1)
        wanted = _DIFFERENCE * hessian.diagonal().abs().clamp_min(1e-12).rsqrt()
        wanted = wanted.clamp(1e-6, 10.0)
        if bool(((h <= 2 * wanted) & (h >= 0.25 * wanted)).all()):
            break
        h = torch.minimum(torch.maximum(wanted, 0.1 * h), 10 * h)
    return 0.5 * (hessian + hessian.mT)


# ---- distinct maxima


def find_maxima(
    joint: LogJoint,
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
    joint: LogJoint, ends: _Ends, least_mass: float, budget: Budget
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
    joint: LogJoint, z: Tensor, grad: Tensor, value: float
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
