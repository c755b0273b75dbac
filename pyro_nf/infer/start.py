"""Where to start: a Gaussian near the posterior, found before the flow learns anything."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_nf.infer.joint import LinAlgError, LogJoint

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]

# Above this many dimensions no D x D matrix is made: the candidates have diagonal scales.
MAX_FULL_DIM = 300
# Scales of the random starts around the initial point, in unconstrained units.
_SPREADS = (0.3, 1.0, 3.0)
# An axis along which the density hardly falls is given these scales, to be chosen by ELBO.
_MAX_SCALES = (10.0, 1000.0)
# Longest move of a point that knows its curvature.
_FAR = 1e4
# How many draws the mean Hessian of a variational Newton step takes.
_HESSIAN_DRAWS = 8


@dataclass(frozen=True)
class Start:
    r"""A Gaussian :math:`N(m_0, L_0 L_0^\top)` in unconstrained coordinates.

    Attributes:
        loc: m_0, shape (D,).
        scale: L_0, lower triangular (D, D), or its diagonal (D,) in high dimensions.
        elbo: of this Gaussian, estimated.
        modes: Gaussians at other maxima, best first. Those with an ELBO within a few nats of this
            one hold a part of the mass.
        count_calls: how many batches of the log joint it took.
    """

    loc: Tensor
    scale: Tensor
    elbo: float
    modes: tuple[Start, ...] = field(default=(), repr=False)
    count_calls: int = 0

    @property
    def scale_tril(self) -> Tensor:
        """L_0 as a matrix (D, D)."""
        return self.scale.diag_embed() if self.scale.dim() == 1 else self.scale

    def sample(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., D) = m_0 + L_0 eps and log q(z) (...,)."""
        return _sample(self.loc, self.scale, eps)


