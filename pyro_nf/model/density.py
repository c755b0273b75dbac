"""What a search, a fit and a posterior need of an unnormalised log density."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pyro_nf._checks import check_clock, check_count, check_flag, check_floating, check_number
from pyro_nf.model.recording import Recordings
from pyro_nf.train.modes import ordinary, recording

#: How a batch is evaluated: all rows at once in one of three ways, or one after the other.
Kind = Literal["batched", "vmap", "recorded vmap", "loop"]


class LogDensity(ABC):
    r"""An unnormalised log density :math:`\log p(z)` on :math:`R^D`, for batches of points.

    Whoever writes one sets the attributes and gives `evaluate`, `unpack` and `labels`; values,
    gradients, Hessians and recordings follow. A point with a non-finite density, or a non-finite
    gradient, gets -inf and a zero gradient, and the others are not touched.

    Attributes:
        init_loc: A point (D,) to start from, of the dtype and on the device of the density.
        kind: How a batch is evaluated; with "loop" the cost grows with every row.
        is_random: Whether the density is an estimate, another one at each call.
        has_parameters: Whether it depends on parameters that learn.
        first_seconds: Seconds that its first run took; 0 if no clock was looked at.
    """

    init_loc: Tensor
    kind: Kind = "batched"
    is_random: bool = False
    has_parameters: bool = False
    first_seconds: float = 0.0

    def __init__(self) -> None:
        self.recordings = Recordings()

    # ---- what a density of one's own gives

    @abstractmethod
    def evaluate(self, z: Tensor) -> Tensor:
        """log p (S,) of z (S, D), differentiable, with NaN or inf wherever the density has them."""

    @abstractmethod
    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        """``{name: value (..., *shape)}`` of ``z (..., D)``: what the coordinates stand for."""

    @property
    @abstractmethod
    def labels(self) -> list[str]:
        """A name for each coordinate."""

    def operations(self, z: Tensor) -> Tensor:
        """As `evaluate`, without a second way if the first one fails: what a recording takes."""
        return self.evaluate(z)

    def prior_draw(self, seed: int) -> Tensor:
        """The coordinates (D,) of a draw of the prior; 0 where there is none to draw from."""
        return torch.zeros_like(self.init_loc)

    def prior_draws(self, count: int) -> Tensor | None:
        """The coordinates (count, D) of draws of the prior, if they come all at once."""
        return None

    # ---- what follows

    @property
    def latent_dim(self) -> int:
        """D."""
        return len(self.init_loc)

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) (...,) of z (..., D), differentiable; -inf where it is not finite.

        The gradient of a particle whose density or gradient is not finite is zero.
        """
        self._expect(z)
        if not z.numel():
            return z.sum(-1)
        flat = z.reshape(-1, z.shape[-1])
        if flat.requires_grad:
            flat = flat.clone()
            flat.register_hook(finite_rows)
        if self.has_parameters and torch.is_grad_enabled():
            # A gradient of NaN would reach the model's parameters: failing particles move away.
            with torch.no_grad():
                ok = torch.isfinite(self.evaluate(flat))
            flat = torch.where(ok.unsqueeze(-1), flat, self.init_loc)
            log_prob = torch.where(ok, self.evaluate(flat), -torch.inf)
        else:
            log_prob = self.evaluate(flat)
        log_prob = torch.where(torch.isfinite(log_prob), log_prob, -torch.inf)
        return log_prob.reshape(z.shape[:-1])

    def __call__(self, z: Tensor) -> Tensor:
        """As `log_prob`."""
        return self.log_prob(z)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log p(z) (S,) and its gradient (S, D), outside of any autograd graph.

        A recording for batches of this size is replayed, if `record` made one.
        """
        self._expect(z)
        z = ordinary(z).detach()
        replay = self.recordings.find(z)
        if replay is not None:
            log_prob, grad = replay(z)
        else:
            z = z.requires_grad_()
            with recording(type(self).__name__):
                log_prob = self.evaluate(z)
                if not log_prob.requires_grad:  # nothing depends on any coordinate
                    return log_prob, torch.zeros_like(z)
                (grad,) = torch.autograd.grad(log_prob.sum(), z)
        log_prob = log_prob.detach()
        if bool(torch.isfinite(log_prob.sum() + grad.sum())):  # as is the rule
            return log_prob, grad
        log_prob = torch.where(torch.isfinite(log_prob), log_prob, -torch.inf)
        return log_prob, finite_rows(grad, log_prob)

    def hessian(self, z: Tensor) -> Tensor:
        """d^2 log p / dz^2 (..., D, D) at z (..., D): D double backwards in one batch."""
        self._expect(z)
        dim = z.shape[-1]
        with recording(type(self).__name__):
            rows = ordinary(z).detach().unsqueeze(-2).expand(*z.shape, dim)
            rows = rows.reshape(-1, dim).clone().requires_grad_()
            (grad,) = torch.autograd.grad(self.evaluate(rows).sum(), rows, create_graph=True)
            grad = grad.reshape(*z.shape, dim)
            (hessian,) = torch.autograd.grad(grad.diagonal(dim1=-2, dim2=-1).sum(), rows)
        hessian = hessian.reshape(grad.shape)
        return 0.5 * (hessian + hessian.mT)

    def record(
        self,
        batch_size: int,
        max_seconds: float | None = 1.0,
        clock: Callable[[], float] = time.perf_counter,
        compile: bool = False,
        if_faster: bool = True,
    ) -> bool:
        """Records the operations of `value_and_grad` for batches of one size, to replay them.

        A replay skips Pyro's handlers, the distribution objects and autograd. A density with
        control flow on its coordinates, random numbers or parameters of its own is never recorded.

        Args:
            batch_size: S.
            max_seconds: Give up when recording takes longer, or is expected to; None for never.
            clock: What the seconds are counted with.
            compile: Whether `torch.compile` shall fuse the recording. On eight schools with 64
                particles a call then takes 0.04 instead of 0.37 ms, and the first one 6.5 s.
            if_faster: Whether the recording is kept only if it is the faster by a clock.

        Returns:
            Whether there is a recording now. It has been compared with the density itself, and it
            is faster.
        """
        owner, wanted = f"{type(self).__name__}.record", "a finite number, or None"
        check_count(owner, "batch_size", batch_size)
        check_number(owner, "max_seconds", max_seconds, wanted, optional=True)
        check_clock(owner, clock)
        check_flag(owner, "compile", compile)
        check_flag(owner, "if_faster", if_faster)
        if self.recordings.has(batch_size, self.init_loc.dtype) and not compile:
            return True
        if self.is_random or self.has_parameters or self.kind == "loop":
            return False
        return self.recordings.make(
            self.operations,
            self.value_and_grad,
            _two_batches(self.init_loc, batch_size),
            max_seconds=max_seconds,
            clock=clock,
            compile=compile,
            if_faster=if_faster,
        )

    def trace(
        self,
        batch_size: int,
        max_seconds: float | None = 1.0,
        clock: Callable[[], float] = time.perf_counter,
        compile: bool = False,
        if_faster: bool = True,
    ) -> bool:
        """As `record`, which was once called so."""
        return self.record(batch_size, max_seconds, clock, compile, if_faster)

    def _expect(self, z: Tensor) -> None:
        owner = type(self).__name__
        check_floating(owner, "z", z)
        if z.shape[-1:] != self.init_loc.shape:
            raise ValueError(
                f"{owner}: z has shape {tuple(z.shape)}, but the last dimension must be "
                f"latent_dim = {self.latent_dim}."
            )


def finite_rows(grad: Tensor, log_prob: Tensor | None = None) -> Tensor:
    """Zero instead of each row of a gradient (S, D) that is not finite."""
    finite = torch.isfinite(grad).all(-1, keepdim=True)
    if log_prob is not None:
        finite = finite & torch.isfinite(log_prob).unsqueeze(-1)
    return torch.where(finite, grad, 0.0)


def _two_batches(init_loc: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Points around an initial one: some to record at, and others to compare at."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(size, len(init_loc), dtype=init_loc.dtype, generator=generator)
    noise = 0.1 * noise
    return init_loc + noise.to(init_loc.device), init_loc + noise.flip(0).to(init_loc.device)
