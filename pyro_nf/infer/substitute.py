"""One run of a model with its latents cut from a vector: what it does to Pyro and to torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_nf.infer.sites import LatentSite, Message, bijection, event_ladj, is_identity


class TraceTimeout(Exception):
    """A recording took longer than it may."""


class SafeLinalg(TorchFunctionMode):
    """Gives NaN where a factorisation fails, instead of an error for the whole batch.

    It also ends a trace that passes its deadline.
    """

    def __init__(
        self, deadline: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__()
        self.deadline, self.clock = deadline, clock

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.deadline is not None and self.clock() > self.deadline:
            raise TraceTimeout
        kwargs = kwargs or {}
        safe = _SAFE.get(func)
        if safe is None or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        result, info = safe(*args, **kwargs)
        failed = (info != 0).reshape(info.shape + (1,) * (result.dim() - info.dim()))
        return torch.where(failed, torch.nan, result)


_SAFE: dict[Any, Callable[..., Any]] = {
    torch.linalg.cholesky: torch.linalg.cholesky_ex,
    torch.cholesky: lambda x, upper=False: torch.linalg.cholesky_ex(x, upper=upper),
    Tensor.cholesky: lambda x, upper=False: torch.linalg.cholesky_ex(x, upper=upper),
    torch.linalg.inv: torch.linalg.inv_ex,
    torch.inverse: torch.linalg.inv_ex,
    Tensor.inverse: torch.linalg.inv_ex,
    torch.linalg.solve: torch.linalg.solve_ex,
}


class Substitute(Messenger):
    """Gives every latent its value, cut from z (..., D), and sums the log density.

    `pad` dimensions of size 1 stand between the leading dimensions of z and those of a site.
    """

    def __init__(
        self, sites: Mapping[str, LatentSite], z: Tensor, max_batch_ndim: int, dynamic: bool
    ) -> None:
        super().__init__()
        self.sites = sites
        self.z = z
        self.max_batch_ndim = max_batch_ndim
        self.dynamic = dynamic
        self.values: dict[str, Tensor] = {}
        self.last_site = "the start"
        self.terms: list[Tensor] = []
        self.batch_ndims: list[int] = []
        self.is_scored = True

    def _pyro_sample(self, msg: Message) -> None:
        name, fn = msg["name"], msg["fn"]
        if msg["is_observed"] or isinstance(fn, _Subsample):
            return
        self.last_site = name
        site = self.sites.get(name)
        if site is None:
            if msg["infer"].get("enumerate") == "parallel":
                return
            raise RuntimeError(
                f"the model sampled a site {name!r} that its first run did not have: every run "
                f"must have the same latent sites."
            )
        batched = self.z.dim() > 1
        u = site.cut(self.z, self.max_batch_ndim - site.batch_ndim if batched else 0)
        transform = bijection(name, fn) if self.dynamic else site.transform
        value = transform(u)
        msg["value"] = self.values[name] = value
        if not is_identity(transform):
            self._add(event_ladj(transform, u, value, fn.event_dim))

    def _pyro_post_sample(self, msg: Message) -> None:
        fn = msg["fn"]
        if not self.is_scored or isinstance(fn, _Subsample):
            return
        self.last_site = msg["name"]
        log_prob = fn.log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        log_prob = scale_and_mask(log_prob, msg["scale"], msg["mask"])
        # A mask of False gives the number 0.
        self._add(log_prob if isinstance(log_prob, Tensor) else self.z.new_zeros(()))

    def _add(self, term: Tensor) -> None:
        """Sums a term over all that is not a particle: shape () or (S,)."""
        self.batch_ndims.append(term.dim())
        if self.z.dim() > 1 and term.dim() > self.max_batch_ndim:
            if term.dim() > self.max_batch_ndim + 1 or term.shape[0] not in (1, len(self.z)):
                raise RuntimeError(
                    f"its log density has shape {tuple(term.shape)} for {len(self.z)} particles"
                )
            term = term.reshape(term.shape[0], -1).sum(-1)
        else:
            term = term.sum()
        self.terms.append(term)

    def total(self) -> Tensor:
        """log p of each particle: z.shape[:-1]."""
        total = self.z.new_zeros(self.z.shape[:-1])
        for term in self.terms:
            total = total + term
        return total


@contextmanager
def fast_pyro() -> Iterator[None]:
    """No validation of arguments inside, as before outside."""
    with pyro.validation_enabled(False):
        yield
