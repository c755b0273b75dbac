"""The laws that every map, transform and flow obeys, for the tests of this library and of yours.

Each law is a function that raises ``AssertionError`` and says what differs. ``check_univariate``,
``check_transform`` and ``check_flow`` run all that apply, with random weights and in float64.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.func import functional_call, jacrev, vmap
from torch.overrides import TorchFunctionMode

from pyro_nf._checks import (
    check_arguments,
    check_callable,
    check_context,
    check_count,
    check_counts,
    check_event_rows,
    check_kind,
    check_number,
    check_seed,
)
from pyro_nf.flows.flow import Flow
from pyro_nf.ops.spaces import ends
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.stochastic import StochasticChain, StochasticLayer, StochasticTransform
from pyro_nf.univariate.base import HINT, UnivariateMap

M = TypeVar("M", bound=nn.Module)
G = TypeVar("G", bound=Any)  # a guide: AutoFlow, which lives a floor above

# The size of events when a transform takes any: of vectors, and of each dimension of others.
ANY_DIM, ANY_SIZE = 3, 4
BATCH_SHAPES = ((), (1,), (4,), (2, 3), (0,))
# Round trips: exact inverse, numeric inverse, and float32 where the input is of order one.
EXACT, NUMERIC, SINGLE = 1e-9, 1e-8, 1e-4
# The largest error of a log-determinant against autograd's.
LADJ = 1e-8
# Draws behind the mean of an estimate: so many groups of so many.
COUNT_GROUPS, COUNT_DRAWS = 20, 100


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


def _close(what: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape, (
        f"{what}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    )
    if got.numel():
        error = ((got - wanted).abs() / wanted.abs().clamp_min(1.0)).max().item()
        assert error <= tolerance, f"{what}: off by {error:.3g}, tolerance {tolerance:.3g}"


def _close_ladj(
    transform: FlowTransform, what: str, got: Tensor, wanted: Tensor, tolerance: float
) -> None:
    """As `_close`; of an estimate, another number at each call, only the shape can be wrong."""
    if transform.ladj_kind == "estimate":
        wanted = got.detach().reshape(wanted.shape) if got.numel() == wanted.numel() else wanted
    _close(what, got, wanted, tolerance)


# Univariate maps.


def check_univariate(univariate: UnivariateMap) -> None:
    """Runs the laws of a univariate map: identity at 0, round trip, slope, order, ends.

    Args:
        univariate: The map.

    Raises:
        AssertionError: If a law is broken.

    Example:
        >>> from pyro_nf.univariate.affine import Affine
        >>> check_univariate(Affine())
    """
    check_kind("check_univariate", "univariate", univariate, UnivariateMap, HINT)
    name, p = type(univariate).__name__, univariate.num_params
    x = points(univariate.domain, (50, 4)).sort(0).values
    params = points(constraints.real, (50, 4, p), seed=2)
    y, ladj = univariate.forward_and_ladj(x, params)
    back, inverse_ladj = univariate.inverse_and_ladj(y, params)
    _close(f"{name}: round trip", back, x, EXACT if univariate.exact_inverse else NUMERIC)
    _close(f"{name}: ladj of the inverse", inverse_ladj, -ladj, LADJ)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(univariate.forward_and_ladj(leaf, params)[0].sum(), leaf)
    _close(f"{name}: ladj against autograd", ladj, slope.abs().log(), LADJ)
    by_autograd = UnivariateMap.slopes(univariate, x, params)
    for key, got in univariate.slopes(x, params)._asdict().items():
        _close(f"{name}: {key} against autograd", got, getattr(by_autograd, key), LADJ)
    kept, keep = by_autograd.x_params, params.clone().requires_grad_()
    moved = univariate.inverse_and_ladj(y, keep)[0].sum()
    if univariate.exact_inverse and p:
        _close(f"{name}: x_params", kept, torch.autograd.grad(moved, keep)[0], NUMERIC)
    y_again, _ = univariate.forward_and_ladj(x, params[:1].expand(50, 4, p))
    assert bool((y_again.diff(dim=0) > 0).all()), f"{name}: is not increasing"
    for dtype in (torch.float32, torch.float64):
        ends_are_safe(univariate, dtype)
    if p:
        start, start_ladj = univariate.forward_and_ladj(x, torch.zeros_like(params))
        _close(f"{name}: zero parameters against the identity", start, x, EXACT)
        _close(f"{name}: ladj at zero parameters", start_ladj, torch.zeros_like(x), EXACT)


def ends_are_safe(univariate: UnivariateMap, dtype: torch.dtype = torch.float32) -> None:
    """Far points and the ends of the image give no NaN; beyond the ends there is no density.

    Args:
        univariate: The map.
        dtype: What it computes in.

    Raises:
        AssertionError: If the law is broken.

    Example:
        >>> from pyro_nf.univariate.fixed import Tanh
        >>> ends_are_safe(Tanh())
    """
    name, p = type(univariate).__name__, univariate.num_params
    largest = torch.finfo(dtype).max / 4
    far = torch.tensor([-largest, -1e4, -30.0, 0.0, 30.0, 1e4, largest], dtype=dtype)
    far = far[univariate.domain.check(far)]
    y, ladj = univariate.forward_and_ladj(far, far.new_zeros(len(far), p))
    assert bool(y.isfinite().all() and ladj.isfinite().all()), f"{name}: not finite at {far}"
    assert bool(univariate.codomain.check(y).all()), f"{name}: {y} is outside of its image"
    x, ladj = univariate.inverse_and_ladj(y, y.new_zeros(len(y), p))
    assert bool(x.isfinite().all() and ladj.isfinite().all()), f"{name}: no way back from {y}"
    known = ends(univariate.codomain)
    assert known is not None, f"{name}: the ends of the codomain {univariate.codomain} are unknown"
    for end, beyond in zip(known, (-1.0, 1.0), strict=True):
        value = (end + torch.tensor([0.0, beyond])).to(dtype)
        x, ladj = univariate.inverse_and_ladj(value, value.new_zeros(2, p))
        if end.isfinite():
            assert bool(x.isfinite().all()), f"{name}: the inverse of {value} is {x}"
            assert ladj[1] == -torch.inf, f"{name}: a density at {value[1]}, outside of its image"


# Transforms.


def _event_shape(transform: FlowTransform) -> tuple[int, ...]:
    """The shape of ``x``, or one that fits."""
    if transform.event_shape is not None:
        return transform.event_shape
    event_dim = transform.domain.event_dim
    return (ANY_DIM,) if event_dim == 1 else (ANY_SIZE,) * event_dim


def _x(transform: FlowTransform, *batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return points(transform.domain, (*batch, *_event_shape(transform)), dtype)


def _context(
    transform: FlowTransform | Flow, *batch: int, dtype: torch.dtype = torch.float64
) -> Tensor | None:
    if not transform.context_dim:
        return None
    return points(constraints.real, (*batch, transform.context_dim), dtype, seed=3)


def round_trip(transform: FlowTransform) -> None:
    """T^-1(T(x)) = x, with nothing cached, in float64 and in float32."""
    for dtype, exact in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        t = copy.deepcopy(transform).to(dtype)
        x, context = _x(t, 20, dtype=dtype), _context(t, 20, dtype=dtype)
        y, ladj = t.forward_and_ladj(x, context)
        back, inverse_ladj = t.inverse_and_ladj(y.clone(), context)
        numeric = dtype == torch.float64 and t.inverse_kind == "numeric"
        tolerance = NUMERIC if numeric else exact
        _close(f"round trip in {dtype}", back, x, tolerance)
        _close_ladj(t, f"ladj of the inverse in {dtype}", inverse_ladj, -ladj, 10 * tolerance)


def shapes_are_told(transform: FlowTransform) -> None:
    """``forward_shape`` and ``inverse_shape`` say what comes out, as do the spaces."""
    x, context = _x(transform, 2, 3), _context(transform, 3)
    y, ladj = transform.forward_and_ladj(x, context)
    got = torch.Size(transform.forward_shape(x.shape))
    assert got == y.shape, f"forward_shape is {tuple(got)}, but y has shape {tuple(y.shape)}"
    got = torch.Size(transform.inverse_shape(y.shape))
    assert got == x.shape, f"inverse_shape is {tuple(got)}, but x has shape {tuple(x.shape)}"
    for name, value, space, shape in (
        ("domain", x, transform.domain, transform.event_shape),
        ("codomain", y, transform.codomain, transform.output_shape),
    ):
        event = value.shape[ladj.dim() :]
        assert space.event_dim == len(event), f"{name}.event_dim is {space.event_dim}"
        assert shape in (None, event), f"the event is {tuple(event)}, not {shape}"
        assert bool(space.check(value).all()), f"a point outside of the {name}"


def ladj_is_autograds(transform: FlowTransform) -> None:
    """The ladj is the slogdet of autograd's Jacobian; an estimate is so on average."""
    if transform.ladj_kind == "estimate":
        _ladj_is_unbiased(transform)
        return
    x, context = _x(transform, 5), _context(transform, 5)
    y, ladj = transform.forward_and_ladj(x, context)
    count = x[0].numel()
    for i in range(len(x)):
        c = None if context is None else context[i]
        jacobian = torch.autograd.functional.jacobian(
            lambda v, c=c: transform.forward_and_ladj(v, c)[0], x[i]
        ).reshape(count, count)
        _close("ladj against slogdet", ladj[i], jacobian.slogdet().logabsdet, LADJ)
    t = transform.condition(context) if context is not None else transform
    _close("log_abs_det_jacobian", t.log_abs_det_jacobian(x, y), ladj, LADJ)


