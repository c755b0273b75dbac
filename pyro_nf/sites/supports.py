r"""The support of a latent, and the bijection from :math:`R^n` to it.

A `TransformedDistribution` reports the codomain of its last transform for its support. That is
right only if every map takes all of its domain: `1 + Exponential(1)` reports the real line, since
an affine map can reach all of it, and its values lie above 1. Here the support of the base is
pushed through the maps. Where the result is an interval it is one of torch's constraints, so that
the coordinates do not depend on what does not move the support; else the bijection is that of the
base, followed by the maps.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import Constraint, MixtureSameFamilyConstraint
from torch.distributions.transforms import ComposeTransform, IndependentTransform

Bound = Tensor | float
# Who reports this property has not said what its support is.
_REPORTED = inspect.getattr_static(torch.distributions.TransformedDistribution, "support")


def bijection(name: str, fn: Any) -> Transform:
    """R^n -> the support of a latent site.

    Args:
        name: of the site.
        fn: its distribution.

    Raises:
        ValueError: the support cannot be mapped.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> shift = dist.transforms.AffineTransform(1.0, 1.0)
        >>> fn = dist.TransformedDistribution(dist.Exponential(torch.tensor(1.0)), shift)
        >>> fn.support, bijection("x", fn)(torch.tensor([-20.0, 0.0]))
        (Real(), tensor([1., 2.]))
    """
    try:
        return _bijection(fn)
    except _Unmappable as error:
        problem = f"cannot be mapped from R^n: {error}"
    except NotImplementedError:
        problem = f"has support {fn.support}, to which biject_to knows no map from R^n"
    raise ValueError(
        f"latent site {name!r} {problem}. Marginalise, enumerate or condition on it, or write it "
        "as a function of a latent whose support has one."
    )


def is_pushed(fn: Any) -> bool:
    """Whether the support that a distribution reports is not the one that it is mapped from.

    Args:
        fn: A distribution whose support can be mapped.
    """
    if fn.support.is_discrete:
        return False
    try:
        return not _is_same_map(biject_to(fn.support), _bijection(fn))
    except NotImplementedError:
        return True


def is_flat(fn: Any) -> bool:
    """Whether a distribution is a flat prior, which has no samples."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, pyro.distributions.ImproperUniform)


