"""The log joint density of a Pyro model as one batched function of one flat vector."""

import random
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

from pyro_nf._checks import (
    check_arguments,
    check_callable,
    check_flag,
    check_kind,
    check_seed,
    check_tensor,
)
from pyro_nf.model.evaluators import Batched, Evaluator, Loop, Vmap, choose_evaluator
from pyro_nf.model.model_density import INIT_WANTED, ModelDensity
from pyro_nf.model.runs import ModelRun, first_run, read_model
from pyro_nf.sites.centring import SiteCentring, location_and_scale
from pyro_nf.sites.improper import refuse_flat_directions, suspects
from pyro_nf.sites.latents import InitLocFn, Model
from pyro_nf.sites.prior_check import check_priors
from pyro_nf.sites.substitute import SafeLinalg, Substitute, fast_pyro
from pyro_nf.train.budget import Budget
from pyro_nf.train.modes import exclusive, recording

# Single runs for the check of a batch may take such a share of the seconds of a fit.
_CHECK_SHARE = 0.05
# Sites of a batch of this many particles (or one of the primes after it) are never mistaken for
# a dimension of the model, so that a check with it shows every wrong broadcast.
_CHECK_BATCHES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 1009)
# Runs at one point that are compared to see whether the density is random: of a model that drew
# from a global generator, and of another.
_RUNS_THAT_DREW, _RUNS = 24, 8