def _slogdet(transform: FlowTransform, x: Tensor, context: Tensor | None) -> Tensor:
    """log|det J| at one point, with a graph."""
    jacobian = torch.autograd.functional.jacobian(
        lambda v: transform.forward_and_ladj(v, context)[0], x, create_graph=True
    )
    return cast(Tensor, jacobian.slogdet().logabsdet)


def _ladj_is_unbiased(transform: FlowTransform) -> None:
    """Means of the estimated ladj, and of its gradients, are those of autograd's slogdet."""
    point, context = _x(transform), _context(transform)
    x = point.clone().requires_grad_()
    y = transform.forward_and_ladj(point, context)[0].detach()
    true, leaves = _slogdet(transform, x, context), [x, *transform.parameters()]
    slopes = torch.autograd.grad(true, leaves, allow_unused=True, materialize_grads=True)
    directions = [points(constraints.real, tuple(leaf.shape), seed=5) for leaf in leaves]
    wanted = sum((s * r).sum() for s, r in zip(slopes, directions, strict=True))
    with _seeded(0):
        values, gradients = [], []
        for _ in range(COUNT_GROUPS):
            many = x.expand(COUNT_DRAWS, -1)
            ladj = transform.forward_and_ladj(many, context)[1]
            inverse_ladj = transform.inverse_and_ladj(y.expand(COUNT_DRAWS, -1), context)[1]
            values.append(torch.stack([ladj.detach(), -inverse_ladj.detach()], -1))
            grads = torch.autograd.grad(
                ladj.mean(), leaves, allow_unused=True, materialize_grads=True
            )
            gradients.append(sum((g * r).sum() for g, r in zip(grads, directions, strict=True)))
    each = torch.cat(values)
    _mean_is("mean ladj against slogdet", each, true.detach().expand(2), LADJ)
    of_gradients = torch.stack(cast("list[Tensor]", gradients))
    _mean_is("mean gradient of the ladj", of_gradients, cast(Tensor, wanted), LADJ)


def _scores_are_unbiased(transform: FlowTransform) -> None:
    point, context = _x(transform), _context(transform)
    x = point.clone().requires_grad_()
    score_x = points(constraints.real, tuple(x.shape), seed=4)
    (slope,) = torch.autograd.grad(_slogdet(transform, x, context), x, allow_unused=True)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: transform.forward_and_ladj(v, context)[0], point
    )
    wanted = torch.linalg.solve(jacobian.T, score_x - (0.0 if slope is None else slope))
    many = (v.expand(COUNT_GROUPS * COUNT_DRAWS, -1) for v in (point, score_x))
    with _seeded(0), torch.no_grad():
        y, _, score_y = transform.push_score(next(many), next(many), context)
    _close("y of push_score", y[0], transform.forward_and_ladj(point, context)[0], EXACT)
    _mean_is("mean score of push_score", score_y, wanted, LADJ)


