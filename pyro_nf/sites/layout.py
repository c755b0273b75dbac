r"""One flat vector for all latents of a model: which coordinates are whose, pack and unpack.

.. math:: x_s = T_s(z_s), \qquad z = (z_1, \dots, z_n) \in R^D,

where s runs over the latent sites in the order of the trace, and :math:`T_s` maps the whole space
:math:`R^{d_s}` to the support of the site. These are the coordinates of Pyro's `AutoContinuous`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Transform

from pyro_nf._checks import check_floating, check_kind
from pyro_nf.sites.latents import latent_nodes
from pyro_nf.sites.supports import bijection, event_ladj, pulled_inside


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

    def cut_within_plates(self, z: Tensor) -> Tensor:
        """The site's unconstrained value of z (..., D) that was drawn inside of Pyro's plates.

        The dimensions of those plates are batch dimensions of the site, or stand to their left.
        """
        piece = self.complete(z[..., self.start : self.start + self.size])
        event = (1,) * (len(self.unconstrained_shape) - self.batch_ndim)
        shape = torch.broadcast_shapes(self.unconstrained_shape, z.shape[:-1] + event)
        return piece.reshape(shape)

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

    def lead(self, u: Tensor) -> torch.Size:
        """What stands in front of an unconstrained value (*lead, *unconstrained_shape)."""
        return u.shape[: u.dim() - len(self.unconstrained_shape)]

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


@dataclass(frozen=True, eq=False)
class Layout:
    """The latent sites of a model and their places in a flat vector z (..., D).

    The log joint density of a model and its guide have the same one.

    Attributes:
        sites: {name: LatentSite}, in the order of the coordinates.
        latent_dim: D.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("tau", dist.HalfCauchy(5.0))
        >>> layout = Layout.of_trace(poutine.trace(model).get_trace())
        >>> layout.labels
        ['mu[0]', 'mu[1]', 'tau']
        >>> layout.unpack(torch.zeros(3))
        {'mu': tensor([0., 0.]), 'tau': tensor(1.)}
        >>> layout.pack(layout.unpack(torch.zeros(3)))
        tensor([0., 0., 0.])
    """

    sites: dict[str, LatentSite]
    latent_dim: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "latent_dim", sum(site.size for site in self.sites.values()))

    @classmethod
    def of_trace(
        cls,
        trace: poutine.Trace,
        keeps: Mapping[str, Tensor] | None = None,
        skip: Collection[str] = (),
    ) -> Layout:
        """Where each latent of a run lies in the flat vector.

        Args:
            trace: one run of the model.
            keeps: which batch entries of some sites have coordinates; the others have all.
            skip: sites that have none.

        Raises:
            ValueError: a support that cannot be mapped.
        """
        sites: dict[str, LatentSite] = {}
        start = 0
        for name, node in latent_nodes(trace).items():
            fn, value, keep = node["fn"], node["value"], (keeps or {}).get(name)
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
        return cls(sites)

    @property
    def labels(self) -> list[str]:
        """A name for each coordinate."""
        return [label for site in self.sites.values() for label in site.labels]

    @property
    def owners(self) -> list[str]:
        """The site that each coordinate belongs to."""
        return [name for name, site in self.sites.items() for _ in range(site.size)]

    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        """``{site: constrained value (..., *shape)}`` of ``z (..., D)``."""
        return {name: site.transform(site.cut(z)) for name, site in self.sites.items()}

    def join(self, us: Mapping[str, Tensor], lead: torch.Size | None = None) -> Tensor:
        """z (..., D) of the unconstrained value of each site.

        Args:
            us: {site: (*lead, *unconstrained_shape)}; the leading dimensions are broadcast.
            lead: the leading dimensions, if those of a site are followed by others of size 1.
        """
        pieces = [
            site.flat(us[name], site.lead(us[name]) if lead is None else lead)
            for name, site in self.sites.items()
        ]
        lead = torch.broadcast_shapes(*(piece.shape[:-1] for piece in pieces))
        return torch.cat([piece.expand(lead + piece.shape[-1:]) for piece in pieces], -1)

    def coordinates(self, trace: poutine.Trace) -> Tensor:
        """z (D,) of the values that the latents have in a run."""
        nodes: dict[str, Any] = dict(trace.nodes)
        values = {name: nodes[name]["value"].detach() for name in self.sites}
        return self.join({name: self.sites[name].transform.inv(x) for name, x in values.items()})

    def pack(self, values: Mapping[str, Tensor], owner: str = "Layout.pack") -> Tensor:
        """``z (..., D)`` of ``{site: constrained value (..., *shape)}``, the inverse of `unpack`.

        Args:
            values: a value for each site; their leading dimensions are broadcast.
            owner: who asks, for the message.

        Raises:
            ValueError: a site is missing or has the wrong shape.
            TypeError: a value is no tensor of floating-point numbers.
        """
        check_kind(owner, "values", values, Mapping)
        for name, value in values.items():
            check_floating(owner, f"values[{name!r}]", value)
        us = {}
        for name, site in self.sites.items():
            if name not in values:
                raise ValueError(f"{owner}: site {name!r} is missing; wanted {list(self.sites)}.")
            value = values[name]
            if value.shape[value.dim() - len(site.shape) :] != site.shape:
                raise ValueError(
                    f"{owner}: site {name!r} has shape {tuple(value.shape)}, but its last "
                    f"dimensions must be {tuple(site.shape)}."
                )
            us[name] = site.transform.inv(value)
        return self.join(us)

    def pack_inside(
        self, values: Mapping[str, Tensor], trace: poutine.Trace
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `pack`, for values that may lie at or beyond the ends of their supports.

        Args:
            values: {site: constrained value (..., *shape)}.
            trace: a run; its values stand in for those that are outside.

        Returns:
            z (..., D), the sum of all log|dx / dz| (...), and whether some value is outside (...).
        """
        us, ladjs, outsides = {}, list[Tensor](), list[Tensor]()
        nodes: dict[str, Any] = dict(trace.nodes)
        for name, site in self.sites.items():
            node = nodes[name]
            value, outside = site.pulled_inside(node["fn"], values[name])
            lead = value.shape[: value.dim() - len(site.shape)]
            of_event = (*outside.shape, *(1,) * site.event_dim)
            value = value.where(~outside.reshape(of_event), node["value"])
            us[name] = site.transform.inv(value)
            ladjs.append(site.ladj(site.transform, us[name], value).reshape(*lead, -1).sum(-1))
            outsides.append(outside.reshape(*lead, -1).any(-1))
        return self.join(us), reduce(torch.add, ladjs), reduce(torch.logical_or, outsides)
