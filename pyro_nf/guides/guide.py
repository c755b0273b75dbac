"""The flow guide: a drop-in for Pyro's autoguides."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.params.param_store import param_with_module_name
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_nf._checks import (
    check_arguments,
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
from pyro_nf.flows.recipes import nsf
from pyro_nf.guides.layers import affine_base, autoregressive_layers, light_layers
from pyro_nf.guides.recentre import Recentre
from pyro_nf.model.joint import LogJoint
from pyro_nf.ops.devices import device_of
from pyro_nf.search.gaussians import MAX_FULL_DIM
from pyro_nf.search.mixtures import whitened
from pyro_nf.search.start import Start
from pyro_nf.sites.improper import ImproperPosterior, kept_entries, suspects
from pyro_nf.sites.latents import InitLocFn, Model, init_anywhere, refuse_subsampled_latents
from pyro_nf.sites.layout import Layout
from pyro_nf.sites.supports import bijection, is_flat, is_pushed
from pyro_nf.train.modes import exclusive, recording
from pyro_nf.train.randomness import own_randomness
from pyro_nf.transforms.affine import (
    FixedAffine,
    LowerAffine,
    LowRankAffine,
    with_unit_triangles,
)
from pyro_nf.transforms.base import Chain, FlowTransform, indented

FlowFactory = Callable[[int], Flow | FlowTransform]

# How many parts of a guide's flow learn: the flow itself and the affine base. The rest are the
# coordinates of learning.
_LEARNING = 2
# What is in the names of the tensors that only the flow of a start has: those of its second layer.
_SECOND_LAYER = "transform.parts.0.parts.2."
#: How the names of a recentring's tensors begin in the state of a guide's flow.
RECENTRING = f"transform.parts.{_LEARNING + 1}."
# Draws behind a median or a quantile; the error of a median is then about 0.01 sd.
_NUM_DRAWS = 20_000
# What a deep copy shares with the original, and a pickled guide goes without.
_SHARED = ("_model", "_plain_model", "_factory", "_init_loc_fn")
# How far each coordinate is moved to see whether the supports move with it.
_MOVE = 0.1


def auto_flow(latent_dim: int) -> FlowTransform:
    """The flow that ``flow="auto"`` takes in plain ``SVI``: cheap, and bounded.

    One coordinate gets splines, since an affine autoregressive map of one coordinate is Gaussian.
    More get :func:`~pyro_nf.guides.layers.light_layers`: one autoregressive layer, and a shift and
    scale of each coordinate.

    Args:
        latent_dim: The number of unconstrained coordinates.

    Example:
        >>> auto_flow(1).fast, auto_flow(5).fast
        ('both', 'forward')
    """
    return _splines() if latent_dim == 1 else light_layers(latent_dim)


def full_flow(latent_dim: int) -> FlowTransform:
    """The flow that ``flow="auto"`` takes in the coordinates of a start: what fits most posteriors.

    One coordinate gets splines. More get :func:`~pyro_nf.guides.layers.autoregressive_layers`:
    skewness and tails of each, then six affine layers, four above 20 coordinates, with a hidden
    layer of 64 to 256 units that widens with the dimension.

    Args:
        latent_dim: The number of unconstrained coordinates.

    Example:
        >>> len(full_flow(5).parts)
        7
    """
    return _splines() if latent_dim == 1 else autoregressive_layers(latent_dim)


def _splines() -> FlowTransform:
    return nsf(1, count_layers=2).transform


class AutoFlow(AutoContinuous):
    r"""A guide whose unconstrained latents follow a normalizing flow.

    .. math:: z = m_0 + L_0 (m + L f(\epsilon)), \qquad \epsilon \sim N(0, I)

    ``f`` is the flow, starting at the identity; ``m`` and ``L`` are learnt; :math:`m_0` and
    :math:`L_0` are the coordinates that learning happens in, so that one learning rate suits
    posteriors of any location and scale. At the start :math:`m_0` is the point of ``init_loc_fn``,
    :math:`L_0` is the identity and ``L`` is ``init_scale`` times the identity; ``start_at`` puts
    the coordinates elsewhere. With
    ``count_components`` above 1 the base is a learnable Gaussian mixture instead of
    :math:`N(0, I)`, for posteriors in separate pieces. Above some hundreds of dimensions ``L`` has
    low rank plus a diagonal and :math:`L_0` is a diagonal. After :meth:`recentre` the last map of
    all places hierarchical sites by their priors.

    It works wherever an ``AutoContinuous`` does: ``SVI``, ``Predictive``, ``NeuTraReparam``; and
    takes flat priors (``ImproperUniform``). Parameters exist after :meth:`setup` with the model's
    arguments, or after the first call. A step of an ELBO costs one pass of each layer.

    *Variational Inference with Normalizing Flows* (Rezende, Mohamed, 2015).

    Args:
        model: A Pyro model.
        flow: Makes ``f`` from the number of coordinates: a recipe of :mod:`pyro_nf.flows`, a
            factory of :mod:`pyro_nf.transforms`, any callable that returns a Flow or a
            FlowTransform, or "auto" for :func:`auto_flow`, which becomes :func:`full_flow` in
            :meth:`start_at` (and so in :func:`~pyro_nf.vi.fit.fit_svi`).
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

    flow: Flow

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
        super().__init__(model, init_loc_fn=init_anywhere(init_loc_fn))
        self._init_loc_fn = init_loc_fn
        self._plain_model = (model,)  # in a tuple, lest a Module become part of the guide
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
        self._build(*args, **kwargs)
        self._take_from_param_store()
        return self

    def _build(self, *args: Any, **kwargs: Any) -> None:
        """What ``setup`` does, without a look at the param store."""
        if self.prototype_trace is None:
            with recording("AutoFlow"), exclusive():
                self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        check_arguments("AutoFlow", self._plain_model[0], args, kwargs)
        try:
            self._read_prototype(*args, **kwargs)
            refuse_subsampled_latents(cast(Trace, self.prototype_trace))
            self._refuse_moving_supports(args, kwargs)
            self._refuse_flat_directions(args, kwargs)
            self.flow = self._make_flow()
            with poutine.block():  # the call that sets up makes its own
                self._create_plates(*args, **kwargs)  # NeuTraReparam wants them before any call
        except BaseException:  # Ctrl-C too
            self.prototype_trace = None  # a failed set-up is no set-up
            raise

    def _read_prototype(self, *args: Any, **kwargs: Any) -> None:
        device = device_of(self._plain_model[0], args, kwargs)
        if device is not None and device != torch.get_default_device():
            self._start_flat_priors_in(None, device)
        try:
            self._read_sites(*args, **kwargs)
        except RuntimeError as error:
            if "dtype" not in str(error):
                raise
            default = torch.get_default_dtype()
            other = torch.float32 if default == torch.float64 else torch.float64
            self._start_flat_priors_in(other, device)
            self._read_sites(*args, **kwargs)
        flat = [site["value"].dtype for _, site in self._sites() if is_flat(site["fn"])]
        if flat and (computed := self._computed_dtype(args, kwargs)) not in flat:
            self._start_flat_priors_in(computed, device)
            self._read_sites(*args, **kwargs)

    def _read_sites(self, *args: Any, **kwargs: Any) -> None:
        """The latents and their places: those of a log joint, whatever support is reported."""
        super(AutoContinuous, self)._setup_prototype(*args, **kwargs)
        trace = cast(Trace, self.prototype_trace)
        keeps = kept_entries(self._plain_model[0], args, kwargs, trace)
        self._suspects = suspects(trace)
        self.layout = Layout.of_trace(trace, keeps)
        self._left_out: dict[str, Any] = {}
        for name, site in self._sites():
            if name not in self.layout.sites:  # its prior is masked, and nothing depends on it
                self._left_out[name] = site
                trace.remove_node(name)
        sites = dict(self._sites())
        places = self.layout.sites
        self._unconstrained_shapes = {n: p.unconstrained_shape for n, p in places.items()}
        self._cond_indep_stacks = {name: site["cond_indep_stack"] for name, site in sites.items()}
        self.latent_dim = self.layout.latent_dim
        if not self.latent_dim:
            raise RuntimeError("AutoFlow: the model has no latent, so there is nothing to infer.")

    def _refuse_flat_directions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises if priors without a density leave something that the data do not hold either."""
        if not self._suspects:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                LogJoint(self._plain_model[0], args, kwargs, init_loc_fn=self._init_loc_fn)
        except ImproperPosterior:
            raise
        except (ValueError, RuntimeError):
            return  # a model that a log joint cannot be made of says nothing of this

    def _computed_dtype(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype:
        """What the log density is computed in; the prototype has no data to tell."""
        with own_randomness(seed=0), torch.no_grad(), poutine.block():
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
            return torch.as_tensor(trace.log_prob_sum()).dtype

    def _start_flat_priors_in(self, dtype: torch.dtype | None, device: torch.device | None) -> None:
        """Flat priors have no dtype and device of their own: theirs are those of the data."""
        init = InitMessenger(init_anywhere(self._init_loc_fn, dtype, device))
        self._model = (init(self._plain_model[0]),)

    def _refuse_moving_supports(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises if the support of a latent changes with the other latents.

        The value of such a site cannot be told from its own coordinates alone.
        """
        sites = dict(self._sites())
        transforms = {name: place.transform for name, place in self.layout.sites.items()}

        def moved(site: Any) -> Tensor:
            name = site["name"]
            if name not in sites:
                return site["fn"].sample()
            u = transforms[name].inv(sites[name]["value"])
            return cast(Tensor, bijection(name, site["fn"])(u + _MOVE))

        model = InitMessenger(moved)(poutine.block(self._plain_model[0], self._prototype_hide_fn))
        with own_randomness(seed=0), torch.no_grad(), pyro.validation_enabled(False):
            try:
                trace = poutine.block(poutine.trace(model).get_trace)(*args, **kwargs)
            except (RuntimeError, ValueError):
                return  # a model that fails there says nothing of its supports
        for name, site in sites.items():
            u = transforms[name].inv(site["value"])
            there = trace.nodes[name]["value"] if name in trace.nodes else None
            if there is not None and not torch.equal(transforms[name](u + _MOVE), there):
                raise ValueError(
                    f"AutoFlow: the support of latent site {name!r} depends on other latents "
                    f"(here it is {site['fn'].support}). Give it a fixed support: sample in the "
                    "unit interval, and scale."
                )

    def _make_flow(self) -> Flow:
        loc = self._init_loc()
        dim = len(loc)
        made = self._factory(dim)
        inner, base = made, None
        if isinstance(made, Flow):
            inner, base = made.transform_in_units(), made.base
        if not isinstance(inner, FlowTransform):
            raise TypeError(
                "AutoFlow: flow(latent_dim) must return a Flow or a FlowTransform, got "
                f"{type(made).__name__}."
            )
        if inner.context_dim or inner.input_dim not in (None, dim):
            raise ValueError(
                f"AutoFlow: the model has {dim} unconstrained coordinates and no context, but the "
                f"flow has input_dim {inner.input_dim} and context_dim {inner.context_dim}."
            )
        unit = torch.ones_like(loc)
        affine = affine_base(
            Start(loc, unit.diag_embed() if dim <= MAX_FULL_DIM else unit, elbo=math.nan)
        )
        learned = cast("LowerAffine | LowRankAffine", affine.parts[0])
        nn.init.constant_(learned.log_diagonal, math.log(self.init_scale))
        if self.count_components > 1:
            base = GaussianMixture(dim, self.count_components)
        return Flow(Chain([inner, *affine.parts]), base).to(loc)

    @property
    def coordinates(self) -> FixedAffine:
        """The map from the coordinates of learning to the unconstrained latents.

        A :attr:`recentring`, if there is one, comes after it.
        """
        return cast(FixedAffine, self._parts()[_LEARNING])

    def _parts(self) -> list[FlowTransform]:
        return cast("list[FlowTransform]", list(cast(Chain, self._ready().transform).parts))

    @property
    def recentring(self) -> Recentre | None:
        """What places the coordinates of hierarchical sites by their priors, if anything does."""
        last = self._parts()[-1]
        return last if isinstance(last, Recentre) else None

    @property
    def recentred_flow(self) -> Flow:
        """The flow, with the same parameters, in the coordinates before the recentring."""
        return Flow(Chain(self._parts()[: _LEARNING + 1]), self.flow.base)

    def recentre(self, recentring: Recentre | None) -> None:
        """Learns from now on in coordinates in which a hierarchy has no funnel.

        Args:
            recentring: The map from there to the unconstrained latents; None for no such map.

        Raises:
            RuntimeError: Before :meth:`setup`.
        """
        check_kind("AutoFlow", "recentring", recentring, Recentre, optional=True)
        last = [] if recentring is None else [recentring]
        self.flow = Flow(Chain([*self._parts()[: _LEARNING + 1], *last]), self.flow.base)

    def start_at(self, start: Start | GaussianMixture, recentring: Recentre | None = None) -> None:
        """Learns from now on in the coordinates of a Gaussian, and starts at that Gaussian.

        An automatic flow gets all its layers, :func:`full_flow`: they suit coordinates in which the
        posterior is nearly standard normal.

        Args:
            start: What :func:`pyro_nf.search.start.laplace_start` found, or, for a guide with as
                many components, what :func:`pyro_nf.search.mixtures.separated_mixture` found.
            recentring: The map to the unconstrained latents, if the start is in others.

        Raises:
            ValueError: If the number of components differs.
            RuntimeError: Before :meth:`setup`.
        """
        check_kind("AutoFlow", "start", start, (Start, GaussianMixture))
        check_kind("AutoFlow", "recentring", recentring, Recentre, optional=True)
        self._ready()
        dim = start.input_dim if isinstance(start, GaussianMixture) else len(start.loc)
        if dim != self.latent_dim:
            raise ValueError(
                f"AutoFlow: start has {dim} coordinates, but the model has {self.latent_dim}."
            )
        self._take_layers(full_flow)
        self.recentre(recentring)
        flow = self._ready()
        if isinstance(start, GaussianMixture):
            if start.count_components != self.count_components:
                raise ValueError(
                    f"AutoFlow: the mixture has {start.count_components} components, but "
                    f"count_components is {self.count_components}."
                )
            start, mixture = whitened(start)
            flow.base.load_state_dict(mixture.state_dict())
        if self.latent_dim <= MAX_FULL_DIM:
            start = replace(start, scale=start.scale_tril)
        for mine, given in zip(
            self._parts()[1 : _LEARNING + 1], affine_base(start).parts, strict=True
        ):
            mine.load_state_dict(given.state_dict())

    def _take_layers(self, factory: FlowFactory) -> None:
        """Exchanges the layers of an automatic flow, if they are not those of the factory."""
        parts = self._parts()
        if self._is_auto and self._factory is not factory:
            self._factory = factory
            made = cast(FlowTransform, factory(self.latent_dim)).to(self.coordinates.loc)
            self.flow = Flow(Chain([made, *parts[1:]]), self.flow.base)

    def expect_layers(self, names: Iterable[str]) -> None:
        """Gives an automatic flow the layers, to be filled, that the stored tensors belong to.

        Args:
            names: The names of the tensors.
        """
        names = list(names)
        if any("transform.parts.0." in name for name in names):
            is_full = any(_SECOND_LAYER in name for name in names)
            self._take_layers(full_flow if is_full else auto_flow)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Takes the state of another guide of this model, its recentring included.

        Args:
            state_dict: What ``state_dict()`` of the other guide returned.
            *args: As in ``torch.nn.Module``.
            **kwargs: As in ``torch.nn.Module``.
        """
        check_kind("AutoFlow", "state_dict", state_dict, Mapping)
        self.expect_layers(state_dict)
        self._expect_recentring(f"flow.{RECENTRING}precision" in state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _expect_recentring(self, is_stored: bool) -> None:
        """Makes a recentring, to be filled, if what is to be loaded has one."""
        if is_stored and self.recentring is None:
            given = cast(Trace, self.prototype_trace).nodes["_INPUT"]
            model = self._plain_model[0]
            joint = LogJoint(model, given["args"], given["kwargs"], init_loc_fn=self._init_loc_fn)
            self.recentre(Recentre(joint))

    def __getstate__(self) -> dict[str, Any]:
        # Models can hardly be pickled, so a pickled guide has none. Pyro's own __getstate__ takes
        # it away from the original too.
        model, master = self._model, self.master
        state = dict(super().__getstate__())
        self._model, self.master = model, master
        return state | {"_plain_model": None, "_factory": None, "_init_loc_fn": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlow:
        copied = memo[id(self)] = type(self).__new__(type(self))
        shared = {name: self.__dict__[name] for name in _SHARED}
        with torch.inference_mode(False):  # what was made in that mode could not learn
            copied.__setstate__({**copy.deepcopy(self.__getstate__(), memo), **shared})
        return copied

    def _ready(self) -> Flow:
        if self.prototype_trace is None:
            raise RuntimeError(
                "AutoFlow: the guide is not set up; call guide.setup(*args) with the model's "
                "arguments first."
            )
        return cast(Flow, self._modules["flow"])

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

    # What Pyro asks of an AutoContinuous.

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws all latents, as a Pyro guide.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Returns:
            The value of each latent site.
        """
        if self.prototype_trace is None:
            self.setup(*args, **kwargs)
        self._register()
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        for name, site in self._left_out.items():
            with self._within(site["cond_indep_stack"], plates):
                pyro.sample(name, site["fn"].mask(False))
        return {
            site["name"]: self._sampled(site, u, plates) for site, u in self._unpack_latent(latent)
        }

    def _sampled(self, site: Any, u: Tensor, plates: Mapping[str, Any]) -> Tensor:
        """One latent, as a Delta whose density is that of the change of variables."""
        name, place = site["name"], self.layout.sites[site["name"]]
        value = place.transform(u)
        log_density: Any = 0.0
        if poutine.get_mask() is not False:
            log_density = -place.ladj(place.transform, u, value)
        with self._within(self._cond_indep_stacks[name], plates):
            delta = dist.Delta(value, log_density=log_density, event_dim=place.event_dim)
            return pyro.sample(name, delta)

    @staticmethod
    def _within(frames: Any, plates: Mapping[str, Any]) -> contextlib.ExitStack:
        """All plates of a site."""
        with contextlib.ExitStack() as stack:
            for frame in frames:
                if frame.vectorized:
                    stack.enter_context(plates[frame.name])
            return stack.pop_all()

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Each site with its unconstrained value, whatever plates stand around the guide."""
        for name, site in self._sites():
            yield site, self.layout.sites[name].cut_within_plates(latent)

    def _init_loc(self) -> Tensor:
        """The unconstrained coordinates of the prototype's values."""
        return self.layout.coordinates(cast(Trace, self.prototype_trace))

    def get_base_dist(self) -> Any:
        """Standard normals, ``(latent_dim,)``."""
        return self._ready().base()

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """The map from the base to the unconstrained latents; needs no arguments.

        Who asks for it (``NeuTraReparam``) maps the unconstrained latents by what their priors
        report as their support, for all entries of a site.

        Raises:
            ValueError: The support or the entries of a site are others than those.
        """
        self._ready()
        for name, site in self._sites():
            pushed = is_pushed(site["fn"])
            if pushed or self.layout.sites[name].keep is not None:
                problem = "reports a support that is not its own" if pushed else "is partly masked"
                raise ValueError(
                    "AutoFlow.get_transform: wanted latents that Pyro maps from R^n as this guide "
                    f"does, but the prior of {name!r} {problem} (support {site['fn'].support}). "
                    "Use posterior.refine('neutra') in place of NeuTraReparam."
                )
        return self.flow.transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The distribution of the unconstrained latents."""
        self._ready()
        return cast(FlowDistribution, self.flow())

    def _draw(self, num_draws: int) -> dict[str, Tensor]:
        with own_randomness(seed=0), torch.no_grad():
            z = self._ready()().sample((num_draws,))
        return self.layout.unpack(z)

    def _sites(self) -> list[tuple[str, Any]]:
        assert self.prototype_trace is not None
        return list(self.prototype_trace.iter_stochastic_nodes())

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

    # Pyro's param store knows parameters only: the coordinates, buffers, go there by name.

    def _in_param_store(self) -> dict[str, Tensor]:
        """What the param store holds, or would hold, of this guide: the tensors by their keys."""
        flow = self._ready()
        tensors: dict[str, Tensor] = dict(flow.named_parameters())
        for i, part in enumerate(self._parts()):
            if i >= _LEARNING:
                tensors |= {f"transform.parts.{i}.{name}": b for name, b in part.named_buffers()}
        return {self._store_name(key): tensor for key, tensor in tensors.items()}

    def _store_name(self, key: str) -> str:
        return param_with_module_name(f"{self._pyro_name}.flow", key)

    def _take_from_param_store(self) -> None:
        store = pyro.get_param_store()
        mine = {name: store[name] for name in list(store) if name.startswith(self._store_name(""))}
        self.expect_layers(mine)
        renamed = with_unit_triangles(mine)
        for key in mine.keys() - renamed.keys():
            del store[key]
        for key in renamed.keys() - mine.keys():
            store[key] = renamed[key].detach()
        self._expect_recentring(self._store_name(f"{RECENTRING}precision") in store)
        for key, tensor in self._in_param_store().items():
            if key in store and store[key].shape != tensor.shape:
                raise ValueError(
                    f"AutoFlow: Pyro's param store holds {key!r} of shape "
                    f"{tuple(store[key].shape)}, but this guide needs {tuple(tensor.shape)}: it is "
                    "of another model or flow; call pyro.clear_param_store() first."
                )
        with torch.no_grad():
            for key, tensor in self._in_param_store().items():
                if key in store:
                    tensor.copy_(store[key])  # the values only: two guides share no tensor
        self.register()

    def register(self) -> None:
        """Makes Pyro's param store hold this guide's parameters and coordinates.

        :meth:`setup` and :func:`~pyro_nf.vi.fit.fit_svi` do so. What the store held under the
        same names, of another guide for example, goes.

        Raises:
            RuntimeError: Before :meth:`setup`.
        """
        self._register()
        pyro.module(f"{self._pyro_name}.flow", self._ready())

    def _register(self) -> None:
        """Makes the store hold this guide's tensors, not those of another guide of its name."""
        store = pyro.get_param_store()
        for key, tensor in self._in_param_store().items():
            if isinstance(tensor, nn.Parameter):
                if key in store and store[key] is not tensor:
                    del store[key]
            elif key not in store or not torch.equal(store[key], tensor):
                if key in store:
                    del store[key]
                store[key] = tensor.clone()  # not a pyro.param statement: nobody is to learn it