def inverse_is_a_module(transform: FlowTransform) -> None:
    """``.inv`` has the same parameters, exchanges the directions, and inverts back to itself."""
    inverse = transform.inv
    mine = {id(p) for p in transform.parameters()}
    assert mine == {id(p) for p in inverse.parameters()}, ".inv has other parameters"
    x, context = _x(transform, 4), _context(transform, 4)
    y, ladj = transform.forward_and_ladj(x, context)
    back, inverse_ladj = inverse.forward_and_ladj(y, context)
    _close(".inv forward", back, x, NUMERIC)
    _close_ladj(transform, ".inv ladj", inverse_ladj, -ladj, LADJ)
    _close(".inv.inv", inverse.inv.forward_and_ladj(x, context)[0], y, EXACT)


def batch_shapes(transform: FlowTransform) -> None:
    """Any batch shape will do, and each element is mapped by itself."""
    for shape in BATCH_SHAPES:
        x, context = _x(transform, *shape), _context(transform, *shape)
        y, ladj = transform.forward_and_ladj(x, context)
        assert ladj.shape == shape, f"ladj has shape {tuple(ladj.shape)}, wanted {shape}"
        back, inverse_ladj = transform.inverse_and_ladj(y, context)
        _close(f"batch shape {shape}", back, x, NUMERIC)
        assert inverse_ladj.shape == shape
        for i in range(shape[0] if shape else 0):
            one = transform.forward_and_ladj(x[i], None if context is None else context[i])
            _close(f"element {i} of batch shape {shape}", y[i], one[0], EXACT)
            _close_ladj(transform, f"ladj {i} of batch shape {shape}", ladj[i], one[1], EXACT)


def context_broadcasts(transform: FlowTransform) -> None:
    """A batch of contexts broadcasts against any batch of points, and each point sees its own."""
    if not transform.context_dim:
        return
    x, context = _x(transform, 5, 1), _context(transform, 2)
    assert context is not None
    y, ladj = transform.forward_and_ladj(x, context)
    assert ladj.shape == (5, 2), f"ladj has shape {tuple(ladj.shape)}, wanted (5, 2)"
    for b in range(2):
        one, one_ladj = transform.forward_and_ladj(x[:, 0], context[b])
        _close(f"context {b}", y[:, b], one, EXACT)
        _close_ladj(transform, f"ladj of context {b}", ladj[:, b], one_ladj, EXACT)
    assert not torch.equal(y[:, 0], y[:, 1]), "the context makes no difference"
    conditioned = transform.condition(context)
    _close(".condition(context)", conditioned(x), y, EXACT)
    _close(".condition(context).inv", conditioned.inv(y), x.expand(5, 2, *x.shape[2:]), NUMERIC)


def keeps_dtype(transform: FlowTransform) -> None:
    """dtype follows the data after ``.to(dtype)``."""
    for dtype in (torch.float32, torch.float64):
        t = copy.deepcopy(transform).to(dtype)
        x, context = _x(t, 3, dtype=dtype), _context(t, 3, dtype=dtype)
        y, ladj = t.forward_and_ladj(x, context)
        back, inverse_ladj = t.inverse_and_ladj(y, context)
        got = [y.dtype, ladj.dtype, back.dtype, inverse_ladj.dtype]
        assert got == [dtype] * 4, f"dtypes {got}, wanted {dtype}"


def every_parameter_learns(transform: FlowTransform) -> None:
    """A gradient reaches every parameter, through either direction."""
    x, context = _x(transform, 16), _context(transform, 16)
    y = transform.forward_and_ladj(x, context)[0].detach()
    for name, (value, ladj) in {
        "forward": transform.forward_and_ladj(x, context),
        "inverse": transform.inverse_and_ladj(y, context),
    }.items():
        if not value.requires_grad:
            continue
        loss = value.square().sum() + ladj.sum()
        named = dict(transform.named_parameters())
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for key, grad in zip(named, grads, strict=True):
            assert grad is not None, f"{name}: {key} gets no gradient"
            assert bool(grad.isfinite().all()), f"{name}: {key} gets a gradient that is not finite"
            # with one coordinate a triangle or a mask leaves some parameters nothing to do
            learns = bool((grad != 0).any()) or x[0].numel() == 1
            assert learns, f"{name}: {key} gets the gradient 0"


def gradients_cancel(transform: FlowTransform) -> None:
    """T^-1(T(x)) = x for all parameters, so its gradient is 0 in them and 1 in x."""
    x, context = _x(transform, 6).requires_grad_(), _context(transform, 6)
    y, ladj = transform.forward_and_ladj(x, context)
    back, inverse_ladj = transform.inverse_and_ladj(y, context)
    r = points(constraints.real, tuple(x.shape), seed=4)
    s = points(constraints.real, tuple(ladj.shape), seed=5)
    s = s * (transform.ladj_kind == "exact")  # two estimates do not cancel
    loss = (back * r).sum() + ((ladj + inverse_ladj) * s).sum()
    parameters = list(transform.parameters())
    grad_x, *grads = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)
    _close("gradient in x of a round trip", grad_x, r, 1e-6)
    for grad in grads:
        if grad is not None:
            _close("gradient in a parameter of a round trip", grad, torch.zeros_like(grad), 1e-6)


