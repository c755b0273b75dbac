"""A Pyro model as a function of the coordinates of its latents: one run for each call."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_nf.model.enumeration import Enumeration
from pyro_nf.sites.centring import SiteCentring
from pyro_nf.sites.improper import kept_entries, stand_ins
from pyro_nf.sites.latents import (
    InitLocFn,
    Model,
    init_anywhere,
    latent_nodes,
    trace_prototype,
)
from pyro_nf.sites.layout import Layout
from pyro_nf.sites.substitute import Substitute, fast_pyro
from pyro_nf.sites.supports import bijection


@dataclass(kw_only=True, eq=False)
class ModelRun:
    """The log joint density of one point z (D,), or of a batch (S, D), by one run of the model.

    A batch needs a model that broadcasts over a dimension to the left of its plates.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        layout: Where each latent lies in z.
        max_plate_nesting: How many batch dimensions the model has, plates or not.
        fixed: Values of latents without coordinates.
        stand_ins: What stands for NaN at the masked entries of observed sites.
        dynamic_sites: Latents whose support depends on other latents.
        centring: What places the coordinates of some sites by their priors.

    Attributes:
        last_site: The site that the last run came to last, for messages.
    """

    model: Model
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layout: Layout
    max_plate_nesting: int
    fixed: Mapping[str, Tensor]
    stand_ins: Mapping[str, Tensor]
    dynamic_sites: tuple[str, ...] = ()
    centring: Mapping[str, SiteCentring] = field(default_factory=dict)
    last_site: str = field(default="", init=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """log p, of shape z.shape[:-1]."""
        return self.noted(z, bool(self.dynamic_sites)).total()

    def noted(self, z: Tensor, dynamic: bool) -> Substitute:
        """What a run notes: the terms of the density, values, priors and shapes.

        Args:
            z: Coordinates (D,) or (S, D).
            dynamic: Whether supports may depend on latents.
        """
        given = self._given(z, dynamic)
        try:
            with poutine.block():
                self._score(given)
        finally:
            self.last_site = given.last_site
        return given

    def _given(self, z: Tensor, dynamic: bool, uncentre: bool = False) -> Substitute:
        return Substitute(
            self.layout.sites,
            z,
            self.max_plate_nesting,
            dynamic,
            self.centring,
            uncentre,
            self.fixed,
            self.stand_ins,
        )

    def _score(self, given: Substitute) -> None:
        """Runs the model with its latents given, and adds all terms of its log density."""
        with given:
            self.model(*self.args, **self.kwargs)

    def move(self, z: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """From centred coordinates to plain ones, or back, and the ladj of that direction.

        Args:
            z: Coordinates (D,) or (S, D).
            inverse: Whether z is plain.
        """
        given = self._given(z, dynamic=False, uncentre=inverse)
        given.is_scored = False
        with poutine.block(), given:
            self.model(*self.args, **self.kwargs)
        return self.layout.join(given.coordinates, z.shape[:-1]), given.ladj()

    def coordinates(self, trace: poutine.Trace) -> Tensor:
        """z (D,) of the values that the latents have in a run."""
        if not self.centring:
            return self.layout.coordinates(trace)
        nodes: dict[str, Any] = dict(trace.nodes)
        us = {}
        for name, site in self.layout.sites.items():
            us[name] = site.transform.inv(nodes[name]["value"]).detach()
            if name in self.centring:
                us[name], _ = self.centring[name].inverse(nodes[name]["fn"], us[name])
        return self.layout.join(us).detach()

    def prior_values(self, like: Tensor, *around: Any) -> dict[str, Tensor]:
        """The unconstrained value of each latent in one run that draws the prior.

        Args:
            like: A tensor of the dtype and on the device of the coordinates.
            *around: What else stands around the run, such as a plate.
        """
        draw = InitMessenger(init_anywhere(init_to_sample, like.dtype, like.device))
        with ExitStack() as stack:
            for context in (torch.no_grad(), fast_pyro(), poutine.block(), draw, *around):
                stack.enter_context(context)
            trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        nodes: dict[str, Any] = dict(trace.nodes)
        us = {}
        for name, site in self.layout.sites.items():
            fn = nodes[name]["fn"]
            transform = bijection(name, fn) if self.dynamic_sites else site.transform
            us[name] = transform.inv(nodes[name]["value"]).to(like.dtype)
        return us


@dataclass(kw_only=True, eq=False)
class EnumeratedRun(ModelRun):
    """A run with all values of the discrete latents, which are summed out.

    Args:
        enumeration: Of the discrete latents.
    """

    enumeration: Enumeration

    def _score(self, given: Substitute) -> None:
        given.is_scored = False
        particles = len(given.z) if given.z.dim() > 1 else None
        given.terms.append(self.enumeration.log_prob(given, self.args, self.kwargs, particles))


def first_run(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], init_loc_fn: InitLocFn
) -> poutine.Trace:
    """A run with every latent at its initial value, whether the density is finite there or not."""
    try:
        return trace_prototype(model, args, kwargs, init_loc_fn)
    except ValueError:
        # Validation refuses numbers that are not finite at the initial point; others may be.
        with fast_pyro():
            return trace_prototype(model, args, kwargs, init_loc_fn)


def read_model(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], trace: poutine.Trace
) -> ModelRun:
    """The runs of a model, by what a first run shows: sites, their coordinates, its plates."""
    depth, nodes = 0, dict[str, Any](trace.nodes)
    for node in nodes.values():
        if node["type"] == "sample" and not isinstance(node["fn"], _Subsample):
            dims = [-f.dim for f in node["cond_indep_stack"] if f.vectorized]
            depth = max([depth, len(node["fn"].batch_shape), *dims])
    latents = latent_nodes(trace)
    discrete = tuple(name for name, n in latents.items() if n["fn"].has_enumerate_support)
    layout = Layout.of_trace(trace, kept_entries(model, args, kwargs, trace), discrete)
    if not layout.latent_dim:
        raise ValueError("the model has no continuous latent site: nothing is to be inferred.")
    left_out = latents.keys() - layout.sites.keys() - set(discrete)
    known: dict[str, Any] = {
        "model": model,
        "args": args,
        "kwargs": kwargs,
        "layout": layout,
        "max_plate_nesting": depth,
        "fixed": {name: latents[name]["value"].detach() for name in left_out},
        "stand_ins": stand_ins(trace),
    }
    if discrete:
        return EnumeratedRun(**known, enumeration=Enumeration(model, discrete, depth))
    return ModelRun(**known)
