"""The laws of transforms."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import torch
from pyro.distributions import constraints

from pyro_nf._checks import check_kind
from pyro_nf.testing.cases import (
    BATCH_SHAPES,
    EXACT,
    LADJ,
    NUMERIC,
    SINGLE,
    close,
    close_ladj,
    context_of,
    gradients_of,
    points,
    points_of,
    raises,
    randomize,
)
from pyro_nf.testing.estimates import ladj_is_unbiased, scores_are_unbiased
from pyro_nf.testing.programs import compiles, vmaps
from pyro_nf.transforms.base import FlowTransform


def round_trip(transform: FlowTransform) -> None:
    """T^-1(T(x)) = x, with nothing cached, in float64 and in float32."""
    for dtype, exact in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        t = copy.deepcopy(transform).to(dtype)
        x, context = points_of(t, 20, dtype=dtype), context_of(t, 20, dtype=dtype)
        y, ladj = t.forward_and_ladj(x, context)
        back, inverse_ladj = t.inverse_and_ladj(y.clone(), context)
        numeric = dtype == torch.float64 and t.inverse_kind == "numeric"
        tolerance = NUMERIC if numeric else exact
        close(f"round trip in {dtype}", back, x, tolerance)
        close_ladj(t, f"ladj of the inverse in {dtype}", inverse_ladj, -ladj, 10 * tolerance)


def shapes_are_told(transform: FlowTransform) -> None:
    """``forward_shape`` and ``inverse_shape`` say what comes out, as do the spaces."""
    x, context = points_of(transform, 2, 3), context_of(transform, 3)
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
        ladj_is_unbiased(transform)
        return
    x, context = points_of(transform, 5), context_of(transform, 5)
    y, ladj = transform.forward_and_ladj(x, context)
    count = x[0].numel()
    for i in range(len(x)):
        c = None if context is None else context[i]
        jacobian = torch.autograd.functional.jacobian(
            lambda v, c=c: transform.forward_and_ladj(v, c)[0], x[i]
        ).reshape(count, count)
        close("ladj against slogdet", ladj[i], jacobian.slogdet().logabsdet, LADJ)
    t = transform.condition(context) if context is not None else transform
    close("log_abs_det_jacobian", t.log_abs_det_jacobian(x, y), ladj, LADJ)


def inverse_is_a_module(transform: FlowTransform) -> None:
    """``.inv`` has the same parameters, exchanges the directions, and inverts back to itself."""
    inverse = transform.inv
    mine = {id(p) for p in transform.parameters()}
    assert mine == {id(p) for p in inverse.parameters()}, ".inv has other parameters"
    x, context = points_of(transform, 4), context_of(transform, 4)
    y, ladj = transform.forward_and_ladj(x, context)
    back, inverse_ladj = inverse.forward_and_ladj(y, context)
    close(".inv forward", back, x, NUMERIC)
    close_ladj(transform, ".inv ladj", inverse_ladj, -ladj, LADJ)
    close(".inv.inv", inverse.inv.forward_and_ladj(x, context)[0], y, EXACT)


def batch_shapes(transform: FlowTransform) -> None:
    """Any batch shape will do, and each element is mapped by itself."""
    for shape in BATCH_SHAPES:
        x, context = points_of(transform, *shape), context_of(transform, *shape)
        y, ladj = transform.forward_and_ladj(x, context)
        assert ladj.shape == shape, f"ladj has shape {tuple(ladj.shape)}, wanted {shape}"
        back, inverse_ladj = transform.inverse_and_ladj(y, context)
        close(f"batch shape {shape}", back, x, NUMERIC)
        assert inverse_ladj.shape == shape
        for i in range(shape[0] if shape else 0):
            one = transform.forward_and_ladj(x[i], None if context is None else context[i])
            close(f"element {i} of batch shape {shape}", y[i], one[0], EXACT)
            close_ladj(transform, f"ladj {i} of batch shape {shape}", ladj[i], one[1], EXACT)


def context_broadcasts(transform: FlowTransform) -> None:
    """A batch of contexts broadcasts against any batch of points, and each point sees its own."""
    if not transform.context_dim:
        return
    x, context = points_of(transform, 5, 1), context_of(transform, 2)
    assert context is not None
    y, ladj = transform.forward_and_ladj(x, context)
    assert ladj.shape == (5, 2), f"ladj has shape {tuple(ladj.shape)}, wanted (5, 2)"
    for b in range(2):
        one, one_ladj = transform.forward_and_ladj(x[:, 0], context[b])
        close(f"context {b}", y[:, b], one, EXACT)
        close_ladj(transform, f"ladj of context {b}", ladj[:, b], one_ladj, EXACT)
    assert not torch.equal(y[:, 0], y[:, 1]), "the context makes no difference"
    conditioned = transform.condition(context)
    close(".condition(context)", conditioned(x), y, EXACT)
    close(".condition(context).inv", conditioned.inv(y), x.expand(5, 2, *x.shape[2:]), NUMERIC)


def keeps_dtype(transform: FlowTransform) -> None:
    """dtype follows the data after ``.to(dtype)``."""
    for dtype in (torch.float32, torch.float64):
        t = copy.deepcopy(transform).to(dtype)
        x, context = points_of(t, 3, dtype=dtype), context_of(t, 3, dtype=dtype)
        y, ladj = t.forward_and_ladj(x, context)
        back, inverse_ladj = t.inverse_and_ladj(y, context)
        got = [y.dtype, ladj.dtype, back.dtype, inverse_ladj.dtype]
        assert got == [dtype] * 4, f"dtypes {got}, wanted {dtype}"


def every_parameter_learns(transform: FlowTransform) -> None:
    """A gradient reaches every parameter, through either direction."""
    x, context = points_of(transform, 16), context_of(transform, 16)
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
    x, context = points_of(transform, 6).requires_grad_(), context_of(transform, 6)
    y, ladj = transform.forward_and_ladj(x, context)
    back, inverse_ladj = transform.inverse_and_ladj(y, context)
    r = points(constraints.real, tuple(x.shape), seed=4)
    s = points(constraints.real, tuple(ladj.shape), seed=5)
    s = s * (transform.ladj_kind == "exact")  # two estimates do not cancel
    loss = (back * r).sum() + ((ladj + inverse_ladj) * s).sum()
    parameters = list(transform.parameters())
    grad_x, *grads = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)
    close("gradient in x of a round trip", grad_x, r, 1e-6)
    for grad in grads:
        if grad is not None:
            close("gradient in a parameter of a round trip", grad, torch.zeros_like(grad), 1e-6)


def scores_are_pushed(transform: FlowTransform) -> None:
    """J^T times the score of y, plus the gradient of the ladj, is the score of x.

    What comes with the score is what the forward direction gives, and has the same gradient. With
    an estimate the score is right on average.
    """
    if transform.ladj_kind == "estimate":
        scores_are_unbiased(transform)
        return
    x, context = points_of(transform, 2, 3).requires_grad_(), context_of(transform, 3)
    y, ladj = transform.forward_and_ladj(x, context)
    score_x = points(constraints.real, tuple(x.shape), seed=4)
    pushed, pushed_ladj, score_y = transform.push_score(x, score_x, context)
    assert not score_y.requires_grad, "push_score left a graph of the score"
    close("y of push_score", pushed, y, EXACT)
    close("ladj of push_score", pushed_ladj, ladj, EXACT)
    total = (y * score_y).sum() + ladj.sum()
    wanted, *grads = gradients_of(transform, total, x)
    close("score brought back", wanted, score_x, 1e-6)
    for got, want in zip(
        gradients_of(transform, (pushed * score_y).sum() + pushed_ladj.sum(), x),
        (wanted, *grads),
        strict=True,
    ):
        close("gradient by push_score", got, want, EXACT)
    with torch.no_grad():
        again = transform.push_score(x, score_x, context)
    assert not any(t.requires_grad for t in again), "push_score made a graph under no_grad"
    close("score under no_grad", again[2], score_y, EXACT)


def nothing_is_stale(transform: FlowTransform) -> None:
    """The same tensor gives the new value after any change of a parameter, even through .data."""
    t = copy.deepcopy(transform)
    parameters = [p for p in t.parameters() if p.numel()]
    if not parameters:
        return
    x, context = points_of(t, 8), context_of(t, 8)
    y, _ = t.forward_and_ladj(x, context)
    t.inverse_and_ladj(y, context)
    for p in parameters:
        p.data.add_(0.1)
    fresh = copy.deepcopy(t)
    close("forward", t.forward_and_ladj(x, context)[0], fresh.forward_and_ladj(x, context)[0], 0.0)
    close("inverse", t.inverse_and_ladj(y, context)[0], fresh.inverse_and_ladj(y, context)[0], 0.0)
    assert not torch.equal(t.forward_and_ladj(x, context)[0], y), "a change changes nothing"


def copies_agree(transform: FlowTransform) -> None:
    """deepcopy, pickle and state_dict give the same map, before and after a call."""
    x, context = points_of(transform, 4), context_of(transform, 4)
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
            close(name, other.forward_and_ladj(x, context)[0], y, 0.0)


def bad_input_is_named(transform: FlowTransform) -> None:
    """Wrong shapes, contexts and dtypes raise the right error, with the sizes in the message."""
    x, context = points_of(transform, 3), context_of(transform, 3)
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
            raises(ValueError, part, call, wide, context)
        raises(TypeError, "int64", call, value.long(), context)
        raises(TypeError, "list", call, value.tolist(), context)
        if context is None:
            raises(ValueError, "takes none", call, value, value.new_zeros(3, 2))
        else:
            raises(ValueError, "context is missing", call, value, None)
            raises(ValueError, "context_dim = ", call, value, torch.cat((context, context), -1))
            two = context.new_zeros(2, context.shape[-1])
            raises(ValueError, "does not broadcast", call, value, two)
    if transform.domain.event_dim:
        raises(ValueError, "dimension", transform.forward_and_ladj, x.sum(), context)


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