def scores_are_pushed(transform: FlowTransform) -> None:
    """J^T times the score of y, plus the gradient of the ladj, is the score of x.

    What comes with the score is what the forward direction gives, and has the same gradient. With
    an estimate the score is right on average.
    """
    if transform.ladj_kind == "estimate":
        _scores_are_unbiased(transform)
        return
    x, context = _x(transform, 2, 3).requires_grad_(), _context(transform, 3)
    y, ladj = transform.forward_and_ladj(x, context)
    score_x = points(constraints.real, tuple(x.shape), seed=4)
    pushed, pushed_ladj, score_y = transform.push_score(x, score_x, context)
    assert not score_y.requires_grad, "push_score left a graph of the score"
    _close("y of push_score", pushed, y, EXACT)
    _close("ladj of push_score", pushed_ladj, ladj, EXACT)
    total = (y * score_y).sum() + ladj.sum()
    wanted, *grads = _gradients(transform, total, x)
    _close("score brought back", wanted, score_x, 1e-6)
    for got, want in zip(
        _gradients(transform, (pushed * score_y).sum() + pushed_ladj.sum(), x),
        (wanted, *grads),
        strict=True,
    ):
        _close("gradient by push_score", got, want, EXACT)
    with torch.no_grad():
        again = transform.push_score(x, score_x, context)
    assert not any(t.requires_grad for t in again), "push_score made a graph under no_grad"
    _close("score under no_grad", again[2], score_y, EXACT)


