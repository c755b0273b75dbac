"""Small layers that draw or lose something, each with a density that can be computed otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from pyro_nf.flows.base import Base
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.stochastic import StochasticLayer


class Abs(StochasticLayer):
    """y = |x|; the inverse throws a coin for each sign."""

    random, codomain = "inverse", constraints.independent(constraints.nonnegative, 1)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return x.abs()

    def _inverse(self, y: Tensor, context: Tensor | None) -> Tensor:
        return y * (2 * torch.randint_like(y, 2) - 1)

    def _contribution(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        return torch.full_like(x[..., 0], -x.shape[-1] * math.log(2))


class Largest(StochasticLayer):
    """y is the largest entry of x; the inverse draws where it is, and the rest below it."""

    random = "inverse"

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return x.amax(-1, keepdim=True)

    def _inverse(self, y: Tensor, context: Tensor | None) -> Tensor:
        x = y - torch.empty_like(y.expand(*y.shape[:-1], *self.event_shape)).exponential_()
        where = torch.randint_like(y, x.shape[-1])
        return torch.where(torch.arange(x.shape[-1]) == where, y, x)

    def _contribution(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        return -math.log(x.shape[-1]) - (y - x).sum(-1)


class Noise(StochasticLayer):
    """y = x + s e; the inverse draws from a normal around a share of y. All of it learns."""

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        self.log_scale = nn.Parameter(torch.tensor(-0.5))
        self.share = nn.Parameter(torch.tensor(0.6))
        self.log_width = nn.Parameter(torch.tensor(-0.3))
        self.shift = nn.Linear(context_dim, input_dim) if context_dim else None

    def p(self, x: Tensor, context: Tensor | None) -> Normal:
        shift = 0.0 if self.shift is None else self.shift(context)
        return Normal(x + shift, self.log_scale.exp(), validate_args=False)

    def q(self, y: Tensor, context: Tensor | None) -> Normal:
        shift = 0.0 if self.shift is None else self.shift(context)
        return Normal(self.share * (y - shift), self.log_width.exp(), validate_args=False)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.p(x, context).rsample()

    def _inverse(self, y: Tensor, context: Tensor | None) -> Tensor:
        return self.q(y, context).rsample()

    def _contribution(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        return (self.q(y, context).log_prob(x) - self.p(x, context).log_prob(y)).sum(-1)


class Augment(StochasticLayer):
    """y = (x, e) with e drawn given x; the inverse drops e again, so that the density is exact."""

    random = "forward"

    def __init__(self, input_dim: int, more: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim, output_shape=input_dim + more)
        self.net = nn.Linear(input_dim + context_dim, more)

    def law(self, x: Tensor, context: Tensor | None) -> Normal:
        given = x if context is None else torch.cat([x, context.expand(*x.shape[:-1], -1)], -1)
        return Normal(self.net(given), 0.7, validate_args=False)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return torch.cat([x, self.law(x, context).rsample()], -1)

    def _inverse(self, y: Tensor, context: Tensor | None) -> Tensor:
        return y[..., : self.input_dim]

    def _contribution(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        return -self.law(x, context).log_prob(y[..., x.shape[-1] :]).sum(-1)


class Slice(StochasticLayer):
    """y is the first channel of an image; the inverse draws the others."""

    random = "inverse"

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return x[..., :1, :, :]

    def _inverse(self, y: Tensor, context: Tensor | None) -> Tensor:
        return torch.cat([y, 0.8 * torch.randn_like(y)], -3)

    def _contribution(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        return Normal(0.0, 0.8).log_prob(x[..., 1:, :, :]).sum((-3, -2, -1))


class Rounded(StochasticLayer):
    """y = floor(x); the inverse draws evenly from what is rounded to y."""

    random, codomain = "inverse", constraints.independent(constraints.integer, 1)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return x.floor()

    def _inverse(self, y: Tensor, context: Tensor | None) -> Tensor:
        return y + torch.rand_like(y)

    def _contribution(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        return torch.zeros_like(x[..., 0])


class Argmax(StochasticLayer):
    """y is the index of the largest entry of x, which the inverse draws and presses below it."""

    random = "inverse"

    def __init__(self, count: int) -> None:
        super().__init__(count, output_shape=1)
        self.codomain = constraints.independent(constraints.integer_interval(0, count - 1), 1)
        self.loc = nn.Parameter(torch.zeros(count))

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return x.argmax(-1, keepdim=True).to(x)

    def _inverse(self, y: Tensor, context: Tensor | None) -> Tensor:
        u = self.loc + 1.6 * torch.randn(*y.shape[:-1], *self.event_shape).to(y)
        top = u.gather(-1, y.long())
        return torch.where(self._is_top(y), top, top - F.softplus(top - u))

    def _contribution(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        is_top, top = self._is_top(y), x.gather(-1, y.long())
        gap = torch.where(is_top, 1.0, top - x)
        u = torch.where(is_top, top, top - gap - (-(-gap).expm1()).log())
        log_slope = torch.where(is_top, 0.0, F.logsigmoid(top - u))
        return (Normal(self.loc, 1.6).log_prob(u) - log_slope).sum(-1)

    def _is_top(self, y: Tensor) -> Tensor:
        return torch.arange(self.input_dim) == y


class Die(Base):
    """Whole numbers 0 to n - 1 with learned chances."""

    def __init__(self, count: int) -> None:
        super().__init__(1)
        self.logits = nn.Parameter(torch.linspace(0.0, 1.0, count))

    def forward(self, batch_shape: Sequence[int] = ()) -> dist.TorchDistribution:
        return Throw(self.logits.expand(*batch_shape, 1, -1))


class Throw(dist.TorchDistribution):
    """A throw of the die, as a vector of one floating number."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, logits: Tensor) -> None:
        self.inner = dist.Categorical(logits=logits)
        super().__init__(logits.shape[:-2], logits.shape[-2:-1], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(self.inner.support, 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Throw:
        return Throw(self.inner.logits.expand(*batch_shape, *self.inner.logits.shape[-2:]))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.inner.sample(torch.Size(sample_shape)).to(self.inner.logits)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.inner.log_prob(value).sum(-1)


class Metropolis(StochasticLayer):
    """A step to a neighbour on a ring of n states, taken or refused by Metropolis' rule.

    In balance with its target a step back is as likely as a step there, so the inverse is one too.
    """

    has_rsample = False

    def __init__(self, log_target: Tensor) -> None:
        super().__init__(1)
        self.domain = self.codomain = constraints.independent(
            constraints.integer_interval(0, len(log_target) - 1), 1
        )
        self.register_buffer("log_target", log_target)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        there = (x + 2 * torch.randint_like(x, 2) - 1) % len(self.log_target)
        accepted = torch.rand_like(x).log() < self._at(there) - self._at(x)
        return torch.where(accepted, there, x)

    _inverse = _forward

    def _contribution(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        return (self._at(x) - self._at(y)).squeeze(-1)

    def _at(self, x: Tensor) -> Tensor:
        return self.log_target[x.long()]

    def matrix(self) -> Tensor:
        """P(x -> y) as a matrix."""
        n = len(self.log_target)
        accept = (self.log_target - self.log_target.unsqueeze(-1)).exp().clamp_max(1.0)
        steps = torch.eye(n).roll(1, 1) + torch.eye(n).roll(-1, 1)
        P = 0.5 * steps.to(accept) * accept
        return P + (1 - P.sum(-1)).diag()


class TracedLinear(FlowTransform):
    r"""y = exp(A) x, whose log-determinant tr A is estimated by :math:`v^\top A v`, v of signs."""

    ladj_kind = "estimate"

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        self.A = nn.Parameter(0.1 * torch.eye(input_dim))
        self.tilt = nn.Linear(context_dim, input_dim, bias=False) if context_dim else None

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        s = torch.zeros_like(x) if self.tilt is None else self.tilt(context).expand_as(x)
        y = s.exp() * (x @ self.A.matrix_exp().T)
        return y, self._trace(x, s)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        s = torch.zeros_like(y) if self.tilt is None else self.tilt(context).expand_as(y)
        x = ((-s).exp() * y) @ (-self.A).matrix_exp().T
        return x, -self._trace(y, s)

    def _trace(self, like: Tensor, s: Tensor) -> Tensor:
        v = 2 * torch.randint_like(like, 2) - 1
        return (v * (v @ self.A.T)).sum(-1) + s.sum(-1)
