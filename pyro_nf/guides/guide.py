"""The flow guide: a drop-in for Pyro's autoguides."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import pyro
import torch
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_nf._checks import (
    check_callable,
    check_count,
    check_floating,
    check_kind,
    check_model,
    check_positive,
    check_probabilities,
)
from pyro_nf.flows.distribution import FlowDistribution
from pyro_nf.flows.flow import Flow
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.guides.joint_flow import JointFlow, has_part, joint_flow, with_part_names
from pyro_nf.guides.latents import VectorGuide
from pyro_nf.guides.layers import auto_flow, full_flow, with_gains_of_now
from pyro_nf.guides.recentre import Recentre
from pyro_nf.guides.store import put_into_store, store_key, stored, take_stored
from pyro_nf.search.start import GaussianStart
from pyro_nf.sites.latents import InitLocFn, Model
from pyro_nf.train.randomness import own_randomness
from pyro_nf.transforms.affine import FixedAffine
from pyro_nf.transforms.base import FlowTransform, indented
from pyro_nf.transforms.kinds import in_words
from pyro_nf.transforms.stochastic import StochasticTransform

FlowFactory = Callable[[int], Flow | FlowTransform | StochasticTransform]

# Draws behind a median or a quantile; the error of a median is then about 0.01 sd.
_NUM_DRAWS = 20_000
# What is in the names of the tensors that only the full layers have: those of the second.
_SECOND_LAYER = "transform.flow.parts.2."


class AutoFlow(VectorGuide):
    r"""A guide whose unconstrained latents follow a normalizing flow.

    .. math:: z = m_0 + L_0 (m + L f(\epsilon)), \qquad \epsilon \sim N(0, I)

    ``f`` is the flow, starting at the identity; ``m`` and ``L`` are learnt; :math:`m_0` and
    :math:`L_0` are the coordinates that learning happens in, so that one learning rate suits
    posteriors of any location and scale. At the start :math:`m_0` is the point of ``init_loc_fn``,
    :math:`L_0` is the identity and ``L`` is ``init_scale`` times the identity; ``start_at`` puts
    the coordinates elsewhere. With ``count_components`` above 1 the base is a learnable Gaussian
    mixture instead of :math:`N(0, I)`, for posteriors in separate pieces. Above some hundreds of
    dimensions ``L`` has low rank plus a diagonal and :math:`L_0` is a diagonal. After
    :meth:`recentre` the last map of all places hierarchical sites by their priors.

    It works wherever an ``AutoContinuous`` does: ``SVI``, ``Predictive``, ``NeuTraReparam``; and
    takes flat priors (``ImproperUniform``). With layers that draw or lose something, or estimated
    log-determinants, it trains by the log weights of its paths, whose ELBO is a lower bound too;
    its ``log_prob`` is then what ``flow.log_prob_kind`` says, and importance weights and NeuTra
    refuse it. Parameters exist after :meth:`setup` with the model's
    arguments, or after the first call. A step of an ELBO costs one pass of each layer.

    *Variational Inference with Normalizing Flows* (Rezende, Mohamed, 2015).

    Args:
        model: A Pyro model.
        flow: Makes ``f`` from the number of coordinates: a recipe of :mod:`pyro_nf.flows`, a
            factory of :mod:`pyro_nf.transforms`, any callable that returns a Flow, a FlowTransform
            or a StochasticTransform, or "auto" for
            :func:`~pyro_nf.guides.layers.auto_flow`, which becomes
            :func:`~pyro_nf.guides.layers.full_flow` in :meth:`start_at` (and so in
            :func:`~pyro_nf.vi.fit.fit_svi`).
        init_loc_fn: One of Pyro's ``init_to_*`` functions.
        init_scale: Standard deviation of each unconstrained coordinate at the start. Draws that
            start near the initial point are safe; a scale grows or shrinks by a share of itself.
        count_components: Components of the base. Draws of more than one carry no gradient, so such
            a guide is for :func:`~pyro_nf.vi.fit.fit_svi`, not for plain ``SVI``.

    Raises:
        ValueError: If ``init_scale`` is not positive, or the flow has another dimension or wants a
            context; from :meth:`setup` if a latent lies in a subsampled plate.
        TypeError: If ``flow`` is not callable or returns something else.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model():
        ...     return pyro.sample("x", dist.Normal(500.0, 2.0))
        >>> guide = AutoFlow(model).setup()
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> loss = svi.step()
        >>> guide.median()["x"].shape
        torch.Size([])
    """

    flow: JointFlow

    _shared = (*VectorGuide._shared, "_factory")

    def __init__(
        self,
        model: Model,
        flow: FlowFactory | str = "auto",
        *,
        init_loc_fn: InitLocFn = init_to_median,
        init_scale: float = 0.4,
        count_components: int = 1,
    ) -> None:
        check_model("AutoFlow", model)
        wanted = "a function of a site, such as pyro's init_to_median"
        check_callable("AutoFlow", "init_loc_fn", init_loc_fn, wanted, count=1)
        if isinstance(flow, nn.Module):
            raise TypeError(
                "AutoFlow: flow must be 'auto' or a function that makes a flow of any latent_dim, "
                f"got a {type(flow).__name__} that is made already; pass the recipe, as flows.nsf, "
                "or lambda latent_dim: flows.nsf(latent_dim)."
            )
        if not isinstance(flow, str):
            wanted = "'auto' or a callable latent_dim -> Flow, such as flows.nsf"
            check_callable("AutoFlow", "flow", flow, wanted, count=1)
        check_positive("AutoFlow", "init_scale", init_scale)
        check_count("AutoFlow", "count_components", count_components)
        if not (callable(flow) or flow == "auto"):
            raise TypeError(
                f"AutoFlow: flow must be 'auto' or a callable latent_dim -> Flow, got {flow!r}."
            )
        super().__init__(model, init_loc_fn)
        self.init_scale = init_scale
        self.count_components = count_components
        self._is_auto = isinstance(flow, str)
        self._factory: FlowFactory = auto_flow if isinstance(flow, str) else flow

    def setup(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Runs the model once and makes the parameters; later calls change nothing.

        If Pyro's param store holds values under this guide's names (because it was loaded from a
        file), the guide takes them.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Returns:
            The guide itself.

        Raises:
            ValueError: If a latent lies in a subsampled plate, or the flow does not fit.
            RuntimeError: If the model has no latent.
        """
        self.build(*args, **kwargs)
        self._take_from_param_store()
        return self

    def make_parameters(self) -> None:
        """Makes the flow; :meth:`build` calls it."""
        made = self._factory(self.latent_dim)
        self.flow = joint_flow(made, self.init_loc, self.init_scale, self.count_components)

    @property
    def coordinates(self) -> FixedAffine:
        """The map from the coordinates of learning to the unconstrained latents.

        A :attr:`recentring`, if there is one, comes after it.
        """
        return self._ready().transform.coordinates

    @property
    def recentring(self) -> Recentre | None:
        """What places the coordinates of hierarchical sites by their priors, if anything does."""
        return self._ready().transform.recentring

    @property
    def recentred_flow(self) -> JointFlow:
        """The flow, with the same parameters, in the coordinates before the recentring."""
        return self._ready().with_recentring(None)

    def recentre(self, recentring: Recentre | None) -> None:
        """Learns from now on in coordinates in which a hierarchy has no funnel.

        Args:
            recentring: The map from there to the unconstrained latents; None for no such map.

        Raises:
            RuntimeError: Before :meth:`setup`.
        """
        check_kind("AutoFlow", "recentring", recentring, Recentre, optional=True)
        self.flow = self._ready().with_recentring(recentring)

    def start_at(
        self, start: GaussianStart | GaussianMixture, recentring: Recentre | None = None
    ) -> None:
        """Learns from now on in the coordinates of a Gaussian, and starts at that Gaussian.

        An automatic flow gets all its layers, :func:`~pyro_nf.guides.layers.full_flow`: they suit
        coordinates in which the posterior is nearly standard normal.

        Args:
            start: What :func:`pyro_nf.search.start.laplace_start` found, or, for a guide with as
                many components, what :func:`pyro_nf.search.mixtures.separated_mixture` found.
            recentring: The map to the unconstrained latents, if the start is in others.

        Raises:
            ValueError: If the number of components differs.
            RuntimeError: Before :meth:`setup`.
        """
        check_kind("AutoFlow", "start", start, (GaussianStart, GaussianMixture))
        check_kind("AutoFlow", "recentring", recentring, Recentre, optional=True)
        self._ready()
        dim = start.input_dim if isinstance(start, GaussianMixture) else len(start.loc)
        if dim != self.latent_dim:
            raise ValueError(
                f"AutoFlow: start has {dim} coordinates, but the model has {self.latent_dim}."
            )
        if isinstance(start, GaussianMixture) and start.count_components != self.count_components:
            raise ValueError(
                f"AutoFlow: the mixture has {start.count_components} components, but "
                f"count_components is {self.count_components}."
            )
        self._take_layers(full_flow)
        self.recentre(recentring)
        self.flow.start_at(start)

    def _take_layers(self, factory: FlowFactory) -> None:
        """Exchanges the layers of an automatic flow, if they are not those of the factory."""
        if self._is_auto and self._factory is not factory:
            self._factory = factory
            made = cast(FlowTransform, factory(self.latent_dim)).to(self.coordinates.loc)
            self.flow = self.flow.with_flow(made)

    # ---- the state

    def expect_layers(self, names: Iterable[str]) -> None:
        """Gives an automatic flow the layers, to be filled, that stored tensors belong to.

        Args:
            names: The names of the tensors, as they are now.
        """
        names = list(names)
        if any("transform.flow." in name for name in names):
            is_full = any(_SECOND_LAYER in name for name in names)
            self._take_layers(full_flow if is_full else auto_flow)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Takes the state of another guide of this model, its recentring included.

        Args:
            state_dict: What ``state_dict()`` of the other guide returned, in this version or 0.1.
            *args: As in ``torch.nn.Module``.
            **kwargs: As in ``torch.nn.Module``.
        """
        check_kind("AutoFlow", "state_dict", state_dict, Mapping)
        named = with_part_names(state_dict, "flow.")
        self._expect(named, "flow.")
        if named.keys() != state_dict.keys():
            state_dict = self._of_now(named, "flow.")
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _expect(self, names: Iterable[str], prefix: str) -> None:
        """Makes layers and recentring, to be filled, as what is to be loaded has them."""
        names = list(names)
        self.expect_layers(names)
        if has_part(names, "recentring", prefix) and self.recentring is None:
            self.recentre(Recentre(self.log_joint()))

    def _of_now(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Tensors of version 0.1 as those of now, for the same density."""
        layers = cast(FlowTransform, self.flow.transform.flow)
        is_light = self._is_auto and self._factory is auto_flow and self.latent_dim > 1
        start = f"{prefix}transform.flow."
        return with_gains_of_now(layers, tensors, start) if is_light else dict(tensors)

    def _ready(self) -> JointFlow:
        if self.prototype_trace is None:
            raise RuntimeError(
                "AutoFlow: the guide is not set up; call guide.setup(*args) with the model's "
                "arguments first."
            )
        return cast(JointFlow, self._modules["flow"])

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """As of any Module; before :meth:`setup` there are none, which a warning says."""
        if self.prototype_trace is None:
            warnings.warn(
                "AutoFlow: the guide has no parameters before guide.setup(*args) with the model's "
                "arguments; an optimiser that is made now would learn nothing.",
                stacklevel=2,
            )
        return super().named_parameters(*args, **kwargs)

    def __repr__(self) -> str:
        if self.prototype_trace is None:
            return "AutoFlow(not set up)"
        return f"AutoFlow({self.latent_dim} coordinates)\n  {indented(repr(self._ready()))}"

    @property
    def _store_name(self) -> str:
        return f"{self._pyro_name}.flow"

    def _take_from_param_store(self) -> None:
        tensors, is_old = stored(self._store_name)
        start = store_key(self._store_name)
        self._expect(tensors, start)
        tensors = self._of_now(tensors, start) if is_old else tensors
        take_stored(self.flow, self._store_name, tensors)
        self.register()

    def register(self) -> None:
        """Makes Pyro's param store hold this guide's parameters and coordinates.

        :meth:`setup` and :func:`~pyro_nf.vi.fit.fit_svi` do so. What the store held under the
        same names, of another guide for example, goes.

        Raises:
            RuntimeError: Before :meth:`setup`.
        """
        put_into_store(self._ready(), self._store_name)
        pyro.module(self._store_name, self._ready())

    def before_draw(self) -> None:
        """Makes the store hold this guide's tensors, not those of another guide of its name."""
        put_into_store(self._ready(), self._store_name)

    # ---- what Pyro asks of an AutoContinuous

    def _init_loc(self) -> Tensor:
        return self.init_loc

    def get_base_dist(self) -> Any:
        """Standard normals, ``(latent_dim,)``."""
        return self._ready().base()

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """The map from the base to the unconstrained latents; needs no arguments.

        Who asks for it (``NeuTraReparam``) maps the unconstrained latents by what their priors
        report as their support, for all entries of a site.

        Raises:
            ValueError: The support or the entries of a site are others than those; or the flow has
                log-determinants that are estimated, or layers that draw or lose something: a chain
                in its base coordinates needs the density itself.
        """
        self._ready()
        self.refuse_other_maps()
        transform, kind = self.flow.transform, self.flow.log_prob_kind
        if kind != "exact" or not isinstance(transform, FlowTransform):
            got = f"whose log_prob is {in_words(kind)}" if kind != "exact" else ""
            raise ValueError(  # Pyro would hide a TypeError
                "AutoFlow.get_transform: wanted an invertible flow with an exact log-determinant, "
                f"got one {got or 'with layers that draw or lose something'}. Take a flow of "
                "exact transforms for NeuTra, or sample the model with plain NUTS."
            )
        return transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The distribution of the unconstrained latents."""
        self._ready()
        return cast(FlowDistribution, self.flow())

    def _draw(self, num_draws: int) -> dict[str, Tensor]:
        with own_randomness(seed=0), torch.no_grad():
            z = self._ready()().sample((num_draws,))
        return self.layout.unpack(z)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each latent, over a large fixed set of draws.

        Returns:
            One tensor of the site's shape for each site.
        """
        return {name: draws.median(0).values for name, draws in self._draw(_NUM_DRAWS).items()}

    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of each latent, over a large fixed set of draws.

        Args:
            quantiles: Numbers between 0 and 1.
            *args: Ignored, as Pyro's guides take the model's arguments here.
            **kwargs: Ignored.

        Returns:
            For each site a tensor ``(len(quantiles), *shape)``.
        """
        check_probabilities("AutoFlow", "quantiles", quantiles)
        return {
            name: draws.quantile(torch.as_tensor(quantiles).to(draws), 0)
            for name, draws in self._draw(_NUM_DRAWS).items()
        }

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        r"""The log density of constrained values, :math:`\log q(z) - \sum \log|dx / dz|`.

        Args:
            values: A value for each latent site, with any common batch shape in front.

        Returns:
            The log density, of that batch shape; -inf where a value is outside of its support.

        Raises:
            ValueError: If a site is missing or unknown.
            RuntimeError: Before :meth:`setup`.
        """
        check_kind("AutoFlow", "values", values, Mapping)
        for name, value in values.items():
            check_floating("AutoFlow", f"values[{name!r}]", value)
        flow = self._ready()
        sites = self.layout.sites
        if set(values) != set(sites):
            raise ValueError(f"AutoFlow: wanted values of {sorted(sites)}, got {sorted(values)}.")
        trace = cast(Trace, self.prototype_trace)
        z, ladj, is_outside = self.layout.pack_inside(values, trace)
        log_prob = cast(Tensor, flow().log_prob(z)) - ladj
        return torch.where(is_outside, -torch.inf, log_prob)
