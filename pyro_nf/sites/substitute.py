"""One run of a model with its latents cut from a vector: what it does to Pyro and to torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_nf.sites.centring import SiteCentring, location_and_scale
from pyro_nf.sites.latents import Message
from pyro_nf.sites.layout import LatentSite
from pyro_nf.sites.supports import bijection, is_identity
from pyro_nf.train.modes import exclusive, full_precision

#: What a factorisation raises that fails.
LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


class RecordingTimeout(Exception):
    """A recording took longer than it may."""


class SafeLinalg(TorchFunctionMode):
    """Gives NaN where a factorisation fails, instead of an error for the whole batch.

    It also ends a recording that passes its deadline.
    """

    def __init__(
        self, deadline: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__()
        self.deadline, self.clock = deadline, clock

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.deadline is not None and self.clock() > self.deadline:
            raise RecordingTimeout
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

    Args:
        sites: where each latent lies in z.
        z: coordinates (D,) or (S, D).
        max_plate_nesting: how many batch dimensions the model has, plates or not.
        dynamic: whether supports depend on latents.
        centring: what places the coordinates of some sites by their priors.
        uncentre: whether z is plain, and the centred coordinates are looked for.
        fixed: values of latents that have no coordinates, since nothing depends on them.
        stand_ins: what stands for NaN at the masked entries of observed sites.

    Attributes:
        values: of the latents, as the model sees them.
        coordinates: of the latents on the other side of the centring.
        ladjs: of the centring, each (S,) or ().
        priors: location and scale of the latents that have them.
        terms: of the log density, each (S,) or ().
    """

    def __init__(
        self,
        sites: Mapping[str, LatentSite],
        z: Tensor,
        max_plate_nesting: int,
        dynamic: bool,
        centring: Mapping[str, SiteCentring] | None = None,
        uncentre: bool = False,
        fixed: Mapping[str, Tensor] | None = None,
        stand_ins: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.sites = sites
        self.z = z
        self.max_plate_nesting = max_plate_nesting
        self.dynamic = dynamic
        self.centring = centring or {}
        self.uncentre = uncentre
        self.fixed, self.stand_ins = fixed or {}, stand_ins or {}
        self.values: dict[str, Tensor] = {}
        self.coordinates: dict[str, Tensor] = {}
        self.ladjs: list[Tensor] = []
        self.priors: dict[str, tuple[Tensor, Tensor]] = {}
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
        if name in self.fixed:
            msg["value"] = self.fixed[name]
            return
        if site is None:
            if msg["infer"].get("enumerate") == "parallel":
                return
            raise RuntimeError(
                f"the model sampled a site {name!r} that its first run did not have: every run "
                f"must have the same latent sites."
            )
        batched = self.z.dim() > 1
        u = site.cut(self.z, self.max_plate_nesting - site.batch_ndim if batched else 0)
        u = self._centred(site, fn, u)
        transform = bijection(name, fn) if self.dynamic else site.transform
        value = transform(u)
        msg["value"] = self.values[name] = value
        if not is_identity(transform):
            self._add(site.ladj(transform, u, value))

    def _centred(self, site: LatentSite, fn: Any, u: Tensor) -> Tensor:
        """The plain coordinates of a site; notes those on the other side, and the ladj."""
        prior, centring = location_and_scale(fn), self.centring.get(site.name)
        if prior is not None:
            self.priors[site.name] = prior
        if centring is None:
            self.coordinates[site.name] = u
            return u
        other, ladj = (centring.inverse if self.uncentre else centring.forward)(fn, u)
        event_dims = tuple(range(site.batch_ndim - len(site.unconstrained_shape), 0))
        ladj = ladj.sum(event_dims) if event_dims else ladj
        self.coordinates[site.name] = other
        self.ladjs.append(self._summed(ladj))
        return u if self.uncentre else other

    def _pyro_post_sample(self, msg: Message) -> None:
        fn = msg["fn"]
        if not self.is_scored or isinstance(fn, _Subsample):
            return
        self.last_site = msg["name"]
        value = msg["value"]
        if msg["name"] in self.stand_ins:
            value = torch.where(value.isnan(), self.stand_ins[msg["name"]], value)
        log_prob = fn.log_prob(value, *msg["args"], **msg["kwargs"])
        log_prob = scale_and_mask(log_prob, msg["scale"], msg["mask"])
        # A mask of False gives the number 0.
        self._add(log_prob if isinstance(log_prob, Tensor) else self.z.new_zeros(()))

    def _add(self, term: Tensor) -> None:
        self.terms.append(self._summed(term))

    def _summed(self, term: Tensor) -> Tensor:
        """A term summed over all that is not a particle: shape () or (S,)."""
        self.batch_ndims.append(term.dim())
        if self.z.dim() > 1 and term.dim() > self.max_plate_nesting:
            if term.dim() > self.max_plate_nesting + 1 or term.shape[0] not in (1, len(self.z)):
                raise RuntimeError(
                    f"its log density has shape {tuple(term.shape)} for {len(self.z)} particles"
                )
            return term.reshape(term.shape[0], -1).sum(-1)
        return term.sum()

    def total(self) -> Tensor:
        """log p of each particle in the coordinates z: z.shape[:-1]."""
        return self._total(self.terms) + self.ladj()

    def ladj(self) -> Tensor:
        """log|det| of the centring for each particle: z.shape[:-1]."""
        return self._total(self.ladjs)

    def _total(self, terms: Sequence[Tensor]) -> Tensor:
        total = self.z.new_zeros(self.z.shape[:-1])
        for term in terms:
            total = total + term
        return total


@contextmanager
def fast_pyro() -> Iterator[None]:
    """No validation of arguments inside, as before outside; one thread at a time, no autocast."""
    with exclusive(), pyro.validation_enabled(False), full_precision():
        yield