def _sample(loc: Tensor, scale: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    if scale.dim() == 1:
        z, ladj = loc + scale * eps, scale.log().sum()
    else:
        z, ladj = loc + eps @ scale.mT, scale.diagonal().log().sum()
    log_normal = -0.5 * (eps**2).sum(-1) - 0.5 * loc.shape[-1] * math.log(2 * math.pi)
    return z, log_normal - ladj


class BatchedLBFGS:
    r"""Climbs from many points at once, each with its own inverse Hessian.

    $$z \leftarrow z + \alpha H \nabla \log p(z),$$

    with H from the last `history` pairs of steps and
    gradient changes (two-loop recursion) and the step halved until the density rises enough. One
    call of the log joint serves a step of all points.

    *Updating Quasi-Newton Matrices with Limited Storage* (Nocedal, 1980).

    Args:
        value_and_grad: z (S, D) -> log p (S,), gradient (S, D); -inf where there is no density.
        z: start points (S, D).
        history: pairs to remember.
        max_move: longest first step of a point that has no curvature yet.

    Attributes:
        z: the points (S, D).
        value: log p of them (S,).
        grad: gradients (S, D).
        done: (S,), which of them have converged or cannot be improved.
    """

    def __init__(
        self, value_and_grad: ValueAndGrad, z: Tensor, history: int = 10, max_move: float = 1.0
    ) -> None:
        self.value_and_grad = value_and_grad
        self.z = z.clone()
        self.value, self.grad = value_and_grad(z)
        self.history, self.max_move = history, max_move
        self._steps: list[Tensor] = []
        self._changes: list[Tensor] = []
        self._rho: list[Tensor] = []
        self._alpha = torch.ones_like(self.value)
        self._has_curvature = torch.zeros_like(self.value, dtype=torch.bool)
        self._failures = torch.zeros_like(self.value)
        self._gains = torch.full_like(self.value, torch.inf)
        self.done = ~torch.isfinite(self.value)
        self._direction = self._ascent()

    def _ascent(self) -> Tensor:
        """H grad by the two-loop recursion; pairs without positive curvature have rho = 0."""
        q, alphas = self.grad.clone(), []
        for s, y, rho in zip(self._steps[::-1], self._changes[::-1], self._rho[::-1], strict=True):
            a = rho * (s * q).sum(-1)
            q = q - a.unsqueeze(-1) * y
            alphas.append(a)
        if self._steps:
            s, y = self._steps[-1], self._changes[-1]
            gamma = (s * y).sum(-1) / (y * y).sum(-1).clamp_min(torch.finfo(y.dtype).tiny)
            q = torch.where(self._has_curvature, gamma, 1.0).unsqueeze(-1) * q
        for s, y, rho, a in zip(self._steps, self._changes, self._rho, alphas[::-1], strict=True):
            b = rho * (y * q).sum(-1)
            q = q + s * (a - b).unsqueeze(-1)
        uphill = (q * self.grad).sum(-1, keepdim=True) > 0
        q = torch.where(uphill & torch.isfinite(q).all(-1, keepdim=True), q, self.grad)
        length = q.norm(dim=-1, keepdim=True)
        longest = torch.where(self._has_curvature.unsqueeze(-1), _FAR, self.max_move)
        return q * (longest / length.clamp_min(1e-30)).clamp_max(1.0)

    def keep(self, count: int) -> None:
        """Goes on with the best points only."""
        best = self.value.topk(min(count, len(self.value))).indices
        for name in ("z", "value", "grad", "done", "_alpha", "_has_curvature", "_failures"):
            setattr(self, name, getattr(self, name)[best])
        self._gains, self._direction = self._gains[best], self._direction[best]
        for pairs in (self._steps, self._changes, self._rho):
            pairs[:] = [pair[best] for pair in pairs]

    def step(self, tolerance: float = 1e-3) -> None:
        """One call of the log joint: each point moves, or halves its step.

        A point is done when two moves in a row gain less than `tolerance` nats.
        """
        z = self.z + (self._alpha * ~self.done).unsqueeze(-1) * self._direction
        value, grad = self.value_and_grad(z)
        slope = (self._direction * self.grad).sum(-1)
        rounding = 10 * torch.finfo(z.dtype).eps * (1 + self.value.abs())
        enough = value >= self.value + 1e-4 * self._alpha * slope - rounding
        moved = enough & torch.isfinite(value) & ~self.done
        s = torch.where(moved.unsqueeze(-1), z - self.z, 0.0)
        y = torch.where(moved.unsqueeze(-1), self.grad - grad, 0.0)
        sy = (s * y).sum(-1)
        curved = sy > 1e-10 * s.norm(dim=-1) * y.norm(dim=-1)
        curved = curved & (sy > torch.finfo(z.dtype).tiny)
        self._steps.append(torch.where(curved.unsqueeze(-1), s, 0.0))
        self._changes.append(torch.where(curved.unsqueeze(-1), y, 0.0))
        self._rho.append(torch.where(curved, 1 / torch.where(curved, sy, 1.0), 0.0))
        if len(self._steps) > self.history:
            del self._steps[0], self._changes[0], self._rho[0]
        self._has_curvature = curved
        gain = torch.where(moved, value - self.value, self._gains)
        self.done = self.done | (moved & (gain < tolerance) & (self._gains < tolerance))
        self._gains = gain
        self._failures = torch.where(moved, 0.0, self._failures + 1)
        self.done = self.done | (self._failures > 12)
        self.z = torch.where(moved.unsqueeze(-1), z, self.z)
        self.value = torch.where(moved, value, self.value)
        self.grad = torch.where(moved.unsqueeze(-1), grad, self.grad)
        direction = self._ascent()
        self._direction = torch.where(moved.unsqueeze(-1), direction, self._direction)
        self._alpha = torch.where(moved, 1.0, 0.4 * self._alpha)


def laplace_scale(hessian: Tensor, max_scale: float = _MAX_SCALES[-1]) -> Tensor:
    r"""Lower-triangular L_0 with :math:`L_0 L_0^\top = |-H|^{-1}`.

    The absolute value is that of the eigenvalues: at a point that is no maximum, the directions in
    which the density rises get the scale of their curvature. In flat directions it is bounded.

    Args:
        hessian: H of the log density (D, D).
        max_scale: the bound.

    Raises:
        ValueError: H is not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("laplace_scale: the Hessian is not finite.")
    precision, axes = torch.linalg.eigh(-hessian.double())
    # Rounding hides eigenvalues that are this much smaller than the largest.
    floor = torch.finfo(hessian.dtype).eps * precision.abs().max()
    variance = 1 / precision.abs().clamp_min(floor).clamp_min(max_scale**-2)
    # A Gaussian's square root A of any shape has the triangular root R^T with A^T = Q R.
    root = axes * variance.sqrt()
    R = torch.linalg.qr(root.mT)[1]
    lower = (R * R.diagonal().sign().unsqueeze(-1)).mT
    return lower.to(hessian.dtype)


def _diagonal_precision(joint: LogJoint, z: Tensor, generator: torch.Generator) -> Tensor:
    """|diag H| by Hutchinson's probes v * (H v), without a D x D matrix."""
    count = 32
    probes = torch.randint(0, 2, (count, len(z)), generator=generator).to(z) * 2 - 1
    batch = z.expand(count, -1).clone().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(joint._evaluate(batch).sum(), batch, create_graph=True)
        (product,) = torch.autograd.grad((grad * probes).sum(), batch)
    diagonal = (product * probes).mean(0)
    if not bool(torch.isfinite(diagonal).all()):
        raise ValueError("the Hessian is not finite.")
    return diagonal.abs()


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


def gaussian_elbos(joint: LogJoint, candidates: list[tuple[Tensor, Tensor]], eps: Tensor) -> Tensor:
    """ELBO (C,) of each Gaussian (loc, scale), all with the same normal draws eps (S, D)."""
    pairs = [_sample(loc, scale, eps) for loc, scale in candidates]
    with torch.no_grad():
        log_p = torch.stack([joint.log_prob(z) for z, _ in pairs])
    log_q = torch.stack([q for _, q in pairs])
    failed = ~torch.isfinite(log_p)
    # A Gaussian half of whose draws have no density is no start, yet a few failures are no ruin.
    elbo = torch.where(failed, 0.0, log_p - log_q).sum(-1) / (~failed).sum(-1).clamp_min(1)
    return torch.where(failed.double().mean(-1) < 0.25, elbo, -torch.inf)


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
        count_draws: draws of an ELBO; the best few are estimated again with four times as many.
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
    # Where the initial point and the leader passed.
    passed: list[Tensor] = [init]
    scouts: list[Tensor] = []
    calls = 2
    for step in range(1, max_steps + 1):
        climb.step()
        calls += 1
        if step in (1, 2, 4, 8, 16, 32, 64, 128):
            passed.append(climb.z[climb.value.argmax()].clone())
            # Point 0 is the initial one until the first selection.
            passed += [climb.z[0].clone()] if step < 10 else []
        # The rest of the time is for the curvature and the choice.
        if bool(climb.done.all()) or clock() > began + 0.6 * max_seconds:
            break
        if step % 10 == 0:
            # A lower maximum may hold a part of the mass: it is noted before it is left behind.
            scouts = scouts or _distinct(climb, count_modes)
            climb.keep(max(len(climb.z) // 2, min(8, count_climbers)))
    maxima = _distinct(climb, count_modes)
    generator_probes = torch.Generator().manual_seed(seed)
    eps = torch.randn(count_draws, len(init), generator=generator, dtype=init.dtype)
    eps = eps.to(init.device)
    eps = torch.cat([eps, -eps])
    candidates: list[tuple[Tensor, Tensor]] = []
    is_maximum: list[bool] = []
    points = [(z, True) for z in maxima] + [(z, False) for z in passed[::-1]]
    for point, is_top in points + [(z, True) for z in scouts]:
        if candidates and clock() > deadline:
            break
        if any(torch.equal(point, other) for other, _ in candidates):
            continue
        try:
            if len(init) > MAX_FULL_DIM:
                precision = _diagonal_precision(joint, point, generator_probes)
                scales = [precision.clamp_min(s**-2) ** -0.5 for s in _MAX_SCALES]
            else:
                hessian = joint.hessian(point)
                scales = [laplace_scale(hessian, s) for s in _MAX_SCALES]
        except (ValueError, RuntimeError):
            continue
        if torch.equal(*scales):
            del scales[0]
        candidates += [(point, scale) for scale in scales]
        is_maximum += [is_top] * len(scales)
    candidates.append((init, torch.full_like(init, 0.1)))
    is_maximum.append(False)
    elbos = gaussian_elbos(joint, candidates, eps[:count_draws])
    if count_refine and clock() < deadline:
        # Fixed draws, as many as a recorded step takes.
        fixed = eps[:32]
        fixed = torch.cat([fixed, -fixed])
        best_few = elbos.topk(min(count_refine, len(candidates))).indices.tolist()
        # The last candidate is the initial point itself, from where no climb has gone astray.
        for i in dict.fromkeys([*best_few, len(elbos) - 1]):
            loc, scale = candidates[i]
            if not bool(torch.isfinite(elbos[i])):
                continue
            spread = scale if scale.dim() == 1 else scale.norm(dim=-1)
            diagonal = mean_field_climb(joint, loc, spread, fixed, deadline=deadline, clock=clock)
            for m, s in [(loc, scale), diagonal]:
                if len(init) <= MAX_FULL_DIM:
                    m, s = newton_climb(joint, m, s, fixed, deadline=deadline, clock=clock)
                candidates.append((m, s))
                is_maximum.append(False)
            candidates.append(diagonal)
            is_maximum.append(False)
        new = candidates[len(elbos) :]
        elbos = torch.cat([elbos, gaussian_elbos(joint, new, eps[:count_draws])])
    few = [int(i) for i in elbos.topk(min(3, len(candidates))).indices]
    more = gaussian_elbos(
        joint, [candidates[i] for i in few], torch.cat([eps, 0.5 * eps])[: 2 * count_draws]
    )
    calls += len(candidates) + len(few)
    winner = few[int(more.argmax())]
    others = [
        Start(*candidates[i], float(elbos[i]))
        for i in range(len(candidates))
        if is_maximum[i] and i != winner and torch.isfinite(elbos[i])
    ]
    others.sort(key=lambda start: -start.elbo)
    loc, scale = candidates[winner]
    if scale.dim() == 1 and len(init) <= MAX_FULL_DIM:
        scale = scale.diag_embed()  # one form for one size
    return Start(loc, scale, float(more.max()), tuple(others), calls)


def mean_field_climb(
    joint: LogJoint,
    loc: Tensor,
    scale: Tensor,
    eps: Tensor,
    max_steps: int = 100,
    deadline: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Tensor, Tensor]:
    r"""Maximises the ELBO of a diagonal Gaussian on fixed draws, by L-BFGS.

    .. math:: \frac1S \sum_i \log p(m + s \odot \epsilon_i) + \sum_d \log s_d

    The draws stay the same, so this is an ordinary function of (m, log s). Unlike the density it
    has no infinite peak where a scale of the model goes to 0.

    *Black Box Variational Inference with a Deterministic Objective* (Giordano, Ingram, Broderick,
    2024).

    Args:
        joint: the log joint.
        loc: m at the start (D,).
        scale: s at the start (D,).
        eps: normal draws (S, D).
        max_steps: calls of the log joint.
        deadline: when to stop, by the clock.
        clock: what the seconds are counted with.

    Returns:
        m and s (D,).
    """
    dim = len(loc)

    def value_and_grad(v: Tensor) -> tuple[Tensor, Tensor]:
        m, log_s = v[0, :dim], v[0, dim:]
        s = log_s.exp()
        log_p, slope = joint.value_and_grad(m + s * eps)
        # A draw without a density forbids the move: -inf is refused by the line search.
        value = log_p.mean() + log_s.sum()
        grad = torch.cat([slope.mean(0), (slope * eps).mean(0) * s + 1])
        return value.unsqueeze(0), grad.unsqueeze(0)

    climb = BatchedLBFGS(value_and_grad, torch.cat([loc, scale.log()]).unsqueeze(0))
    for _ in range(max_steps):
        if bool(climb.done.all()) or clock() > deadline:
            break
        climb.step(tolerance=1e-2)
    return climb.z[0, :dim].clone(), climb.z[0, dim:].exp()


def newton_climb(
    joint: LogJoint,
    loc: Tensor,
    scale: Tensor,
    eps: Tensor,
    max_steps: int = 100,
    deadline: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Tensor, Tensor]:
    r"""Variational Newton steps of a full Gaussian towards the best ELBO.

    .. math:: P \leftarrow (1 - \rho) P + \rho \, E_q[-\nabla^2 \log p], \qquad
              m \leftarrow m + \rho \, P^{-1} E_q[\nabla \log p]

    P is the precision; at the optimum both expectations hold it where it is. A step that lowers the
    ELBO on fixed draws is halved.

    *The Bayesian Learning Rule* (Khan, Rue, 2023).

    Args:
        joint: the log joint.
        loc: m at the start (D,).
        scale: lower-triangular root of the covariance at the start (D, D), or diagonal (D,).
        eps: normal draws (S, D); a few of them serve for the mean Hessian.
        max_steps: steps tried.
        deadline: when to stop, by the clock.
        clock: what the seconds are counted with.

    Returns:
        m (D,) and L (D, D).
    """
    L = scale.diag_embed() if scale.dim() == 1 else scale
    rho, small = 1.0, 0
    elbo = float(gaussian_elbos(joint, [(loc, L)], eps)[0])
    step: tuple[Tensor, Tensor] | None = None
    for _ in range(max_steps):
        if clock() > deadline:
            break
        if step is None:
            z, _ = _sample(loc, L, eps)
            _, slope = joint.value_and_grad(z)
            hessians = joint.hessian(z[:_HESSIAN_DRAWS])
            finite = torch.isfinite(hessians).all(-1).all(-1)
            if not bool(finite.any()):
                break
            hessian = torch.where(finite[:, None, None], hessians, 0.0).sum(0) / finite.sum()
            step = slope.mean(0), hessian
        gradient, hessian = step
        old = torch.cholesky_inverse(L.double())
        try:
            new = laplace_scale(-(1 - rho) * old + rho * hessian.double()).to(L)
        except (ValueError, LinAlgError):
            break
        m = loc + rho * (new @ (new.mT @ gradient))
        value = float(gaussian_elbos(joint, [(m, new)], eps)[0])
        if value > elbo:
            gain, elbo, loc, L, step = value - elbo, value, m, new, None
            rho = min(1.0, 2 * rho)
            small = small + 1 if gain < 0.02 else 0
            if small == 2:
                break
        else:
            rho *= 0.4
            if rho < 0.004:
                break
    return loc, L


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