class LogJoint(ModelDensity):
    r"""The flat batched log joint density of a Pyro model.

    .. math::
        \log p(z) = \sum_s \log p(x_s \mid x_{<s}) + \sum_{s\ \mathrm{latent}} \log |dx_s / dz_s|,
        \qquad x_s = \mathrm{biject\_to}(\mathrm{support}_s)(z_s),

    where s runs over the sites of the model and z of shape (D,) holds the unconstrained
    coordinates of all latent sites, in the order of the trace, flattened and concatenated (the
    coordinates of Pyro's `AutoContinuous`). The model is run once for a whole batch (S, D): the
    particles stand in an extra dimension to the left of all plates.

    Not every model broadcasts over such a dimension. At construction the batched value is compared
    with single evaluations; when they differ, `torch.func.vmap` takes over, and when that fails
    too, a loop. One warning then says which site prevents it. Discrete sites that can be
    enumerated are summed out. A particle with a non-finite log density, or a failing
    factorisation, gets -inf and a zero gradient, and the others are not touched.

    Args:
        model: a Pyro model with at least one continuous latent site.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        init_loc_fn: one of Pyro's `init_to_*`; gives `init_loc`.
        prototype: a trace of the model to take the sites from, if there is one already.
        seed: of the prototype run and of the points of the check. The global generator is left
            as it was.
        budget: what a fit may take; the check is made with fewer points if they would take a large
            share of it.

    Attributes:
        latent_dim: D.
        layout: where each latent lies in z.
        sites: {name: LatentSite}, in the order of the coordinates.
        init_loc: (D,), the coordinates of the first run.
        kind: "batched", "vmap", "recorded vmap" or "loop": how a batch is evaluated.
        reason: why it is not "batched", or "".
        is_random: the model draws random numbers of its own (or takes a subsample), so that the
            density is an estimate.
        has_parameters: the density depends on learnable parameters of the model.
        dynamic_sites: latent sites whose support depends on other latents. `unpack` knows them,
            Pyro's `AutoContinuous` does not.
        enumerated_sites: discrete latents that are summed out.
        hierarchical_sites: latent sites whose prior has a location or a scale that depends on other
            latents, if a batch can be run at once; `recentred` knows what to do with them.

    Raises:
        ValueError: no continuous latent; a latent in a subsampled plate; a non-finite log joint
            at the initial point and around it.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, tau), obs=y)
        >>> joint = LogJoint(model, (torch.tensor([1.0, 2.0, 4.0]),))
        >>> joint.latent_dim, joint.kind
        (2, 'batched')
        >>> joint.log_prob(torch.zeros(100, 2)).shape
        torch.Size([100])
        >>> {name: tuple(x.shape) for name, x in joint.unpack(torch.zeros(100, 2)).items()}
        {'mu': (100,), 'tau': (100,)}
    """

    def __init__(
        self,
        model: Model,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        init_loc_fn: InitLocFn = init_to_median,
        prototype: poutine.Trace | None = None,
        seed: int = 0,
        budget: Budget | None = None,
    ) -> None:
        check_arguments("LogJoint", model, args, kwargs)
        check_callable("LogJoint", "init_loc_fn", init_loc_fn, INIT_WANTED, count=1)
        check_kind("LogJoint", "prototype", prototype, poutine.Trace, optional=True)
        check_seed("LogJoint", seed)
        check_kind("LogJoint", "budget", budget, Budget, optional=True)
        super().__init__()
        self._budget = Budget() if budget is None else budget
        with ExitStack() as inside:
            for context in (
                recording("LogJoint"),
                exclusive(),
                torch.random.fork_rng(devices=[]),
                warnings.catch_warnings(),
            ):
                inside.enter_context(context)
            torch.manual_seed(seed)
            warnings.filterwarnings("ignore", message="Found .* default for .* enumerate")
            args, given = tuple(args), dict(kwargs or {})
            began = self._budget.clock() if self._budget.has_seconds else 0.0
            trace = prototype or first_run(model, args, given, init_loc_fn)
            if self._budget.has_seconds:
                self.first_seconds = self._budget.clock() - began
            self.run = read_model(model, args, given, trace)
            self.init_loc = self.run.coordinates(trace)
            part = self._budget.part(_CHECK_SHARE)
            if not self._is_late(runs=2):  # one of them must be
                check_priors(model, args, given, trace, self.sites, self.run.fixed, part)
            there = self._inspect()
            self._choose_evaluator()
            suspected = suspects(trace)
            is_dear = self.kind == "loop" and not suspected  # a run for each point
            if not (self.is_random or is_dear or self._is_late()):
                refuse_flat_directions(self.value_and_grad, self.init_loc, self.layout, suspected)
            self.hierarchical_sites = self._hierarchy(trace, there)

    def __repr__(self) -> str:
        sites = ", ".join(f"{name} {tuple(site.shape)}" for name, site in self.sites.items())
        sites = sites if len(sites) <= 200 else f"{sites[:200]} ..."
        return f"LogJoint(latent_dim={self.latent_dim}, kind={self.kind!r}, sites: {sites})"

    # ---- construction

    def _is_late(self, runs: int = 1) -> bool:
        """Whether there is no time for so many runs more and one after them, as long as the first.

        The last is for a guide, which reads the model once.
        """
        return (
            self._budget.has_seconds and self._budget.seconds_left < (runs + 1) * self.first_seconds
        )

    def _inspect(self) -> Substitute:
        """Randomness, own parameters, dynamic supports and hidden batch dimensions."""
        noise = torch.randn(self.latent_dim, dtype=self.init_loc.dtype)
        z = self.init_loc + 0.1 * noise.to(self.init_loc.device)
        before = _rng_state()
        with fast_pyro(), SafeLinalg():
            there = self.run.noted(z, dynamic=True)
            log_prob = there.total()
            drew = _rng_state() != before
            self.is_random = self._differs(z, log_prob, _RUNS_THAT_DREW if drew else _RUNS)
        self.has_parameters = log_prob.requires_grad
        # Flat priors in float32 on data in float64: the density shows what the model computes in.
        self.init_loc = self.init_loc.to(log_prob.dtype)
        depth = self.max_plate_nesting
        if not self.enumerated_sites:
            depth = max([depth, *there.batch_ndims])
        moved = [
            name
            for name, site in self.sites.items()
            if not torch.equal(there.values[name], site.transform(site.cut(z)))
        ]
        self.run = replace(self.run, max_plate_nesting=depth, dynamic_sites=tuple(moved))
        return there

    def _differs(self, z: Tensor, log_prob: Tensor, count: int) -> bool:
        """Whether other runs at the same point have another density.

        Numbers that were drawn need not change the density, and a generator or a counter of the
        model's own need not show: only other runs tell, some of which agree by chance. There are as
        many as there is time for.
        """
        part, rounding = self._budget.part(_CHECK_SHARE), 8 * torch.finfo(log_prob.dtype).eps
        for i in range(count):
            if (i and part.has_seconds and part.is_spent()) or self._is_late():
                break
            again = self.run.noted(z, dynamic=True).total()
            if not torch.allclose(again, log_prob, rounding, rounding, equal_nan=True):
                return True
        return False

    def _hierarchy(self, trace: poutine.Trace, there: Substitute) -> tuple[str, ...]:
        """The sites whose prior moved between two runs at different points."""
        if not isinstance(self.evaluator, Batched) and type(self.evaluator) is not Vmap:
            return ()
        if self.is_random or self.dynamic_sites or self.enumerated_sites:
            return ()
        moved = []
        for name, prior in there.priors.items():
            node: Any = trace.nodes[name]
            here = location_and_scale(node["fn"])
            if name not in self.sites or self.sites[name].keep is not None:
                continue
            if here is not None and not all(map(torch.equal, here, prior)):
                moved.append(name)
        return tuple(moved)

    def _choose_evaluator(self) -> None:
        """Compares a batch with single evaluations; picks the fastest way that agrees."""
        is_pure = not (self.is_random or self.has_parameters)
        if self._is_late(runs=2):  # a single one, and a batch
            self._use(Loop(self.run, is_pure), "there is no time to try")
            return
        sizes = {n for site in self.sites.values() for n in site.shape}
        sizes |= {n for a in self.args if isinstance(a, Tensor) for n in a.shape}
        count = next(n for n in _CHECK_BATCHES if n not in sizes)
        for spread in (1.0, 0.1, 0.01, 0.0):
            noise = torch.randn(count, self.latent_dim, dtype=self.init_loc.dtype)
            z = self.init_loc + spread * noise.to(self.init_loc.device)
            state = torch.get_rng_state()
            with torch.no_grad(), fast_pyro():
                wanted = self._singles(z, state)
            if torch.isfinite(wanted).any():
                break
        else:
            raise ValueError(
                f"the log joint is not finite at the initial point, nor anywhere near it, at "
                f"the sites {self.failing_sites(self.init_loc)}: check the model, its data and "
                "init_loc_fn."
            )
        found = choose_evaluator(self.run, is_pure, z, wanted, state, self._is_late)
        self._use(*found)

    def _use(self, evaluator: Evaluator, reason: str) -> None:
        """Takes a way to evaluate a batch, and says why no faster one."""
        self.evaluator, self.reason, self.kind = evaluator, reason, evaluator.kind
        # An index like m[c] is how models with discrete sites are written, and all that it costs is
        # that the one run for all particles goes by vmap.
        if self.reason and not (self.enumerated_sites and self.kind != "loop"):
            warnings.warn(
                f"the model does not run on a batch of particles ({self.reason}). "
                f"LogJoint uses {self.kind} instead: {self._advice()}",
                stacklevel=5,
            )

    def _advice(self) -> str:
        if self.kind == "loop" and self._is_late():
            return "every particle costs a run of the model. Give more max_seconds."
        if self.kind == "loop":
            return (
                "every particle costs a run of the model. A Python `if` on a latent, .item(), or "
                "a shape that depends on a latent allows no other way: torch.where, or operations "
                "on the last dimensions (x[..., 0], sum(-1), to_event), do."
            )
        return (
            "results are the same, a step is slower. A model whose operations act on the last "
            "dimensions (x[..., 0], sum(-1), to_event) broadcasts."
        )

    def _singles(self, z: Tensor, state: Tensor) -> Tensor:
        """The value of each point by a run of its own, as far as there is time."""
        part, values, loop = self._budget.part(_CHECK_SHARE), list[Tensor](), Loop(self.run)
        for zi in z:
            if len(values) >= 2 and part.has_seconds and part.is_spent():
                break
            if values and self._is_late(runs=2):
                break
            torch.set_rng_state(state)
            values.append(loop.single(zi))
        return torch.stack(values)

    # ---- a hierarchy

    def recentred(self, precision: Tensor, shift: Tensor) -> "RecentredJoint":
        """The same density in coordinates that place hierarchical sites by their priors.

        See :mod:`pyro_nf.sites.centring`.

        Args:
            precision: h of all coordinates (D,); it counts at `hierarchical_sites`.
            shift: b of all coordinates (D,).
        """
        check_tensor("LogJoint.recentred", "precision", precision, (self.latent_dim,))
        check_tensor("LogJoint.recentred", "shift", shift, (self.latent_dim,))
        return RecentredJoint(self, precision, shift)

    def move(
        self, z: Tensor, precision: Tensor, shift: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """From the coordinates of `recentred` to plain ones, or back, by one run of the model.

        Args:
            z: coordinates (..., D).
            precision: h (D,).
            shift: b (D,).
            inverse: whether z is plain.

        Returns:
            The other coordinates (..., D) and the ladj (...) of this direction.
        """
        check_tensor("LogJoint.move", "precision", precision, (self.latent_dim,), finite=False)
        check_tensor("LogJoint.move", "shift", shift, (self.latent_dim,), finite=False)
        check_flag("LogJoint.move", "inverse", inverse)
        self._expect(z)
        return self._moved(self._centred_run(precision, shift), z, inverse)

    def _centred_run(self, precision: Tensor, shift: Tensor) -> ModelRun:
        """A run of the model whose coordinates are those of `recentred`."""
        sites = [self.sites[name] for name in self.hierarchical_sites]
        centring = {s.name: SiteCentring(s.cut(precision), s.cut(shift)) for s in sites}
        return replace(self.run, centring=centring)

    def prior_scales(self, z: Tensor) -> Tensor:
        """The scale of each coordinate's prior at a point, where its site is hierarchical.

        Args:
            z: coordinates (D,).

        Returns:
            The scales (D,), in unconstrained coordinates; inf at the other sites.
        """
        check_tensor("LogJoint.prior_scales", "z", z, (self.latent_dim,))
        sigmas = torch.full_like(z, torch.inf)
        with torch.no_grad():
            priors = self.run.noted(z, bool(self.dynamic_sites)).priors
        for name in self.hierarchical_sites:
            site = self.sites[name]
            sigma = priors[name][1].expand(site.unconstrained_shape)
            sigmas[site.start : site.start + site.size] = sigma.reshape(-1)
        return sigmas


class RecentredJoint(ModelDensity):
    """A log joint density in coordinates that place hierarchical sites by their priors.

    Args:
        plain: The density in plain coordinates.
        precision: h of all coordinates (D,).
        shift: b of all coordinates (D,).
    """

    def __init__(self, plain: LogJoint, precision: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.plain = plain
        self.run = plain._centred_run(precision, shift)
        self.evaluator = plain.evaluator.of(self.run)
        self.kind, self.reason = plain.kind, plain.reason
        self.is_random, self.has_parameters = plain.is_random, plain.has_parameters
        self.first_seconds = plain.first_seconds
        self.init_loc = self._moved(self.run, plain.init_loc, inverse=True)[0].detach()

    def __repr__(self) -> str:
        return f"RecentredJoint({self.plain!r})"


def _rng_state() -> tuple[Any, ...]:
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    position = numpy["state"]["pos"], numpy["state"]["key"].tolist()
    return torch.get_rng_state().tolist(), random.getstate(), position