def _gradients(transform: FlowTransform, total: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    leaves = [x, *transform.parameters()]
    return torch.autograd.grad(
        total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def nothing_is_stale(transform: FlowTransform) -> None:
    """The same tensor gives the new value after any change of a parameter, even through .data."""
    t = copy.deepcopy(transform)
    parameters = [p for p in t.parameters() if p.numel()]
    if not parameters:
        return
    x, context = _x(t, 8), _context(t, 8)
    y, _ = t.forward_and_ladj(x, context)
    t.inverse_and_ladj(y, context)
    for p in parameters:
        p.data.add_(0.1)
    fresh = copy.deepcopy(t)
    _close("forward", t.forward_and_ladj(x, context)[0], fresh.forward_and_ladj(x, context)[0], 0.0)
    _close("inverse", t.inverse_and_ladj(y, context)[0], fresh.inverse_and_ladj(y, context)[0], 0.0)
    assert not torch.equal(t.forward_and_ladj(x, context)[0], y), "a change changes nothing"


def copies_agree(transform: FlowTransform) -> None:
    """deepcopy, pickle and state_dict give the same map, before and after a call."""
    x, context = _x(transform, 4), _context(transform, 4)
    for _ in range(2):
        blank = randomize(copy.deepcopy(transform), seed=9)
        buffer = io.BytesIO()
        torch.save(transform.state_dict(), buffer)
        buffer.seek(0)
        blank.load_state_dict(torch.load(buffer, weights_only=True))
        copied = {
            "deepcopy": copy.deepcopy(transform),
            "pickle": pickle.loads(pickle.dumps(transform)),
            "state_dict": blank,
        }
        y = transform.forward_and_ladj(x, context)[0]
        for name, other in copied.items():
            _close(name, other.forward_and_ladj(x, context)[0], y, 0.0)


def _fast_directions(
    transform: FlowTransform,
) -> Iterator[tuple[str, Callable[..., tuple[Tensor, Tensor]]]]:
    if transform.fast in ("forward", "both"):
        yield "forward", transform.forward_and_ladj
    if transform.fast in ("inverse", "both") and transform.inverse_kind == "exact":
        yield "inverse", transform.inverse_and_ladj


class _Watch(TorchFunctionMode):
    """Sees whether a function calls ``torch.autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen |= func is torch.autograd.grad
        return func(*args, **(kwargs or {}))


def _differentiates(
    direction: Callable[..., object], value: Tensor, context: Tensor | None
) -> bool:
    """Whether a direction takes slopes by autograd: torch neither maps nor compiles those."""
    with _Watch() as watch:
        direction(value, context)
    return watch.seen


def compiles(transform: FlowTransform) -> None:
    """The fast directions are one graph for torch.compile, but for slopes by autograd."""
    context = _context(transform, 4)
    for name, direction in _fast_directions(transform):
        value = _x(transform, 4)
        if name == "inverse":
            value = transform.forward_and_ladj(value, context)[0].detach()
        if _differentiates(direction, value, context):
            continue
        torch.compiler.reset()
        compiled = torch.compile(direction, fullgraph=True, backend="aot_eager")
        got, wanted = compiled(value, context), direction(value, context)
        _close(f"compiled {name}", got[0], wanted[0], EXACT)
        _close_ladj(transform, f"compiled ladj of {name}", got[1], wanted[1], EXACT)


def vmaps(transform: FlowTransform) -> None:
    """The fast directions run under vmap over points, but for slopes by autograd."""
    context = _context(transform, 4)
    for name, direction in _fast_directions(transform):
        value = _x(transform, 4)
        if name == "inverse":
            value = transform.forward_and_ladj(value, context)[0].detach()
        if _differentiates(direction, value, context):
            continue
        dims, noise = (0, None if context is None else 0), "different"
        got = vmap(direction, in_dims=dims, randomness=noise)(value, context)
        _close(f"vmap of {name}", got[0], direction(value, context)[0], EXACT)
        wanted = direction(value, context)[1]
        _close_ladj(transform, f"vmap of the ladj of {name}", got[1], wanted, EXACT)


def bad_input_is_named(transform: FlowTransform) -> None:
    """Wrong shapes, contexts and dtypes raise the right error, with the sizes in the message."""
    x, context = _x(transform, 3), _context(transform, 3)
    y = transform.forward_and_ladj(x, context)[0].detach()
    for call, value, event in (
        (transform.forward_and_ladj, x, transform.event_shape),
        (transform.inverse_and_ladj, y, transform.output_shape),
    ):
        if event:
            wide = value.new_zeros(3, *event[:-1], event[-1] + 1)
            part = (
                f"input_dim is {event[0]}" if len(event) == 1 else f"event_shape = {tuple(event)}"
            )
            _raises(ValueError, part, call, wide, context)
        _raises(TypeError, "int64", call, value.long(), context)
        _raises(TypeError, "list", call, value.tolist(), context)
        if context is None:
            _raises(ValueError, "takes none", call, value, value.new_zeros(3, 2))
        else:
            _raises(ValueError, "context is missing", call, value, None)
            _raises(ValueError, "context_dim = ", call, value, torch.cat((context, context), -1))
            two = context.new_zeros(2, context.shape[-1])
            _raises(ValueError, "does not broadcast", call, value, two)
    if transform.domain.event_dim:
        _raises(ValueError, "dimension", transform.forward_and_ladj, x.sum(), context)


def _raises(kind: type[Exception], part: str, call: Callable[..., object], *args: object) -> None:
    message = None
    try:
        call(*args)
    except kind as error:
        message = str(error)
    assert message is not None, f"wanted {kind.__name__} with {part!r}, got no error"
    assert part in message, f"wanted {part!r} in the message, got {message!r}"


TRANSFORM_LAWS: tuple[Callable[[FlowTransform], None], ...] = (
    round_trip,
    shapes_are_told,
    ladj_is_autograds,
    inverse_is_a_module,
    batch_shapes,
    context_broadcasts,
    keeps_dtype,
    every_parameter_learns,
    gradients_cancel,
    scores_are_pushed,
    nothing_is_stale,
    copies_agree,
    compiles,
    vmaps,
    bad_input_is_named,
)


def check_transform(transform: FlowTransform) -> None:
    """Runs every law of a transform, with random weights, in float64.

    Args:
        transform: The transform; it is copied first.

    Raises:
        AssertionError: If a law is broken.

    Example:
        >>> from pyro_nf.transforms.linear import LULinear
        >>> check_transform(LULinear(3))
    """
    check_kind("check_transform", "transform", transform, FlowTransform)
    transform = randomize(copy.deepcopy(transform)).double()
    for law in TRANSFORM_LAWS:
        law(transform)


# Flows.


def _condition(flow: Flow, *batch: int) -> tuple[Tensor, ...]:
    context = _context(flow, *batch)
    return () if context is None else (context,)


def density_of_draws(flow: Flow) -> None:
    """Draws come with their log density, the same that ``log_prob`` computes afresh.

    Where it is another number at each call, a bound of the last draws is that of their own paths.
    """
    d = flow(*_condition(flow))
    with _seeded(0):
        y, log_prob = d.rsample_and_log_prob((20,))
    assert y.shape == (20, *flow.event_shape), f"draws have shape {tuple(y.shape)}"
    with _seeded(0):
        again = d.rsample((20,))
    if flow.log_prob_kind == "exact":
        _close("log_prob of draws", flow(*_condition(flow)).log_prob(y.clone()), log_prob, 1e-7)
        _close("log_prob of the last draws", d.log_prob(again), d.log_prob(again.clone()), 1e-7)
    elif flow.log_prob_kind == "bound":
        _close("log_prob of the last draws", d.log_prob(again), log_prob, EXACT)
    assert y.dtype == log_prob.dtype == torch.float64


def batches_of_contexts(flow: Flow) -> None:
    """A batch of contexts makes a batch of distributions with noise of their own."""
    batch = (4,) if flow.context_dim else ()
    d = flow(*_condition(flow, *batch)).expand((4,))
    y = d.sample((6,))
    assert y.shape == (6, 4, *flow.event_shape), f"draws have shape {tuple(y.shape)}"
    assert d.batch_shape == (4,)
    assert d.event_shape == flow.event_shape
    x, _ = d.transform.inverse_and_ladj(y)
    spread = x.std(1, correction=0).min().item()
    assert spread > 0, "the noise is shared between contexts"
    if flow.log_prob_kind == "exact":
        _close("log_prob", d.log_prob(y)[2], d.log_prob(y[2]), EXACT)
    wide = d.expand((3, 4))
    assert wide.sample().shape == (3, 4, *flow.event_shape)
    assert wide.to_event(1).log_prob(wide.sample()).shape == (3,)
    assert wide.mask(False).log_prob(wide.sample()).abs().sum().item() == 0


def gradient_of_a_draw(flow: Flow) -> None:
    """The gradient of a loss of a draw and its log density is finite for every parameter."""
    d = flow(*_condition(flow))
    if not d.has_rsample:
        return
    y = d.rsample((8,))
    (d.log_prob(y).sum() + y.square().sum()).backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None, f"{name} gets no gradient"
        assert bool(p.grad.isfinite().all()), f"{name} gets a gradient that is not finite"
    flow.zero_grad()


class _LogProb(nn.Module):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, y: Tensor, *args: Tensor) -> Tensor:
        log_prob: Tensor = self.flow(*args).log_prob(y)
        return log_prob


def flow_copies_agree(flow: Flow) -> None:
    """deepcopy, pickle and functional_call give the same density."""
    args = _condition(flow)
    with _seeded(0):
        y = flow(*args).sample((4,))
    wanted = _log_prob(flow, y, *args)
    copied = (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)))
    for other in copied:
        _close("copy", _log_prob(other, y, *args), wanted, 0.0)
    density = _LogProb(flow)
    state = {k: v + 0.05 for k, v in density.named_parameters()}
    with _seeded(0):
        moved = functional_call(density, state, (y, *args))
    assert not torch.equal(moved, wanted), "the parameters make no difference"
    _close("after functional_call", _log_prob(flow, y, *args), wanted, 0.0)


def _log_prob(flow: Flow, y: Tensor, *args: Tensor) -> Tensor:
    """The log density with one seed, if it is another number at each call."""
    with _seeded(0):
        return cast(Tensor, flow(*args).log_prob(y))


def scores_agree(flow: Flow) -> None:
    """vmap and jacrev of the log density give the gradient that autograd gives."""
    transform = flow.transform
    if isinstance(transform, StochasticTransform) or flow.log_prob_kind != "exact":
        return
    if "inverse" not in _ways(transform) or transform.inverse_kind != "exact":
        return
    args = _condition(flow)
    y = points(constraints.real, (4, *flow.event_shape)).requires_grad_()
    (wanted,) = torch.autograd.grad(flow(*args).log_prob(y).sum(), y)
    got = vmap(jacrev(lambda v: flow(*args).log_prob(v)))(y)
    _close("score by vmap(jacrev)", got, wanted, 1e-7)


def _ways(transform: FlowTransform) -> tuple[str, ...]:
    fast = transform.fast
    return ("forward", "inverse") if fast == "both" else (fast,)


FLOW_LAWS: tuple[Callable[[Flow], None], ...] = (
    density_of_draws,
    batches_of_contexts,
    gradient_of_a_draw,
    flow_copies_agree,
    scores_agree,
)


def check_flow(flow: Flow) -> None:
    """Runs every law of a flow over the whole real space, with random weights, in float64.

    Args:
        flow: The flow; it is copied first.

    Raises:
        AssertionError: If a law is broken.

    Example:
        >>> from pyro_nf.flows.recipes import realnvp
        >>> check_flow(realnvp(2))
    """
    check_kind("check_flow", "flow", flow, Flow)
    flow = randomize(copy.deepcopy(flow)).double()
    for law in FLOW_LAWS:
        law(flow)


# Layers that draw or lose something.


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _given(
    transform: StochasticTransform, *batch: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor | None]:
    """Points on the base side and their contexts."""
    space = transform.domain
    event = transform.event_shape or (ANY_DIM,) * space.event_dim
    if space.is_discrete:
        low, high = (int(end.clamp(-3, 3).max()) for end in ends(space) or torch.tensor([-3, 3]))
        x = points(constraints.unit_interval, (*batch, *event), dtype)
        x = (low + (high + 1 - low) * x).floor()
    else:
        x = points(space, (*batch, *event), dtype)
    if not transform.context_dim:
        return x, None
    return x, points(constraints.real, (*batch, transform.context_dim), dtype, seed=3)


def contributions_agree(transform: StochasticTransform) -> None:
    """Both directions return the contribution of the pair that they make, with opposite signs.

    That of a chain is the sum over its parts along the path.
    """
    x, context = _given(transform, 7)
    if isinstance(transform, StochasticChain):
        with _seeded(0):
            y, ladj = transform.forward_and_ladj(x, context)
        total, path = torch.zeros_like(ladj), x
        with _seeded(0):
            for part in cast(Any, transform.parts):
                path, each = part.forward_and_ladj(path, context if part.context_dim else None)
                total = total + each
        _close("value of a chain against its parts", y, path, EXACT)
        _close("contribution of a chain against its parts", ladj, total, EXACT)
        for part in transform.parts:
            if isinstance(part, StochasticTransform):
                contributions_agree(part)
    elif isinstance(transform, StochasticLayer):
        y, ladj = transform.forward_and_ladj(x, context)
        _close("contribution forward", ladj, transform.contribution(x, y, context), LADJ)
        back, inverse_ladj = transform.inverse_and_ladj(y, context)
        given = transform.contribution(back, y, context)
        _close("contribution of the inverse", inverse_ladj, -given, LADJ)


def what_draws_nothing_undoes(transform: StochasticTransform) -> None:
    """Where only one direction draws, the other one undoes it; draws repeat with their seed."""
    x, context = _given(transform, 9)
    y, ladj = transform.forward_and_ladj(x, context)
    is_estimate = any(
        isinstance(part, FlowTransform) and part.ladj_kind == "estimate"
        for part in transform.modules()
    )
    if transform.random in ("forward", "neither"):
        back, inverse_ladj = transform.inverse_and_ladj(y, context)
        _close("the inverse undoes forward", back, x, EXACT)
        if not is_estimate:
            _close("contribution of the way back", inverse_ladj, -ladj, LADJ)
    if transform.random in ("inverse", "neither"):
        x, inverse_ladj = transform.inverse_and_ladj(y, context)
        again, ladj = transform.forward_and_ladj(x, context)
        _close("forward undoes the inverse", again, y, EXACT)
        if not is_estimate:
            _close("contribution of the way there", ladj, -inverse_ladj, LADJ)
    ways = {"forward": (transform.forward_and_ladj, x), "inverse": (transform.inverse_and_ladj, y)}
    for way, (call, value) in ways.items():
        many = value[:1].expand(100, *value.shape[1:])
        given = None if context is None else context[:1]
        drawn = []
        for seed in (0, 0, 1):
            with _seeded(seed):
                drawn.append(call(many, given))
        for got, wanted in zip(drawn[0], drawn[1], strict=True):
            _close(f"{way} with the same seed", got, wanted, 0.0)
        draws = transform.random in (way, "both")
        is_same = torch.equal(drawn[0][0], drawn[2][0])
        assert is_same != draws, f"random is {transform.random!r}, but {way} draws: {not is_same}"


def stochastic_shapes(transform: StochasticTransform) -> None:
    """Any batch and dtype will do, contexts broadcast, and shapes are those that were said."""
    for dtype in (torch.float64, torch.float32):
        t = copy.deepcopy(transform).to(dtype)
        for shape in BATCH_SHAPES:
            x, context = _given(t, *shape, dtype=dtype)
            y, ladj = t.forward_and_ladj(x, context)
            back, inverse_ladj = t.inverse_and_ladj(y, context)
            assert y.shape == t.forward_shape(x.shape), f"y has shape {tuple(y.shape)}"
            assert back.shape == t.inverse_shape(y.shape) == x.shape, f"x: {tuple(back.shape)}"
            got = [tuple(ladj.shape), tuple(inverse_ladj.shape)]
            assert got == [shape] * 2, f"contributions have shapes {got}, wanted {shape}"
            dtypes = {y.dtype, ladj.dtype, back.dtype, inverse_ladj.dtype}
            assert dtypes == {dtype}, f"dtypes {dtypes}, wanted {dtype}"
    if not transform.context_dim:
        return
    (x, _), (_, context) = _given(transform, 5, 1), _given(transform, 2)
    with _seeded(0):
        y, ladj = transform.forward_and_ladj(x, context)
    assert ladj.shape == (5, 2), f"contribution of shape {tuple(ladj.shape)}, wanted (5, 2)"
    with _seeded(0):
        conditioned, _ = transform.condition(cast(Tensor, context)).forward_and_ladj(x)
    _close(".condition(context)", conditioned, y, EXACT)
    alike = cast(Tensor, context)[:1].expand(2, -1)
    with _seeded(0):
        assert not torch.equal(transform.forward_and_ladj(x, alike)[0], y), "context: no effect"


def stochastic_inverse_and_copies(transform: StochasticTransform) -> None:
    """``.inv`` exchanges the laws, and copies have the same; the parameters are the same too."""
    x, context = _given(transform, 6)
    inverse = transform.inv
    assert {id(p) for p in transform.parameters()} == {id(p) for p in inverse.parameters()}
    assert inverse.event_shape == transform.output_shape, ".inv has another event_shape"
    with _seeded(0):
        y, ladj = transform.forward_and_ladj(x, context)
    others = {
        ".inv": inverse.inverse_and_ladj,
        ".inv.inv": inverse.inv.forward_and_ladj,
        "deepcopy": copy.deepcopy(transform).forward_and_ladj,
        "pickle": pickle.loads(pickle.dumps(transform)).forward_and_ladj,
    }
    for name, call in others.items():
        with _seeded(0):
            got, got_ladj = call(x, context)
        _close(name, got, y, 0.0)
        _close(f"contribution of {name}", got_ladj, ladj, 0.0)


def stochastic_parameters_learn(transform: StochasticTransform) -> None:
    """A gradient reaches every parameter, through one direction or the other."""
    named = dict(transform.named_parameters())
    if not named:
        return
    x, context = _given(transform, 32)
    with _seeded(0):
        y, ladj = transform.forward_and_ladj(x, context)
        back, inverse_ladj = transform.inverse_and_ladj(y.detach(), context)
    loss = y.square().sum() + ladj.sum() + back.square().sum() + 2 * inverse_ladj.sum()
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    for name, grad in zip(named, grads, strict=True):
        assert grad is not None, f"{name} gets no gradient"
        assert bool(grad.isfinite().all()), f"{name} gets a gradient that is not finite"
        assert bool((grad != 0).any()), f"{name} gets the gradient 0"


def stochastic_scores_are_pushed(transform: StochasticTransform) -> None:
    """The slope of the log density under a normal base, where the inverse draws nothing."""
    x, context = _given(transform, 5)
    if transform.ladj_kind == "bound":
        _raises(TypeError, "Reparameterised", transform.push_score, x, -x, context)
        return
    if transform.codomain.is_discrete:
        return
    with _seeded(0):
        y, ladj, score = transform.push_score(x, -x, context)
    with _seeded(0):
        wanted = transform.forward_and_ladj(x, context)
        leaf = y.detach().requires_grad_()
        back, inverse_ladj = transform.inverse_and_ladj(leaf, context)
    (slope,) = torch.autograd.grad(inverse_ladj.sum() - 0.5 * back.square().sum(), leaf)
    _close("y of push_score", y, wanted[0], EXACT)
    _close("contribution of push_score", ladj, wanted[1], EXACT)
    assert not score.requires_grad, "push_score left a graph of the score"
    if transform.ladj_kind == "exact":
        _close("score of push_score", score, slope, 1e-7)


def stochastic_input_is_named(transform: StochasticTransform) -> None:
    """Wrong shapes, contexts and dtypes raise the right error, with the sizes in the message."""
    x, context = _given(transform, 3)
    with _seeded(0):
        y = transform.forward_and_ladj(x, context)[0].detach()
    for call, value, shape in (
        (transform.forward_and_ladj, x, transform.event_shape),
        (transform.inverse_and_ladj, y, transform.output_shape),
    ):
        if shape is not None:
            wide = torch.cat((value, value[..., :1]), -1)
            _raises(ValueError, str(tuple(wide.shape)), call, wide, context)
        _raises(TypeError, "list", call, value.tolist(), context)
        _raises(TypeError, "complex64", call, value.to(torch.complex64), context)
        if context is None:
            _raises(ValueError, "takes none", call, value, x.new_zeros(3, 2))
        else:
            _raises(ValueError, "context is missing", call, value, None)
            _raises(ValueError, "context_dim = ", call, value, torch.cat((context, context), -1))


STOCHASTIC_LAWS: tuple[Callable[[StochasticTransform], None], ...] = (
    contributions_agree,
    what_draws_nothing_undoes,
    stochastic_shapes,
    stochastic_inverse_and_copies,
    stochastic_parameters_learn,
    stochastic_scores_are_pushed,
    stochastic_input_is_named,
)


def check_stochastic(transform: StochasticTransform) -> None:
    """Runs the laws of a stochastic transform, with random weights, in float64.

    Whether its contribution makes the right density is a question to a whole flow:
    :func:`check_log_prob`.

    Args:
        transform: The transform; it is copied first.

    Raises:
        AssertionError: If a law is broken.

    Example:
        >>> from pyro_nf.transforms.linear import LULinear
        >>> from pyro_nf.transforms.stochastic import StochasticChain
        >>> check_stochastic(StochasticChain([LULinear(3)]))
    """
    check_kind("check_stochastic", "transform", transform, StochasticTransform)
    transform = randomize(copy.deepcopy(transform)).double()
    for law in STOCHASTIC_LAWS:
        law(transform)


def check_log_prob(
    flow: Flow,
    truth: Callable[[Tensor], Tensor],
    y: Tensor,
    context: Tensor | None = None,
    *,
    num_samples: int = 4_000,
) -> None:
    r"""Holds the log density of a flow against the true one: it must be what it says it is.

    - exact: :math:`\log q(y) = \log p(y)`, of draws too;
    - estimate: :math:`E \log q(y) = \log p(y)`;
    - bound: :math:`E \log q(y) \le \log p(y)` and :math:`E q(y) = p(y)`; and with the weight w of
      the path of a draw :math:`E \log w \ge E \log p(y)` and :math:`E [p(y) / w] = 1`.

    Args:
        flow: The flow; it is used as it is.
        truth: The true log density, ``(..., D) -> (...)``, by enumeration or quadrature.
        y: Points to compare at, ``(N, D)``.
        context: The context of all of them, ``(context_dim,)``.
        num_samples: Draws behind a mean. It may be off by five standard errors.

    Raises:
        AssertionError: If the log density is not what ``flow.log_prob_kind`` says.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.recipes import realnvp
        >>> normal = torch.distributions.Normal(0.0, 1.0)
        >>> check_log_prob(realnvp(2), lambda y: normal.log_prob(y).sum(-1), torch.randn(5, 2))
    """
    check_kind("check_log_prob", "flow", flow, Flow)
    check_callable("check_log_prob", "truth", truth, "a function of points", count=1)
    check_event_rows("check_log_prob", "y", y, flow.event_shape)
    check_context("check_log_prob", context, flow.context_dim)
    check_count("check_log_prob", "num_samples", num_samples, at_least=2)
    d = flow() if context is None else flow(context)
    with torch.no_grad(), _seeded(0):
        tolerance = LADJ if y.dtype == torch.float64 else SINGLE
        wanted = truth(y)
        drawn, path = d.rsample_and_log_prob((num_samples,))
        true = truth(drawn)
        if d.log_prob_kind == "exact":
            _close("log_prob", d.log_prob(y), wanted, tolerance)
            _close("log_prob of draws", path, true, tolerance)
            return
        each = d.log_prob(y.expand(num_samples, *y.shape).clone())
        if d.log_prob_kind == "estimate":
            _mean_is("mean log_prob", each, wanted, tolerance)
            _mean_is("mean log_prob of draws less the truth", path - true, None, tolerance)
            return
        _mean_is("mean density over the true one", (each - wanted).exp() - 1, None, tolerance)
        _mean_is("mean log_prob, a lower bound,", each, wanted, tolerance, below=True)
        _mean_is("mean true density over the paths'", (true - path).exp() - 1, None, tolerance)
        _mean_is("mean true log density of draws", true - path, None, tolerance, below=True)


def _mean_is(
    what: str, each: Tensor, wanted: Tensor | None, tolerance: float, *, below: bool = False
) -> None:
    """The mean over the first dimension is what is wanted, 0 by default, within its error."""
    error = each.mean(0) - (0.0 if wanted is None else wanted)
    allowed = 5 * each.std(0) / len(each) ** 0.5 + tolerance
    assert bool(each.isfinite().all()), f"{what}: not finite"
    off = error if below else error.abs()
    assert bool((off <= allowed).all()), (
        f"{what}: off by {error.tolist()}, with five standard errors of {allowed.tolist()}"
    )


# Guides.


def check_guide(
    make_guide: Callable[[], G],
    model: Callable[..., object],
    args: tuple[object, ...] = (),
    *,
    draws: int = 4,
) -> G:
    """Runs the laws of a guide: one set-up makes all parameters, and copies and densities agree.

    Args:
        make_guide: Makes a fresh :class:`~pyro_nf.guides.guide.AutoFlow` for the model.
        model: The model.
        args: The model's arguments.
        draws: How many draws to compare densities of.

    Returns:
        A guide that was set up, with random weights, after one step of SVI.

    Raises:
        AssertionError: If a law is broken.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_nf import AutoFlow
        >>> def model():
        ...     pyro.sample("x", dist.Gamma(2.0, 3.0))
        >>> guide = check_guide(lambda: AutoFlow(model), model)
    """
    import pyro
    from pyro import poutine
    from pyro.infer import SVI, Trace_ELBO
    from pyro.optim.optim import PyroOptim

    check_callable("check_guide", "make_guide", make_guide, "a function of nothing", count=0)
    check_arguments("check_guide", model, args, None)
    check_count("check_guide", "draws", draws)
    store = pyro.get_param_store()
    store.clear()
    guide = make_guide()
    guide.setup(*args)
    assert guide.prototype_trace is not None, "setup made no parameter"
    randomize(guide, 0.1)
    names = [name for name, _ in guide.named_parameters()]
    assert names, "setup made no parameter"

    medians = guide.median()
    for _ in range(draws):
        trace = poutine.trace(guide).get_trace(*args)
        values = {name: trace.nodes[name]["value"].detach() for name in medians}
        for name, value in values.items():
            support = guide.prototype_trace.nodes[name]["fn"].support
            assert bool(support.check(value).all()), f"{name}: a draw outside of the support"
            assert value.isfinite().all(), f"{name}: a draw that is not finite"
        wanted = trace.log_prob_sum().detach()
        with torch.no_grad(), _seeded(0):
            got = guide.log_prob(values)
        # a bound or an estimate is another number at each call
        is_exact = getattr(guide.get_posterior(), "log_prob_kind", "exact") == "exact"
        if is_exact:
            _close("log_prob of a draw against its trace", got, wanted, 1e-2)

    wide = {name: value.expand(3, *value.shape) for name, value in values.items()}
    with torch.no_grad():
        batch = guide.log_prob(wide)
    assert batch.shape == (3,), f"log_prob of a batch has shape {tuple(batch.shape)}, wanted (3,)"
    if is_exact:
        _close("log_prob of a batch", batch, got.expand(3), 1e-4)
    for name, value in medians.items():
        assert value.shape == values[name].shape, f"median of {name}: shape {tuple(value.shape)}"
        assert value.dtype == values[name].dtype, f"median of {name}: dtype {value.dtype}"
    low, high = (guide.quantiles([q]) for q in (0.1, 0.9))
    assert all(bool((low[name] <= high[name]).all()) for name in values), "quantiles not in order"

    saved = {name: value.clone() for name, value in store.items()}
    copied = {"deepcopy": copy.deepcopy(guide), "pickle": pickle.loads(pickle.dumps(guide))}
    store.clear()
    copied["state_dict"] = make_guide()
    copied["state_dict"].setup(*args)
    copied["state_dict"].load_state_dict(guide.state_dict())
    store.clear()
    for name, value in saved.items():
        store[name] = value.clone()
    copied["param store"] = make_guide()
    copied["param store"].setup(*args)
    with torch.no_grad():
        for way, other in copied.items():
            with _seeded(0):
                _close(f"{way}: log_prob", other.log_prob(values), got, 0.0)

    before = [p.detach().clone() for p in guide.parameters()]
    svi = SVI(model, guide, PyroOptim(torch.optim.Adam, {"lr": 1e-2}), Trace_ELBO())
    for _ in range(2):
        loss = svi.step(*args)
        assert loss == loss and abs(loss) < float("inf"), f"the loss is {loss}"
    assert [name for name, _ in guide.named_parameters()] == names, "a step makes new parameters"
    moved = [not torch.equal(p, old) for p, old in zip(guide.parameters(), before, strict=True)]
    assert any(moved), "a step of SVI changes nothing"
    return guide