def pulled_inside(fn: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    """Values moved off the ends of a support, where a bijection has no inverse.

    A draw of a guide may be rounded to an end, so an end counts as inside.

    Args:
        fn: The distribution of a latent site.
        value: Shape ``(*lead, *fn.shape())``.

    Returns:
        The nearest inner points, of the shape of ``value``, and which values are outside, of that
        shape or without the event. NaN stays NaN and is not outside.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> pulled_inside(dist.Uniform(0.0, 2.0), torch.tensor([-1.0, 0.5, 2.0]))[1].tolist()
        [True, False, False]
    """
    support = _support(fn)
    if support is None:
        return _pulled_back_inside(fn, value)
    kind, ends = torch.finfo(value.dtype), _ends(support)
    if ends is not None:
        low, high = (_tensor(end, value.dtype).to(value) for end in ends)
        first = torch.maximum(low.nextafter(high), low + kind.tiny)
        last = torch.minimum(high.nextafter(low), high - kind.tiny)
        return value.clamp(first, last), (value < low) | (value > high) | value.isinf()
    if _scalar(support) is constraints.simplex:
        # by a tolerance that grows with the number of summands, as the rounding of their sum does
        rounding = 10 * kind.eps * value.shape[-1]
        outside = (value < 0).any(-1) | ((value.sum(-1) - 1).abs() > rounding)
        return value.clamp_min(kind.tiny), outside
    return value, ~support.check(value) & ~_has_nan(value, support.event_dim)


def _pulled_back_inside(fn: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    """The same where the support is the image of another one under maps."""
    if isinstance(fn, ExpandedDistribution | MaskedDistribution | torch.distributions.Independent):
        return pulled_inside(fn.base_dist, value)
    x = value
    for transform in reversed(fn.transforms):
        x = transform.inv(x)
    x, outside = pulled_inside(fn.base_dist, x)
    batch = value.shape[: value.dim() - fn.event_dim]
    for transform in fn.transforms:
        x = transform(x)
    has_inverse = _bijection(fn).inv(x).isfinite().reshape(*batch, -1).all(-1)
    outside = outside.reshape(*batch, -1).any(-1) | ~has_inverse
    return x, outside & ~_has_nan(value, fn.event_dim)


def _has_nan(value: Tensor, event_dim: int) -> Tensor:
    """Whether an event has a NaN."""
    return value.isnan().flatten(value.dim() - event_dim).any(-1) if event_dim else value.isnan()


def is_identity(transform: Transform) -> bool:
    """Whether a transform leaves everything as it is, as that of a real site does."""
    transform = _elementwise(transform)
    return isinstance(transform, ComposeTransform) and all(map(is_identity, transform.parts))


def event_ladj(transform: Transform, u: Tensor, value: Tensor, event_dim: int) -> Tensor:
    """log|d value / d u|, summed over the event: shape value.shape[:-event_dim]."""
    ladj = transform.log_abs_det_jacobian(u, value)
    extra = ladj.dim() - (value.dim() - event_dim)
    return ladj.sum(tuple(range(-extra, 0))) if extra > 0 else ladj


class Supported(pyro.distributions.TorchDistribution):
    """A distribution that reports the support that its values have, for who asks it.

    Args:
        base_dist: The distribution.

    Raises:
        NotImplementedError: By ``support``, if it is none of torch's constraints.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}

    def __init__(self, base_dist: Any) -> None:
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> Constraint:
        """The support."""
        found = _support(self.base_dist)
        if found is None:
            raise NotImplementedError
        return found

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self.base_dist.mean

    def sample(self, sample_shape: Any = torch.Size()) -> Any:  # noqa: B008
        """Draws."""
        return self.base_dist.sample(sample_shape)

    def log_prob(self, value: Any) -> Any:
        """The log density."""
        return self.base_dist.log_prob(value)

    def _validate_sample(self, value: Tensor) -> None:
        if not bool(self.support.check(value).all()):
            raise ValueError("outside of the support")


class _Unmappable(NotImplementedError):
    """Why a support cannot be mapped."""


def _bijection(fn: Any) -> Transform:
    support = _support(fn)
    if support is not None:
        return biject_to(support)
    while isinstance(fn, ExpandedDistribution | MaskedDistribution):
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.Independent):
        return IndependentTransform(_bijection(fn.base_dist), fn.reinterpreted_batch_ndims)
    return ComposeTransform([_bijection(fn.base_dist), *fn.transforms])


def _support(fn: Any) -> Constraint | None:
    """The support of a distribution; None if it is no constraint of torch's."""
    if isinstance(fn, ExpandedDistribution | MaskedDistribution):
        return _support(fn.base_dist)
    if isinstance(fn, torch.distributions.Independent):
        base = _support(fn.base_dist)
        return None if base is None else _independent(base, len(fn.event_shape))
    if isinstance(fn, pyro.distributions.FoldedDistribution):
        return _folded(fn)
    if isinstance(fn.support, MixtureSameFamilyConstraint):
        return _of_mixture(fn)
    is_told = inspect.getattr_static(type(fn), "support") is not _REPORTED
    if is_told or not isinstance(fn, torch.distributions.TransformedDistribution):
        return fn.support
    support = _support(fn.base_dist)
    dtype = _dtype(fn.base_dist)
    for transform in _parts(fn.transforms):
        support = _image(support, transform, dtype)
    return None if support is None else _independent(support, len(fn.event_shape))


def _independent(support: Constraint, event_dim: int) -> Constraint:
    more = event_dim - support.event_dim
    return constraints.independent(support, more) if more > 0 else support


def _folded(fn: Any) -> Constraint:
    """Where |x| lies for x in an interval."""
    ends = _ends(_support(fn.base_dist))
    if ends is None:
        return fn.support
    lower, upper = (_tensor(end, _dtype(fn.base_dist)) for end in ends)
    least = torch.maximum(lower, -upper).clamp_min(0.0)
    return _between(_number(least), _number(torch.maximum(lower.abs(), upper.abs())))


def _of_mixture(fn: Any) -> Constraint:
    """The support of all components of a mixture, which stand in the last batch dimension."""
    part = fn.component_distribution
    found = _support(part)
    ends = _ends(found)
    if ends is None or not any(isinstance(end, Tensor) and end.dim() for end in ends):
        if found is None:
            raise _Unmappable("the support of the components of the mixture is not known")
        return found
    inner = []
    for end in ends:
        if isinstance(end, Tensor) and end.dim():
            # A bound has the components last, before the dimensions of an event.
            end = end.expand(part.batch_shape + part.event_shape).movedim(
                len(part.batch_shape) - 1, 0
            )
            if not bool((end == end[0]).all()):
                raise _Unmappable("the components of the mixture have different supports")
            end = end[0]
        inner.append(end)
    return _independent(_between(*inner), len(fn.event_shape))


def _parts(transforms: Any) -> list[Transform]:
    """The maps of a chain, one after the other."""
    parts: list[Transform] = []
    for transform in transforms:
        inner = _elementwise(transform)
        parts += _parts(inner.parts) if isinstance(inner, ComposeTransform) else [transform]
    return parts


def _elementwise(transform: Transform) -> Transform:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform


def _image(
    support: Constraint | None, transform: Transform, dtype: torch.dtype
) -> Constraint | None:
    """Where a map takes a support to; None if that is no constraint of torch's."""
    if not transform.bijective:
        raise _Unmappable(f"{type(transform).__name__} is not one-to-one, so it has no density")
    if support is None:
        return None
    ends, domain = _ends(support), _ends(transform.domain)
    if ends is None or domain is None:
        same = type(_scalar(support)) is type(_scalar(transform.domain))
        return transform.codomain if same and ends is domain else None
    if ends == domain if _are_numbers(*ends, *domain) else False:
        return transform.codomain
    if not _contains(domain, ends):
        raise _Unmappable(
            f"{type(transform).__name__} is defined on {transform.domain} alone, but what it is "
            f"given lies in {support}"
        )
    codomain = _ends(transform.codomain)
    try:
        sign = _number(_elementwise(transform).sign)
    except NotImplementedError:  # it mixes coordinates
        return None
    if codomain is None or isinstance(sign, Tensor):
        return None
    images = []
    for end, limit, there in zip(
        ends, domain, codomain if sign > 0 else codomain[::-1], strict=True
    ):
        at_limit = _are_numbers(end, limit) and end == limit
        images.append(there if at_limit else _number(_elementwise(transform)(_tensor(end, dtype))))
    return _between(*(images if sign > 0 else images[::-1]))


def _scalar(support: Constraint) -> Constraint:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _ends(support: Constraint | None) -> tuple[Bound, Bound] | None:
    """The ends of an interval, each a number or one for every element; None for other supports."""
    c = None if support is None else _scalar(support)
    if c is constraints.real or type(c) is type(constraints.real):
        return -math.inf, math.inf
    if isinstance(c, constraints.greater_than | constraints.greater_than_eq):
        return _number(c.lower_bound), math.inf
    if isinstance(c, constraints.less_than):
        return -math.inf, _number(c.upper_bound)
    if isinstance(c, constraints.interval | constraints.half_open_interval):
        return _number(c.lower_bound), _number(c.upper_bound)
    return None


def _between(lower: Bound, upper: Bound) -> Constraint:
    """The interval between two ends."""
    if _are_numbers(lower) and lower == -math.inf:
        is_all = _are_numbers(upper) and upper == math.inf
        return constraints.real if is_all else constraints.less_than(upper)
    if _are_numbers(upper) and upper == math.inf:
        is_zero = _are_numbers(lower) and lower == 0
        return constraints.positive if is_zero else constraints.greater_than(lower)
    return constraints.interval(lower, upper)


def _contains(outer: tuple[Bound, Bound], inner: tuple[Bound, Bound]) -> bool:
    """Whether an interval lies in another one, as far as can be said."""
    pairs = (inner[0], outer[0]), (outer[1], inner[1])
    return all(bool(torch.as_tensor(a >= b).all()) for a, b in pairs)


def _are_numbers(*bounds: Bound) -> bool:
    return not any(isinstance(bound, Tensor) for bound in bounds)


def _number(bound: Bound) -> Bound:
    """A bound as a number, if it is the same for all elements and no gradient passes it."""
    if not isinstance(bound, Tensor) or bound.requires_grad or not bound.numel():
        return bound
    first = bound.reshape(-1)[0]
    try:
        return float(first) if bool((bound == first).all()) else bound
    except RuntimeError:  # torch.func and tracers do not tell a value
        return bound


def _tensor(bound: Bound, dtype: torch.dtype) -> Tensor:
    return bound if isinstance(bound, Tensor) else torch.tensor(bound, dtype=dtype)


def _dtype(fn: Any) -> torch.dtype:
    """What a distribution computes in, by its parameters."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    values = (getattr(fn, name, None) for name in fn.arg_constraints)
    found = [value.dtype for value in values if isinstance(value, Tensor)]
    return found[0] if found else torch.get_default_dtype()


def _is_same_map(one: Transform, other: Transform) -> bool:
    """Whether two bijections are made of the same maps."""
    a, b = _parts([one]), _parts([other])
    return len(a) == len(b) and all(
        type(_elementwise(s)) is type(_elementwise(t)) and _are_equal(s, t)
        for s, t in zip(a, b, strict=True)
    )


def _are_equal(one: Transform, other: Transform) -> bool:
    s, t = _elementwise(one), _elementwise(other)
    if not isinstance(s, pyro.distributions.transforms.AffineTransform):
        return True
    return all(
        bool((torch.as_tensor(getattr(s, n)) == torch.as_tensor(getattr(t, n))).all())
        for n in ("loc", "scale")
    )
