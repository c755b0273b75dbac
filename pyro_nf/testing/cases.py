"""Points, contexts and random weights for the laws, and how their results are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_nf._checks import check_counts, check_kind, check_number, check_seed
from pyro_nf.flows.flow import Flow
from pyro_nf.transforms.base import FlowTransform

M = TypeVar("M", bound=nn.Module)
# The size of events when a transform takes any: of vectors, and of each dimension of others.
ANY_DIM, ANY_SIZE = 3, 4
BATCH_SHAPES = ((), (1,), (4,), (2, 3), (0,))
# Round trips: exact inverse, numeric inverse, and float32 where the input is of order one.
EXACT, NUMERIC, SINGLE = 1e-9, 1e-8, 1e-4
# The largest error of a log-determinant against autograd's.
LADJ = 1e-8


def randomize(module: M, scale: float = 0.3, seed: int = 0) -> M:
    """Moves every parameter away from its start, by noise that keeps activations of order one.

    Args:
        module: What to change, in place.
        scale: Standard deviation of the noise, divided by the root of the fan-in.
        seed: Seed of the noise.

    Example:
        >>> from pyro_nf.transforms.linear import ActNorm
        >>> bool((randomize(ActNorm(2)).bias == 0).any())
        False
    """
    check_kind("randomize", "module", module, nn.Module)
    check_number("randomize", "scale", scale, "a number >= 0", at_least=0)
    check_seed("randomize", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 and len(parameter) else 1
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale / max(fan_in, 1) ** 0.5 * noise).to(parameter))
    return module


def points(
    space: constraints.Constraint,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
) -> Tensor:
    """Random points of a space, of order one before they are mapped into it.

    Args:
        space: The constraint that they satisfy.
        shape: Their shape.
        dtype: Their dtype.
        seed: Seed of the draw.

    Example:
        >>> from pyro.distributions import constraints
        >>> bool((points(constraints.positive, (3,)) > 0).all())
        True
    """
    check_kind("points", "space", space, constraints.Constraint)
    check_counts("points", "shape", shape, at_least=0, empty=True)
    check_kind("points", "dtype", dtype, torch.dtype)
    check_seed("points", seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    return biject_to(space)(noise).to(dtype)


def close(what: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Raises unless two tensors have the same shape and nearly the same numbers."""
    assert got.shape == wanted.shape, (
        f"{what}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    )
    if got.numel():
        error = ((got - wanted).abs() / wanted.abs().clamp_min(1.0)).max().item()
        assert error <= tolerance, f"{what}: off by {error:.3g}, tolerance {tolerance:.3g}"


def close_ladj(
    transform: FlowTransform, what: str, got: Tensor, wanted: Tensor, tolerance: float
) -> None:
    """As `close`; of an estimate, another number at each call, only the shape can be wrong."""
    if transform.ladj_kind == "estimate":
        wanted = got.detach().reshape(wanted.shape) if got.numel() == wanted.numel() else wanted
    close(what, got, wanted, tolerance)


def _event_shape(transform: FlowTransform) -> tuple[int, ...]:
    """The shape of ``x``, or one that fits."""
    if transform.event_shape is not None:
        return transform.event_shape
    event_dim = transform.domain.event_dim
    return (ANY_DIM,) if event_dim == 1 else (ANY_SIZE,) * event_dim


def points_of(transform: FlowTransform, *batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Points of the domain of a transform, with this batch shape."""
    return points(transform.domain, (*batch, *_event_shape(transform)), dtype)


def context_of(
    transform: FlowTransform | Flow, *batch: int, dtype: torch.dtype = torch.float64
) -> Tensor | None:
    """Contexts for it, with this batch shape; None if it takes none."""
    if not transform.context_dim:
        return None
    return points(constraints.real, (*batch, transform.context_dim), dtype, seed=3)


def gradients_of(transform: FlowTransform, total: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a number by the points and all parameters; 0 where there is none."""
    leaves = [x, *transform.parameters()]
    return torch.autograd.grad(
        total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def raises(kind: type[Exception], part: str, call: Callable[..., object], *args: object) -> None:
    """Raises unless the call raises an error of this kind whose message has this part."""
    message = None
    try:
        call(*args)
    except kind as error:
        message = str(error)
    assert message is not None, f"wanted {kind.__name__} with {part!r}, got no error"
    assert part in message, f"wanted {part!r} in the message, got {message!r}"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Fixed random numbers inside; the global generators are as they were afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def fast_directions(
    transform: FlowTransform,
) -> Iterator[tuple[str, Callable[..., tuple[Tensor, Tensor]]]]:
    """The directions that cost one pass: the name of each, and its method."""
    if transform.fast in ("forward", "both"):
        yield "forward", transform.forward_and_ladj
    if transform.fast in ("inverse", "both") and transform.inverse_kind == "exact":
        yield "inverse", transform.inverse_and_ladj
