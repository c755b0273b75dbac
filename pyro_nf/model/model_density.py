"""A log density whose values come from runs of a Pyro model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_nf._checks import check_callable, check_seed, check_tensor
from pyro_nf.model.density import LogDensity
from pyro_nf.model.evaluators import Batched, Evaluator, Vmap
from pyro_nf.model.runs import EnumeratedRun, ModelRun
from pyro_nf.sites.latents import InitLocFn, Model, trace_prototype
from pyro_nf.sites.layout import LatentSite, Layout
from pyro_nf.sites.substitute import SafeLinalg, fast_pyro

INIT_WANTED = "a function of a site, such as pyro's init_to_median"


class ModelDensity(LogDensity):
    """The log joint density of a model in the coordinates of a layout, or in centred ones.

    Attributes:
        run: One run of the model, for a point or a batch.
        evaluator: How a batch is evaluated.
    """

    run: ModelRun
    evaluator: Evaluator

    # ---- what it is of

    @property
    def model(self) -> Model:
        """The Pyro model; another one must have the same sites."""
        return self.run.model

    @model.setter
    def model(self, model: Model) -> None:
        self.run.model = model

    @property
    def args(self) -> tuple[Any, ...]:
        """The model's positional arguments."""
        return self.run.args

    @property
    def kwargs(self) -> dict[str, Any]:
        """The model's keyword arguments."""
        return self.run.kwargs

    @property
    def layout(self) -> Layout:
        """Where each latent lies in the flat vector."""
        return self.run.layout

    @property
    def sites(self) -> dict[str, LatentSite]:
        """{name: LatentSite}, in the order of the coordinates."""
        return self.run.layout.sites

    @property
    def latent_dim(self) -> int:
        """D."""
        return self.run.layout.latent_dim

    @property
    def labels(self) -> list[str]:
        """A name for each coordinate."""
        return self.run.layout.labels

    @property
    def dynamic_sites(self) -> tuple[str, ...]:
        """Latent sites whose support depends on other latents."""
        return self.run.dynamic_sites

    @property
    def enumerated_sites(self) -> tuple[str, ...]:
        """Discrete latents that are summed out."""
        return self.run.enumeration.names if isinstance(self.run, EnumeratedRun) else ()

    @property
    def max_plate_nesting(self) -> int:
        """How many batch dimensions the model has, plates or not: particles stand left of them."""
        return self.run.max_plate_nesting

    # ---- its values

    def evaluate(self, z: Tensor) -> Tensor:
        """log p (S,) of z (S, D), differentiable, with NaN or inf wherever the model has them."""
        return self.evaluator.robust(z)

    def operations(self, z: Tensor) -> Tensor:
        """As `evaluate`, without a second way where a factorisation fails."""
        return self.evaluator(z)

    def failing_sites(self, z: Tensor) -> list[str]:
        """The sites whose log density is not finite at one point ``z (D,)``, in their order.

        Example:
            >>> import torch, pyro, pyro.distributions as dist
            >>> from pyro_nf.model.joint import LogJoint
            >>> def model():
            ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
            ...     pyro.sample("y", dist.Normal((x - 3).sqrt(), 1.0), obs=torch.tensor(0.0))
            >>> joint = LogJoint(model, init_loc_fn=lambda _: torch.tensor(4.0))
            >>> joint.failing_sites(torch.zeros(1))
            ['y']
        """
        owner = f"{type(self).__name__}.failing_sites"
        check_tensor(owner, "z", z, (self.latent_dim,), finite=False)
        with torch.no_grad(), fast_pyro(), poutine.block():
            model = poutine.condition(self.model, self.unpack(z))
            nodes: dict[str, Any] = dict(
                poutine.trace(model).get_trace(*self.args, **self.kwargs).nodes
            )
            return [
                name
                for name, node in nodes.items()
                if node["type"] == "sample" and not isinstance(node["fn"], _Subsample)
                if not bool(node["fn"].log_prob(node["value"]).isfinite().all())
            ]

    # ---- its coordinates

    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        """``{site: constrained value (..., *shape)}`` of ``z (..., D)``."""
        self._expect(z)
        if not self.dynamic_sites:
            return self.layout.unpack(self._moved(self.run, z)[0])
        flat = z.reshape(-1, self.latent_dim)
        with torch.no_grad(), fast_pyro(), SafeLinalg():
            runs = [self.run.noted(zi, dynamic=True).values for zi in flat]
        return {
            name: torch.stack([values[name] for values in runs]).reshape(z.shape[:-1] + site.shape)
            for name, site in self.sites.items()
        }

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """``z (..., D)`` of ``{site: constrained value (..., *shape)}``, the inverse of `unpack`.

        Raises:
            ValueError: A site is missing or has the wrong shape; a support depends on latents.
        """
        owner = f"{type(self).__name__}.pack"
        if self.dynamic_sites:
            raise ValueError(
                f"{owner}: the supports of {list(self.dynamic_sites)} depend on other latents, so "
                "that their values cannot be packed one by one."
            )
        z = self.layout.pack(values, owner).to(self.init_loc.dtype)
        return self._moved(self.run, z, inverse=True)[0]

    def _moved(self, run: ModelRun, z: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """From the centred coordinates of a run to plain ones, or back, and the ladj (...)."""
        if not (run.centring and z.numel()):
            return z, z.new_zeros(z.shape[:-1])
        with fast_pyro(), SafeLinalg():
            move = partial(run.move, inverse=inverse)
            other, ladj = self.evaluator.over(move, z.reshape(-1, z.shape[-1]))
        return other.reshape(z.shape), ladj.reshape(z.shape[:-1])

    def init(self, init_loc_fn: InitLocFn, seed: int = 0) -> Tensor:
        """The coordinates (D,) of another initial point."""
        owner = f"{type(self).__name__}.init"
        check_callable(owner, "init_loc_fn", init_loc_fn, INIT_WANTED, count=1)
        check_seed(owner, seed)
        with torch.random.fork_rng(devices=[]), fast_pyro():
            torch.manual_seed(seed)
            trace = trace_prototype(self.model, self.args, self.kwargs, init_loc_fn)
        return self.run.coordinates(trace).to(self.init_loc.dtype)

    def prior_draw(self, seed: int) -> Tensor:
        """The coordinates (D,) of a draw of the prior; 0 for flat priors, which have no draws."""
        check_seed(f"{type(self).__name__}.prior_draw", seed)
        return self.init(init_to_sample, seed)

    def prior_draws(self, count: int) -> Tensor | None:
        """The coordinates (count, D) of draws of the prior by one run, if a batch is one run."""
        if self.run.centring:
            return None
        if isinstance(self.evaluator, Batched):
            return self._prior_by_batch(count)
        return self._prior_by_vmap(count) if type(self.evaluator) is Vmap else None

    def _prior_by_batch(self, count: int) -> Tensor | None:
        depth, lead = self.max_plate_nesting, torch.Size((count,))
        us = self.run.prior_values(self.init_loc, pyro.plate("_draws", count, dim=-1 - depth))
        for name, site in self.sites.items():
            pad = (1,) * (depth - site.batch_ndim)
            if us[name].shape != (count, *pad, *site.unconstrained_shape):
                return None
        return self.layout.join(us, lead)

    def _prior_by_vmap(self, count: int) -> Tensor:
        def one(_: Tensor) -> Tensor:
            return self.layout.join(self.run.prior_values(self.init_loc))

        draws: Tensor = torch.func.vmap(one, randomness="different")(self.init_loc.new_zeros(count))
        return draws
