"""The latent sites of a model: their supports, their initial values, their place in a vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint
from torch.distributions.transforms import ComposeTransform, IndependentTransform

Model = Callable[..., Any]
InitLocFn = Callable[..., Tensor]
Message = Any  # Pyro's message: a dict whose keys depend on the kind of the site


@biject_to.register(MixtureSameFamilyConstraint)
def _of_mixture(support: MixtureSameFamilyConstraint) -> Transform:
    """The support of a mixture is that of its components; torch has no entry for it."""
    return biject_to(support.base_constraint)


def bijection(name: str, fn: Any) -> Transform:
    """R^n -> the support of a latent site.

    Args:
        name: of the site.
        fn: its distribution.

    Raises:
        ValueError: the support cannot be mapped.
    """
    try:
        return biject_to(fn.support)
    except NotImplementedError:
        raise ValueError(
            f"latent site {name!r} has support {fn.support}, to which biject_to knows no map from "
            "R^n. Marginalise, enumerate or condition on it, or write it as a function of a "
            "latent whose support has one."
        ) from None


def init_anywhere(init_loc_fn: InitLocFn, dtype: torch.dtype | None = None) -> InitLocFn:
    """`init_loc_fn`, with the image of 0 for the sites that it cannot take (flat priors, mixtures).

    Args:
        init_loc_fn: one of Pyro's `init_to_*` functions.
        dtype: of the flat priors, which have no parameters to tell it. Default: torch's default.

    Returns:
        An `init_loc_fn` that takes `ImproperUniform` sites too.
    """

    def init(site: Message) -> Tensor:
        try:
            return init_loc_fn(site)
        except NotImplementedError:
            fn = site["fn"]
        flat = is_flat(fn)
        transform = bijection(site["name"], fn)
        shape = transform.inverse_shape(fn.shape())
        return transform(torch.zeros(shape, dtype=dtype if flat else fn.sample().dtype))

    return init


def is_flat(fn: Any) -> bool:
    """Whether a distribution is a flat prior, which has no samples."""
    return isinstance(_innermost(fn), pyro.distributions.ImproperUniform)


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


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
        started = InitMessenger(init_anywhere(init_loc_fn, dtype))(model)
        with poutine.block():
            return poutine.trace(started).get_trace(*args, **(kwargs or {}))

    default = torch.get_default_dtype()
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
    """

    name: str
    shape: torch.Size
    unconstrained_shape: torch.Size
    batch_ndim: int
    start: int
    size: int
    transform: Transform

    def cut(self, z: Tensor, pad: int = 0) -> Tensor:
        """The site's coordinates of z (..., D) as (..., 1 * pad, *unconstrained_shape)."""
        piece = z[..., self.start : self.start + self.size]
        return piece.reshape(z.shape[:-1] + (1,) * pad + self.unconstrained_shape)


def is_identity(transform: Transform) -> bool:
    """Whether a transform leaves everything as it is, as that of a real site does."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return isinstance(transform, ComposeTransform) and not transform.parts


def event_ladj(transform: Transform, u: Tensor, value: Tensor, event_dim: int) -> Tensor:
    """log|d value / d u|, summed over the event: shape value.shape[:-event_dim]."""
    ladj = transform.log_abs_det_jacobian(u, value)
    extra = ladj.dim() - (value.dim() - event_dim)
    return ladj.sum(tuple(range(-extra, 0))) if extra > 0 else ladj
