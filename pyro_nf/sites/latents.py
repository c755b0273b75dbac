"""The latent sites of a model: their supports, their initial values, their place in a vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Transform

from pyro_nf.ops.devices import device_of
from pyro_nf.sites.supports import (
    Supported,
    bijection,
    event_ladj,
    is_flat,
    is_pushed,
    pulled_inside,
)

Model = Callable[..., Any]
InitLocFn = Callable[..., Tensor]
Message = Any  # Pyro's message: a dict whose keys depend on the kind of the site


def init_anywhere(
    init_loc_fn: InitLocFn, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> InitLocFn:
    """`init_loc_fn`, with the image of 0 for the sites that it cannot take (flat priors, mixtures).

    Args:
        init_loc_fn: one of Pyro's `init_to_*` functions.
        dtype: of the flat priors, which have no parameters to tell it. Default: torch's default.
        device: of the flat priors. Default: torch's default.

    Returns:
        An `init_loc_fn` that takes `ImproperUniform` sites too.
    """

    def init(site: Message) -> Tensor:
        fn = site["fn"]
        try:
            # Pyro's functions go by the support that a distribution reports.
            asked = {**site, "fn": Supported(fn)} if is_pushed(fn) else site
            return init_loc_fn(asked)
        except NotImplementedError:
            flat, transform = is_flat(fn), bijection(site["name"], fn)
        shape = transform.inverse_shape(fn.shape())
        if flat:
            return transform(torch.zeros(shape, dtype=dtype, device=device))
        return transform(fn.sample().new_zeros(shape))

    return init


def refuse_subsampled_latents(trace: poutine.Trace) -> None:
    """Raise if a latent lies in a subsampled plate.

    Args:
        trace: one run of the model.

    Raises:
        ValueError: naming the site and the plate.
    """
    for name, site in trace.iter_stochastic_nodes():
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"latent site {name!r} lies in plate {frame.name!r}, which takes a subsample "
                    f"of {frame.size} of {frame.full_size} rows: its coordinates would stand for "
                    f"other rows in every step. Use the whole plate, or move the latent out of it."
                )


def trace_prototype(
    model: Model,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    init_loc_fn: InitLocFn = init_to_median,
) -> poutine.Trace:
    """One run of the model with every latent at its initial value.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        init_loc_fn: one of Pyro's `init_to_*`; flat priors start at the image of 0.

    Raises:
        ValueError: a latent lies in a subsampled plate: its coordinates would stand for other
            rows in every run.
    """

    def run(dtype: torch.dtype) -> poutine.Trace:
        started = InitMessenger(init_anywhere(init_loc_fn, dtype, device))(model)
        with poutine.block():
            return poutine.trace(started).get_trace(*args, **(kwargs or {}))

    default, device = torch.get_default_dtype(), device_of(model, args, kwargs)
    try:
        trace = run(default)
    except RuntimeError as error:
        # Flat priors have no dtype of their own: theirs is that of the data they meet.
        if "dtype" not in str(error):
            raise
        trace = run(torch.float32 if default == torch.float64 else torch.float64)
    refuse_subsampled_latents(trace)
    return trace


@dataclass(frozen=True)
class LatentSite:
    """Where a latent site lies in the flat vector, and how it leaves it.

    Attributes:
        name: name of the site.
        shape: shape of its constrained value.
        unconstrained_shape: shape of its coordinates before flattening.
        batch_ndim: how many of the first dimensions of both are batch dimensions.
        start: first coordinate.
        size: number of coordinates.
        transform: unconstrained -> constrained, as the first run of the model had it.
        event_dim: how many of the last dimensions of `shape` are one event.
        keep: which batch entries have coordinates, of the shape of the batch; None for all. The
            others have neither a prior density nor data: they are at `fixed`.
        fixed: the unconstrained values of the first run, of `unconstrained_shape`.
    """

    name: str
    shape: torch.Size
    unconstrained_shape: torch.Size
    batch_ndim: int
    start: int
    size: int
    transform: Transform
    event_dim: int = 0
    keep: Tensor | None = None
    fixed: Tensor | None = None

    def cut(self, z: Tensor, pad: int = 0) -> Tensor:
        """The site's coordinates of z (..., D) as (..., 1 * pad, *unconstrained_shape)."""
        piece = self.complete(z[..., self.start : self.start + self.size])
        return piece.reshape(z.shape[:-1] + (1,) * pad + self.unconstrained_shape)

    def complete(self, piece: Tensor) -> Tensor:
        """Coordinates (..., size) with those of the entries that have none: (..., all)."""
        if self.keep is None or self.fixed is None:
            return piece
        kept = self.kept
        rest = self.fixed.reshape(-1)[~kept].to(piece)
        piece = torch.cat([piece, rest.expand(*piece.shape[:-1], -1)], -1)
        # The coordinates are first, the rest follows; this is where each of all is found.
        return piece[..., (~kept).long().argsort(stable=True).argsort()]

    def flat(self, u: Tensor, lead: torch.Size) -> Tensor:
        """Unconstrained values (*lead, ..., *unconstrained_shape) as coordinates (*lead, size)."""
        u = u.reshape(*lead, -1)
        return u if self.keep is None else u[..., self.kept]

    @property
    def kept(self) -> Tensor:
        """Which of all unconstrained values are coordinates, flat."""
        count = self.unconstrained_shape.numel()
        if self.keep is None:
            return torch.ones(count, dtype=torch.bool)
        event = (1,) * (len(self.unconstrained_shape) - self.batch_ndim)
        return (
            self.keep.reshape(*self.keep.shape, *event).expand(self.unconstrained_shape).reshape(-1)
        )

    def ladj(self, transform: Transform, u: Tensor, value: Tensor) -> Tensor:
        """log|d value / d u| of each batch entry; 0 where there are no coordinates."""
        ladj = event_ladj(transform, u, value, self.event_dim)
        return ladj if self.keep is None else torch.where(self.keep, ladj, 0.0)

    def pulled_inside(self, fn: Any, value: Tensor) -> tuple[Tensor, Tensor]:
        """Values (*lead, *shape) off the ends of the support, and which batch entries have none.

        Entries without coordinates are never outside.
        """
        value, outside = pulled_inside(fn, value)
        outside = outside.reshape(*value.shape[: value.dim() - self.event_dim], -1).any(-1)
        return value, outside if self.keep is None else outside & self.keep

    @property
    def labels(self) -> list[str]:
        """A name for each coordinate."""
        if not self.unconstrained_shape:
            return [self.name]
        shape = self.unconstrained_shape
        kept = self.kept.nonzero().reshape(-1).tolist()
        if shape.numel() == 1 and self.keep is None:
            return [self.name]
        index = [
            ", ".join(str(i // math.prod(shape[d + 1 :]) % shape[d]) for d in range(len(shape)))
            for i in kept
        ]
        return [f"{self.name}[{i}]" for i in index]


def latent_sites(
    trace: poutine.Trace, keeps: Mapping[str, Tensor], skip: Collection[str] = ()
) -> dict[str, LatentSite]:
    """Where each latent of a run lies in the flat vector.

    Args:
        trace: one run of the model.
        keeps: which batch entries of some sites have coordinates.
        skip: sites that have none.

    Raises:
        ValueError: a support that cannot be mapped.
    """
    sites: dict[str, LatentSite] = {}
    start = 0
    for name, node in latent_nodes(trace).items():
        fn, value, keep = node["fn"], node["value"], keeps.get(name)
        if name in skip or (keep is not None and not bool(keep.any())):
            continue
        transform = bijection(name, fn)
        u = transform.inv(value).detach()
        site = LatentSite(
            name,
            value.shape,
            u.shape,
            value.dim() - fn.event_dim,
            start,
            u.numel(),
            transform,
            fn.event_dim,
            keep,
            None if keep is None else u,
        )
        if keep is not None:
            site = replace(site, size=int(site.kept.sum()))
        sites[name] = site
        start += site.size
    return sites


def latent_nodes(trace: poutine.Trace) -> dict[str, Any]:
    """The nodes of a run that were drawn, subsamples aside."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and not node["is_observed"]
        if not isinstance(node["fn"], _Subsample)
    }
