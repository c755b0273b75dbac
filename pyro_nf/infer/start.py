"""Where to start: a Gaussian near the posterior, found before the flow learns anything."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_nf.infer.climbs import BatchedLBFGS, mean_field_climb, newton_climb
from pyro_nf.infer.gaussians import (
    MAX_FULL_DIM,
    MAX_SCALES,
    diagonal_precision,
    gaussian_elbos,
    laplace_scale,
    sample_gaussian,
)
from pyro_nf.infer.joint import LogJoint

# Scales of the random starts around the initial point, in unconstrained units.
_SPREADS = (0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Start:
    r"""A Gaussian :math:`N(m_0, L_0 L_0^\top)` in unconstrained coordinates.

    Attributes:
        loc: m_0, shape (D,).
        scale: L_0, lower triangular (D, D), or its diagonal (D,) in high dimensions.
        elbo: of this Gaussian, estimated.
        modes: Gaussians at other maxima, best first. Those with an ELBO within a few nats of this
            one hold a part of the mass.
    """

    loc: Tensor
    scale: Tensor
    elbo: float
    modes: tuple[Start, ...] = field(default=(), repr=False)

    @property
    def scale_tril(self) -> Tensor:
        """L_0 as a matrix (D, D)."""
        return self.scale.diag_embed() if self.scale.dim() == 1 else self.scale

    def sample(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., D) = m_0 + L_0 eps and log q(z) (...,)."""
        return sample_gaussian(self.loc, self.scale, eps)


