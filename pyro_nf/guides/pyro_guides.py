"""Guides of Pyro's own as distributions of the unconstrained coordinates of a log joint density."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, AutoNormal
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median

from pyro_nf.model.joint import LogJoint
from pyro_nf.sites.improper import masked_priors
from pyro_nf.sites.supports import is_pushed


def own_model(guide: AutoContinuous | AutoNormal) -> Callable[..., Any]:
    """The model that a guide was built for.

    Args:
        guide: The guide.

    Raises:
        TypeError: If it has none any more, since it was unpickled.
    """
    plain = getattr(guide, "plain_model", None)
    try:
        return cast("Callable[..., Any]", guide.model if plain is None else plain)
    except TypeError:
        raise TypeError(
            f"Posterior: the {type(guide).__name__} has no model, since models are not pickled "
            "with guides; pass model= too."
        ) from None


def joint_of(
    guide: AutoContinuous | AutoNormal,
    model: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seed: int,
) -> LogJoint:
    """The log joint density that a guide of Pyro's kind belongs to.

    Args:
        guide: The guide, set up.
        model: The model; the one that the guide was built for by default.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        seed: Of the first run.
    """
    init = getattr(guide, "init_loc_fn", init_to_median)
    own = without_init(guide.model) if model is None else model
    return LogJoint(own, args, kwargs, init_loc_fn=init, seed=seed)


def law_of(
    guide: AutoContinuous | AutoNormal,
    joint: LogJoint,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dist.TorchDistribution:
    """The distribution of the unconstrained coordinates of a guide.

    Args:
        guide: The guide, set up.
        joint: The log joint density.
        args: The model's arguments.
        kwargs: The model's keyword arguments.

    Raises:
        TypeError: If all its mass is at one point.
    """
    if isinstance(guide, AutoNormal):
        q = _flat_normal(guide, tuple(joint.sites))
    else:
        q = guide.get_posterior(*args, **kwargs)
    _check_not_a_point(guide, q)
    return q


def without_init(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model that one of Pyro's guides has wrapped, so that latents take their initial values.

    As it is wrapped it has no draws of the prior.
    """
    for form in (model, getattr(model, "func", None)):
        if isinstance(form, partial) and len(form.args) == 2:
            messenger, inner = form.args
            if isinstance(messenger, InitMessenger):
                return without_init(inner)
    return model


def _check_not_a_point(guide: object, q: dist.TorchDistribution) -> None:
    inner: Any = q
    while hasattr(inner, "base_dist"):
        inner = inner.base_dist
    if isinstance(inner, dist.Delta):
        raise TypeError(
            f"Posterior: {type(guide).__name__} has all its mass at one point, so that its draws "
            "have no weights; take guide.laplace_approximation(*args) of an "
            "AutoLaplaceApproximation, or another guide."
        )


def expect_coordinates(guide: AutoContinuous | AutoNormal) -> None:
    """Raises if a guide of Pyro's has other coordinates than a log joint."""
    prototype: Any = guide.prototype_trace
    masked = masked_priors(prototype)
    for name, site in prototype.iter_stochastic_nodes():
        if name in masked:
            why = "has entries without a prior density"
        elif is_pushed(site["fn"]):
            why = f"reports the support {site['fn'].support}, but has values in a part of it only"
        else:
            continue
        raise ValueError(
            f"Posterior: {type(guide).__name__} cannot be weighed, since the latent site {name!r} "
            f"{why}, and the guide goes beyond. Use an AutoFlow, which knows of it."
        )


def _flat_normal(guide: AutoNormal, sites: Sequence[str]) -> dist.TorchDistribution:
    """The unconstrained latents of an AutoNormal as one vector: it keeps them site by site."""
    pairs = [guide._get_loc_and_scale(name) for name in sites]
    loc, scale = (
        torch.cat([part.reshape(-1) for part in parts]) for parts in zip(*pairs, strict=True)
    )
    return dist.Normal(loc, scale).to_event(1)
