"""The laws of layers that draw random numbers or lose information."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, cast

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_nf._checks import check_kind
from pyro_nf.ops.spaces import ends
from pyro_nf.testing.cases import (
    ANY_DIM,
    BATCH_SHAPES,
    EXACT,
    LADJ,
    close,
    points,
    raises,
    randomize,
    seeded,
)
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.stochastic import StochasticLayer, StochasticTransform
from pyro_nf.transforms.stochastic_chain import StochasticChain


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
        with seeded(0):
            y, ladj = transform.forward_and_ladj(x, context)
        total, path = torch.zeros_like(ladj), x
        with seeded(0):
            for part in cast(Any, transform.parts):
                path, each = part.forward_and_ladj(path, context if part.context_dim else None)
                total = total + each
        close("value of a chain against its parts", y, path, EXACT)
        close("contribution of a chain against its parts", ladj, total, EXACT)
        for part in transform.parts:
            if isinstance(part, StochasticTransform):
                contributions_agree(part)
    elif isinstance(transform, StochasticLayer):
        y, ladj = transform.forward_and_ladj(x, context)
        close("contribution forward", ladj, transform.contribution(x, y, context), LADJ)
        back, inverse_ladj = transform.inverse_and_ladj(y, context)
        given = transform.contribution(back, y, context)
        close("contribution of the inverse", inverse_ladj, -given, LADJ)


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
        close("the inverse undoes forward", back, x, EXACT)
        if not is_estimate:
            close("contribution of the way back", inverse_ladj, -ladj, LADJ)
    if transform.random in ("inverse", "neither"):
        x, inverse_ladj = transform.inverse_and_ladj(y, context)
        again, ladj = transform.forward_and_ladj(x, context)
        close("forward undoes the inverse", again, y, EXACT)
        if not is_estimate:
            close("contribution of the way there", ladj, -inverse_ladj, LADJ)
    ways = {"forward": (transform.forward_and_ladj, x), "inverse": (transform.inverse_and_ladj, y)}
    for way, (call, value) in ways.items():
        many = value[:1].expand(100, *value.shape[1:])
        given = None if context is None else context[:1]
        drawn = []
        for seed in (0, 0, 1):
            with seeded(seed):
                drawn.append(call(many, given))
        for got, wanted in zip(drawn[0], drawn[1], strict=True):
            close(f"{way} with the same seed", got, wanted, 0.0)
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
    with seeded(0):
        y, ladj = transform.forward_and_ladj(x, context)
    assert ladj.shape == (5, 2), f"contribution of shape {tuple(ladj.shape)}, wanted (5, 2)"
    with seeded(0):
        conditioned, _ = transform.condition(cast(Tensor, context)).forward_and_ladj(x)
    close(".condition(context)", conditioned, y, EXACT)
    alike = cast(Tensor, context)[:1].expand(2, -1)
    with seeded(0):
        assert not torch.equal(transform.forward_and_ladj(x, alike)[0], y), "context: no effect"


def stochastic_inverse_and_copies(transform: StochasticTransform) -> None:
    """``.inv`` exchanges the laws, and copies have the same; the parameters are the same too."""
    x, context = _given(transform, 6)
    inverse = transform.inv
    assert {id(p) for p in transform.parameters()} == {id(p) for p in inverse.parameters()}
    assert inverse.event_shape == transform.output_shape, ".inv has another event_shape"
    with seeded(0):
        y, ladj = transform.forward_and_ladj(x, context)
    others = {
        ".inv": inverse.inverse_and_ladj,
        ".inv.inv": inverse.inv.forward_and_ladj,
        "deepcopy": copy.deepcopy(transform).forward_and_ladj,
        "pickle": pickle.loads(pickle.dumps(transform)).forward_and_ladj,
    }
    for name, call in others.items():
        with seeded(0):
            got, got_ladj = call(x, context)
        close(name, got, y, 0.0)
        close(f"contribution of {name}", got_ladj, ladj, 0.0)


def stochastic_parameters_learn(transform: StochasticTransform) -> None:
    """A gradient reaches every parameter, through one direction or the other."""
    named = dict(transform.named_parameters())
    if not named:
        return
    x, context = _given(transform, 32)
    with seeded(0):
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
        raises(TypeError, "Reparameterised", transform.push_score, x, -x, context)
        return
    if transform.codomain.is_discrete:
        return
    with seeded(0):
        y, ladj, score = transform.push_score(x, -x, context)
    with seeded(0):
        wanted = transform.forward_and_ladj(x, context)
        leaf = y.detach().requires_grad_()
        back, inverse_ladj = transform.inverse_and_ladj(leaf, context)
    (slope,) = torch.autograd.grad(inverse_ladj.sum() - 0.5 * back.square().sum(), leaf)
    close("y of push_score", y, wanted[0], EXACT)
    close("contribution of push_score", ladj, wanted[1], EXACT)
    assert not score.requires_grad, "push_score left a graph of the score"
    if transform.ladj_kind == "exact":
        close("score of push_score", score, slope, 1e-7)


def stochastic_input_is_named(transform: StochasticTransform) -> None:
    """Wrong shapes, contexts and dtypes raise the right error, with the sizes in the message."""
    x, context = _given(transform, 3)
    with seeded(0):
        y = transform.forward_and_ladj(x, context)[0].detach()
    for call, value, shape in (
        (transform.forward_and_ladj, x, transform.event_shape),
        (transform.inverse_and_ladj, y, transform.output_shape),
    ):
        if shape is not None:
            wide = torch.cat((value, value[..., :1]), -1)
            raises(ValueError, str(tuple(wide.shape)), call, wide, context)
        raises(TypeError, "list", call, value.tolist(), context)
        raises(TypeError, "complex64", call, value.to(torch.complex64), context)
        if context is None:
            raises(ValueError, "takes none", call, value, x.new_zeros(3, 2))
        else:
            raises(ValueError, "context is missing", call, value, None)
            raises(ValueError, "context_dim = ", call, value, torch.cat((context, context), -1))


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
        >>> from pyro_nf.transforms.stochastic_chain import StochasticChain
        >>> check_stochastic(StochasticChain([LULinear(3)]))
    """
    check_kind("check_stochastic", "transform", transform, StochasticTransform)
    transform = randomize(copy.deepcopy(transform)).double()
    for law in STOCHASTIC_LAWS:
        law(transform)