def random_starts(
    joint: LogJoint,
    init: Tensor,
    count: int,
    generator: torch.Generator,
    max_seconds: float = 0.2,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Tensor, Tensor]:
    """Points from the prior, around the initial point and around 0, with their log density.

    Args:
        joint: the log joint.
        init: (D,).
        count: how many.
        generator: of the random numbers.
        max_seconds: for the draws of the prior, each of which is a run of the model.
        clock: what the seconds are counted with.

    Returns:
        z (count, D) and log p (count,).
    """
    noise = torch.randn(count, len(init), generator=generator, dtype=init.dtype).to(init.device)
    index = torch.arange(count, device=init.device)
    width = init.new_tensor(_SPREADS)[index % len(_SPREADS)].unsqueeze(-1)
    around_init = (index // len(_SPREADS) % 2 == 0).unsqueeze(-1)
    z = torch.where(around_init, init, 0.0) + width * noise
    deadline = clock() + max_seconds
    for i in range(0, count, 2):
        if clock() > deadline:
            break
        try:
            draw = joint.prior_draw(int(torch.randint(2**31, (), generator=generator)))
        except (ValueError, RuntimeError):
            continue  # a draw of the prior with which the model cannot run
        # Heavy-tailed priors draw points where nothing is finite; flat ones draw nothing.
        draw = torch.where(draw == 0, noise[i], draw)
        z[i] = draw.nan_to_num(0.0).clamp(-1e6, 1e6)
    with torch.no_grad():
        log_prob = joint.log_prob(z)
    return z, log_prob


def laplace_start(
    joint: LogJoint,
    init: Tensor | None = None,
    *,
    count_starts: int = 512,
    count_climbers: int = 64,
    count_modes: int = 4,
    count_draws: int = 256,
    count_refine: int = 2,
    max_steps: int = 200,
    max_seconds: float = 2.0,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Start:
    r"""A Gaussian with a good ELBO, from many climbs and the curvature along them.

    From the initial point and some of many random points, most of them the best, L-BFGS climbs in
    one batch, of which every ten steps the better half goes on. Laplace's approximation
    :math:`N(z, |-\nabla^2 \log p(z)|^{-1})` is a candidate at the best distinct maxima and at
    earlier points of the climbs. The best of them climb on by their ELBO (:func:`mean_field_climb`,
    :func:`newton_climb`). The one with the best *ELBO* wins, never the best density: a funnel has
    its greatest density where its scale is 0.

    Args:
        joint: the log joint.
        init: first point (D,); `joint.init_loc` by default.
        count_starts: random points to look at.
        count_climbers: how many points climb, the initial one among them.
        count_modes: distinct maxima that become candidates.
        count_draws: draws of an ELBO; the best few are estimated again with twice as many.
        count_refine: how many of the best Gaussians climb on by their ELBO.
        max_steps: of the climb.
        max_seconds: of wall time; what is found by then is used.
        seed: of the random numbers.
        clock: what the seconds are counted with.

    Returns:
        The best Gaussian and, in `modes`, those of the other maxima.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(torch.tensor([500.0, -300.0]), 2.0).to_event(1))
        >>> start = laplace_start(LogJoint(model), max_seconds=60.0)
        >>> start.loc.round().tolist(), (start.scale_tril.diagonal() * 10).round().tolist()
        ([500.0, -300.0], [20.0, 20.0])
    """
    began = clock()
    deadline = began + max_seconds
    generator = torch.Generator().manual_seed(seed)
    init = joint.init_loc if init is None else init
    z, log_prob = random_starts(joint, init, count_starts, generator, 0.1 * max_seconds, clock)
    # The better half by density; the others are any, lest all stand near one maximum.
    ranked = log_prob.argsort(descending=True)
    ranked = ranked[: int(torch.isfinite(log_prob).sum().clamp_min(1))]
    half = min(count_climbers // 2, len(ranked))
    rest = ranked[half:][torch.randperm(len(ranked) - half, generator=generator)]
    best = torch.cat([ranked[:half], rest])[: count_climbers - 1]
    climb = BatchedLBFGS(joint.value_and_grad, torch.cat([init.unsqueeze(0), z[best]]))
    # The rest of the time is for the curvature and the choice.
    points = _points_of(climb, count_modes, max_steps, lambda: clock() > began + 0.6 * max_seconds)

    eps = torch.randn(count_draws, len(init), generator=generator, dtype=init.dtype)
    eps = eps.to(init.device)
    eps = torch.cat([eps, -eps])
    candidates: list[_Candidate] = []
    probes = torch.Generator().manual_seed(seed)
    for point, is_maximum in points:
        if candidates and clock() > deadline:
            break
        if not any(torch.equal(point, other.loc) for other in candidates):
            candidates += [
                _Candidate(point, scale, is_maximum) for scale in _scales(joint, point, probes)
            ]
    candidates.append(_Candidate(init, torch.full_like(init, 0.1)))
    elbos = _elbos(joint, candidates, eps[:count_draws])
    if count_refine and clock() < deadline:
        best_few = elbos.topk(min(count_refine, len(candidates))).indices.tolist()
        # The last candidate is the initial point itself, from where no climb has gone astray.
        chosen = [i for i in dict.fromkeys([*best_few, len(elbos) - 1]) if elbos[i].isfinite()]
        fixed = torch.cat([eps[:32], -eps[:32]])  # as many as a recorded step takes
        new = [
            finer
            for i in chosen
            for finer in _refined(joint, candidates[i], fixed, deadline, clock)
        ]
        if new:
            candidates += new
            elbos = torch.cat([elbos, _elbos(joint, new, eps[:count_draws])])
    few = [int(i) for i in elbos.topk(min(3, len(candidates))).indices]
    finalists = [candidates[i] for i in few]
    more = _elbos(joint, finalists, eps)
    winner = few[int(more.argmax())]
    others = [
        Start(c.loc, c.scale, float(elbo))
        for i, (c, elbo) in enumerate(zip(candidates, elbos, strict=True))
        if c.is_maximum and i != winner and elbo.isfinite()
    ]
    others.sort(key=lambda start: -start.elbo)
    loc, scale = candidates[winner].loc, candidates[winner].scale
    if scale.dim() == 1 and len(init) <= MAX_FULL_DIM:
        scale = scale.diag_embed()  # one form for one size
    return Start(loc, scale, float(more.max()), tuple(others))


@dataclass(frozen=True)
class _Candidate:
    """A Gaussian that may become the start."""

    loc: Tensor
    scale: Tensor
    is_maximum: bool = False


def _elbos(joint: LogJoint, candidates: list[_Candidate], eps: Tensor) -> Tensor:
    return gaussian_elbos(joint, [(c.loc, c.scale) for c in candidates], eps)


def _points_of(
    climb: BatchedLBFGS, count_modes: int, max_steps: int, out_of_time: Callable[[], bool]
) -> list[tuple[Tensor, bool]]:
    """Where the climb came to and what it passed, and whether it is a maximum, in that order."""
    # Where the initial point, number 0 until the first selection, and the leader passed.
    passed: list[Tensor] = [climb.z[0].clone()]
    scouts: list[Tensor] = []
    for step in range(1, max_steps + 1):
        climb.step()
        if step in (1, 2, 4, 8, 16, 32, 64, 128):
            passed.append(climb.z[climb.value.argmax()].clone())
            passed += [climb.z[0].clone()] if step < 10 else []
        if bool(climb.done.all()) or out_of_time():
            break
        if step % 10 == 0:
            # A lower maximum may hold a part of the mass: it is noted before it is left behind.
            scouts = scouts or _distinct(climb, count_modes)
            climb.keep(max(len(climb.z) // 2, min(8, len(climb.z))))
    points = [(z, True) for z in _distinct(climb, count_modes)]
    return points + [(z, False) for z in passed[::-1]] + [(z, True) for z in scouts]


def _scales(joint: LogJoint, point: Tensor, probes: torch.Generator) -> list[Tensor]:
    """Scales by the curvature at a point; none where it is not finite."""
    try:
        if len(point) > MAX_FULL_DIM:
            precision = diagonal_precision(joint, point, probes)
            scales = [precision.clamp_min(s**-2) ** -0.5 for s in MAX_SCALES]
        else:
            hessian = joint.hessian(point)
            scales = [laplace_scale(hessian, s) for s in MAX_SCALES]
    except (ValueError, RuntimeError):
        return []
    return scales[1:] if torch.equal(*scales) else scales


def _refined(
    joint: LogJoint, c: _Candidate, eps: Tensor, deadline: float, clock: Callable[[], float]
) -> list[_Candidate]:
    """Gaussians that climbed on by their ELBO, from this one and from its diagonal."""
    spread = c.scale if c.scale.dim() == 1 else c.scale.norm(dim=-1)
    diagonal = mean_field_climb(joint, c.loc, spread, eps, deadline=deadline, clock=clock)
    if len(c.loc) > MAX_FULL_DIM:
        return [_Candidate(*diagonal)]
    full = [
        newton_climb(joint, m, s, eps, deadline=deadline, clock=clock)
        for m, s in [(c.loc, c.scale), diagonal]
    ]
    return [_Candidate(*gaussian) for gaussian in [*full, diagonal]]


def _distinct(climb: BatchedLBFGS, count: int) -> list[Tensor]:
    """The best maxima that are not the same point twice."""
    found: list[Tensor] = []
    values: list[float] = []
    for i in climb.value.argsort(descending=True):
        if len(found) == count or not bool(torch.isfinite(climb.value[i])):
            break
        z, value = climb.z[i], float(climb.value[i])
        near = any(
            abs(value - v) < 1.0 and float((z - other).norm()) < 0.3 * math.sqrt(len(z))
            for other, v in zip(found, values, strict=True)
        )
        if not near:
            found.append(z.clone())
            values.append(value)
    return found
