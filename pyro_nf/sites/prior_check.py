"""One validated look at the prior of each latent before anything is inferred."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_nf.sites.latents import Message, Model, latent_nodes
from pyro_nf.sites.layout import LatentSite
from pyro_nf.sites.supports import bijection
from pyro_nf.train.budget import Budget

# To which sides of the initial point one looks, and how far from it at least, in one coordinate.
_SIDES, _SHIFT = (1.0, -1.0, 1.0), 1.5


class _Validated(Messenger):
    """Gives the latents their values, and notes whose prior refuses them."""

    def __init__(self, values: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values, self.moved = values, moved
        self.problems: dict[str, str] = {}

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        if msg["is_observed"] or name not in self.values:
            return
        msg["value"] = self.values[name]
        if name in self.moved and name not in self.problems:
            problem = _problem(name, msg["fn"], self.moved[name])
            if problem:
                self.problems[name] = problem


def _problem(name: str, fn: Any, u: Tensor) -> str:
    """What is wrong with the value of a latent at some coordinates, or ""."""
    x = bijection(name, fn)(u)
    try:
        log_prob = fn.log_prob(x)
    except ValueError as error:
        return str(error).strip().splitlines()[0]
    except NotImplementedError:
        return "it has no log density"
    if bool(torch.isfinite(log_prob).all()):
        return ""
    return f"its prior log density there is {float(log_prob[~log_prob.isfinite()].flatten()[0])}"


def _distance(u: Tensor) -> Tensor:
    """How far to go from the coordinates of a site: of many, each less far."""
    return torch.randn_like(u).abs() + _SHIFT / max(u.numel(), 1) ** 0.5


def check_priors(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    trace: poutine.Trace,
    sites: Mapping[str, LatentSite],
    fixed: Mapping[str, Tensor],
    budget: Budget,
) -> None:
    """Raises if a latent takes values at which its prior has no density.

    One site at a time is looked at some points of its unconstrained space, with the others at their
    initial values, and with the validation of arguments on.

    Args:
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        trace: one run of it.
        sites: the latents that have coordinates.
        fixed: the values of those that have none.
        budget: after it no further point is looked at; one is in any case.

    Raises:
        ValueError: naming the site.
    """
    nodes = latent_nodes(trace)
    values = dict(fixed) | {name: nodes[name]["value"] for name in sites}
    points = {name: sites[name].transform.inv(values[name]).detach() for name in sites}

    def looked_at(side: float) -> _Validated | None:
        """A run at points on that side of the initial one; None if the rest of the model fails."""
        moved = {name: u + side * _distance(u) for name, u in points.items()}
        run = _Validated(values, moved)
        try:
            with torch.no_grad(), pyro.validation_enabled(True), poutine.block(), run:
                model(*args, **kwargs)
        except Exception:  # the rest of the model is looked at elsewhere
            return run if run.problems else None
        return run

    for i, side in enumerate(_SIDES):
        if i and budget.has_seconds and budget.is_spent():
            break
        run = looked_at(side)
        if run is None:
            return
        if run.problems:
            there = looked_at(0.0)
            if there is None or there.problems:
                return  # the initial point itself has no density: the log joint says where
            name, problem = next(iter(run.problems.items()))
            raise ValueError(
                f"latent site {name!r} cannot be mapped from R^n: values of its support "
                f"{nodes[name]['fn'].support} are refused by its own prior ({problem}). Give its "
                "distribution the support that its values have, or write the site as a function of "
                "a latent with a simple one."
            )
