"""The model's side of a guide: its latents as one vector, read off a first run, and drawn from it.

What is there of Pyro's `AutoContinuous` is replaced, since that takes every latent's support as its
prior reports it, has coordinates for masked entries, and does not notice supports that move.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine import Trace
from torch import Tensor

from pyro_nf._checks import check_arguments
from pyro_nf.model.joint import LogJoint
from pyro_nf.ops.devices import device_of
from pyro_nf.sites.improper import ImproperPosterior, kept_entries, suspects
from pyro_nf.sites.latents import InitLocFn, Model, init_anywhere, refuse_subsampled_latents
from pyro_nf.sites.layout import Layout
from pyro_nf.sites.supports import bijection, is_flat, is_pushed
from pyro_nf.train.modes import exclusive, recording
from pyro_nf.train.randomness import own_randomness

G = TypeVar("G", bound="VectorGuide")

# How far each coordinate is moved to see whether the supports move with it.
_MOVE = 0.1


class VectorGuide(AutoContinuous):
    """A guide whose latents are one vector; what that vector follows is for its subclasses to say.

    A subclass makes its parameters in :meth:`make_parameters`, and returns the law of the vector
    from ``get_posterior``.

    Args:
        model: A Pyro model.
        init_loc_fn: One of Pyro's ``init_to_*`` functions.

    Attributes:
        layout: Which coordinates are whose, after :meth:`build`.
        latent_dim: The number of coordinates, after :meth:`build`.
    """

    layout: Layout
    latent_dim: int

    # What a deep copy shares with the original, and a pickled guide goes without.
    _shared: ClassVar[tuple[str, ...]] = ("_model", "_plain_model", "_init_loc_fn")

    def __init__(self, model: Model, init_loc_fn: InitLocFn) -> None:
        super().__init__(model, init_loc_fn=init_anywhere(init_loc_fn))
        self._init_loc_fn = init_loc_fn
        self._supports_are_fixed = False  # as far as is known
        self._plain_model = (model,)  # in a tuple, lest a Module become part of the guide

    def make_parameters(self) -> None:
        """Makes all parameters, once the latents are known."""
        raise NotImplementedError

    def before_draw(self) -> None:
        """What is to be done before the guide draws as a part of a Pyro program."""

    @property
    def plain_model(self) -> Model | None:
        """The model as it was given; None after unpickling."""
        return self._plain_model[0] if self._plain_model else None

    @property
    def is_set_up(self) -> bool:
        """Whether the guide has parameters."""
        return self.prototype_trace is not None

    @property
    def init_loc(self) -> Tensor:
        """The coordinates ``(D,)`` of the first run of the model."""
        return self.layout.coordinates(cast(Trace, self.prototype_trace))

    def log_joint(self) -> LogJoint:
        """The log joint density of the model, with the arguments of the first run."""
        given = cast(Trace, self.prototype_trace).nodes["_INPUT"]
        return self._log_joint(given["args"], given["kwargs"])

    def _log_joint(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LogJoint:
        return LogJoint(self._plain_model[0], args, kwargs, init_loc_fn=self._init_loc_fn)

    # ---- reading the model

    def build(self, *args: Any, **kwargs: Any) -> None:
        """Runs the model once and makes the parameters; later calls change nothing.

        Pyro's param store is not looked at.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.
        """
        if self.prototype_trace is None:
            with recording("AutoFlow"), exclusive():
                self._setup_prototype(*args, **kwargs)

    def build_on(self, joint: LogJoint) -> None:
        """As :meth:`build`, with the arguments of a log joint, and what it knows of the supports.

        Args:
            joint: The log joint density of the guide's model.
        """
        self._supports_are_fixed = not joint.dynamic_sites
        self.build(*joint.args, **joint.kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        check_arguments("AutoFlow", self._plain_model[0], args, kwargs)
        try:
            self._read_prototype(*args, **kwargs)
            refuse_subsampled_latents(cast(Trace, self.prototype_trace))
            if not self._supports_are_fixed:
                self._refuse_moving_supports(args, kwargs)
            self._refuse_flat_directions(args, kwargs)
            self.make_parameters()
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
                self._log_joint(args, kwargs)
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

    # ---- drawing

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
        self.before_draw()
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

    def refuse_other_maps(self) -> None:
        """Raises if Pyro would map a latent otherwise than the guide does.

        Raises:
            ValueError: The support or the entries of a site are others than its prior reports.
        """
        for name, site in self._sites():
            pushed = is_pushed(site["fn"])
            if pushed or self.layout.sites[name].keep is not None:
                problem = "reports a support that is not its own" if pushed else "is partly masked"
                raise ValueError(
                    "AutoFlow.get_transform: wanted latents that Pyro maps from R^n as this guide "
                    f"does, but the prior of {name!r} {problem} (support {site['fn'].support}). "
                    "Use posterior.refine('neutra') in place of NeuTraReparam."
                )

    def _sites(self) -> list[tuple[str, Any]]:
        assert self.prototype_trace is not None
        return list(self.prototype_trace.iter_stochastic_nodes())

    # ---- copies

    def __getstate__(self) -> dict[str, Any]:
        # Models can hardly be pickled, so a pickled guide has none. Pyro's own __getstate__ takes
        # it away from the original too.
        model, master = self._model, self.master
        state = dict(super().__getstate__())
        self._model, self.master = model, master
        return state | dict.fromkeys(name for name in self._shared if name != "_model")

    def __deepcopy__(self: G, memo: dict[int, Any]) -> G:
        copied = memo[id(self)] = type(self).__new__(type(self))
        shared = {name: self.__dict__[name] for name in self._shared}
        with torch.inference_mode(False):  # what was made in that mode could not learn
            copied.__setstate__({**copy.deepcopy(self.__getstate__(), memo), **shared})
        return copied
