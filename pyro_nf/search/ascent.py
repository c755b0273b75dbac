"""Ascent: of many points at once up the density, and of a Gaussian up its ELBO."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from pyro_nf.model.density import LogDensity
from pyro_nf.ops.devices import in_double
from pyro_nf.search.gaussians import gaussian_elbos, laplace_scale, sample_gaussian
from pyro_nf.sites.substitute import LinAlgError
from pyro_nf.train.budget import OutOfTime

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]

# Longest move of a point that knows its curvature.
_FAR = 1e4
# How many draws the mean Hessian of a variational Newton step takes.
_HESSIAN_DRAWS = 8


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
        self.select(self.value.topk(min(count, len(self.value))).indices)

    def select(self, index: Tensor) -> None:
        """Goes on with these points only."""
        for name in ("z", "value", "grad", "done", "_alpha", "_has_curvature", "_failures"):
            setattr(self, name, getattr(self, name)[index])
        self._gains, self._direction = self._gains[index], self._direction[index]
        for pairs in (self._steps, self._changes, self._rho):
            pairs[:] = [pair[index] for pair in pairs]

    @property
    def expected_gain(self) -> Tensor:
        """Twice what a Newton step would gain, by the curvature that the climb knows (S,)."""
        return (self._direction * self.grad).sum(-1)

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


def mean_field_ascent(
    joint: LogDensity,
    loc: Tensor,
    scale: Tensor,
    eps: Tensor,
    max_steps: int = 100,
) -> tuple[Tensor, Tensor]:
    r"""Maximises the ELBO of a diagonal Gaussian on fixed draws, by L-BFGS.

    .. math:: \frac1S \sum_i \log p(m + s \odot \epsilon_i) + \sum_d \log s_d

    The draws stay the same, so this is an ordinary function of (m, log s). Unlike the density it
    has no infinite peak where a scale of the model goes to 0.

    *Black Box Variational Inference with a Deterministic Objective* (Giordano, Ingram, Broderick,
    2024).

    Args:
        joint: the log joint; the climb ends when its time does.
        loc: m at the start (D,).
        scale: s at the start (D,).
        eps: normal draws (S, D).
        max_steps: calls of the log joint.

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

    try:
        climb = BatchedLBFGS(value_and_grad, torch.cat([loc, scale.log()]).unsqueeze(0))
    except OutOfTime:
        return loc, scale
    with suppress(OutOfTime):
        for _ in range(max_steps):
            if bool(climb.done.all()):
                break
            climb.step(tolerance=1e-2)
    return climb.z[0, :dim].clone(), climb.z[0, dim:].exp()


def newton_ascent(
    joint: LogDensity,
    loc: Tensor,
    scale: Tensor,
    eps: Tensor,
    max_steps: int = 100,
) -> tuple[Tensor, Tensor]:
    r"""Variational Newton steps of a full Gaussian towards the best ELBO.

    .. math:: P \leftarrow (1 - \rho) P + \rho \, E_q[-\nabla^2 \log p], \qquad
              m \leftarrow m + \rho \, P^{-1} E_q[\nabla \log p]

    P is the precision; at the optimum both expectations hold it where it is. A step that lowers the
    ELBO on fixed draws is halved.

    *The Bayesian Learning Rule* (Khan, Rue, 2023).

    Args:
        joint: the log joint; the climb ends when its time does.
        loc: m at the start (D,).
        scale: lower-triangular root of the covariance at the start (D, D), or diagonal (D,).
        eps: normal draws (S, D); a few of them serve for the mean Hessian.
        max_steps: steps tried.

    Returns:
        m (D,) and L (D, D).
    """
    best = loc, scale.diag_embed() if scale.dim() == 1 else scale
    with suppress(OutOfTime):
        for better in _newton_steps(joint, *best, eps, max_steps):
            best = better
    return best


def _newton_steps(
    joint: LogDensity, loc: Tensor, L: Tensor, eps: Tensor, max_steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ever better Gaussians (m, L)."""
    rho, small = 1.0, 0
    elbo = float(gaussian_elbos(joint, [(loc, L)], eps)[0])
    step: tuple[Tensor, Tensor] | None = None
    for _ in range(max_steps):
        if step is None:
            z, _ = sample_gaussian(loc, L, eps)
            _, slope = joint.value_and_grad(z)
            hessians = joint.hessian(z[:_HESSIAN_DRAWS])
            finite = torch.isfinite(hessians).all(-1).all(-1)
            if not bool(finite.any()):
                return
            hessian = torch.where(finite[:, None, None], hessians, 0.0).sum(0) / finite.sum()
            step = slope.mean(0), hessian
        gradient, hessian = step
        old = torch.cholesky_inverse(in_double(L))
        try:
            new = laplace_scale(-(1 - rho) * old + rho * in_double(hessian)).to(L)
        except (ValueError, LinAlgError):
            return
        m = loc + rho * (new @ (new.mT @ gradient))
        value = float(gaussian_elbos(joint, [(m, new)], eps)[0])
        if value > elbo:
            gain, elbo, loc, L, step = value - elbo, value, m, new, None
            yield loc, L
            rho = min(1.0, 2 * rho)
            small = small + 1 if gain < 0.02 else 0
            if small == 2:
                return
        else:
            rho *= 0.4
            if rho < 0.004:
                return
