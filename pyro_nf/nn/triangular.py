r"""Solving with a masked network as one solves with a triangular matrix.

The slow direction of an autoregressive map asks for the ``z`` with

.. math:: z = g(v; \theta), \qquad \theta = \operatorname{net}(z),

where ``g`` acts on each coordinate alone and :math:`\theta_i` depends on :math:`z_{<i}` only. Plain
substitution runs the network ``D`` times. But the units of a
:class:`~pyro_nf.nn.masked.MaskedNet` are sorted, so that they form a ring of links

.. math::
    z \xrightarrow{W_1} s_1 \xrightarrow{\sigma, W_2} s_2 \to \dots \to s_L
    \xrightarrow{\sigma, W_{L+1}} \theta \xrightarrow{g} z

in which every weight is block lower triangular, with one row of blocks, a *group*, for each
coordinate. Once :math:`z_{<i}` is known, the units of degree ``i``, then :math:`\theta_i`, then
:math:`z_i` can be computed: each once. :func:`substitute` does so by halves, on all links at once:

.. code-block:: text

         | A    |     1. substitute in the first half of the groups (A),
    W  = |      |     2. push what came out onto the sums of the second half (B), one GEMM a link,
         | B  C |     3. substitute in the second half (C).

In all, what is multiplied lies on and below the diagonal: half of one dense pass.

The gradient needs no loop to be remembered. With :math:`N = \partial\operatorname{net}/\partial z`
and :math:`G = \partial g/\partial\theta`, the implicit function theorem says of
:math:`\theta = \operatorname{net}(g(v; \theta))`: where a gradient :math:`\tau` of :math:`\theta`
arrives, the network must be given :math:`\bar\theta` and ``v`` in addition :math:`\bar v`,

.. math::
    \bar\theta = \tau + G^\top \mu, \qquad \mu = N^\top \bar\theta, \qquad
    \bar v = (\partial g/\partial v)^\top \mu.

:math:`N^\top` is a chain of transposed weights and slopes of activations, so this is such a ring
again, and read backwards it is block lower triangular: :func:`substitute` solves it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyro_nf.nn.masked import Groups, MaskedLinear, MaskedNet, propagate
from pyro_nf.ops.layout import features_first

# Halving ends at leaves of about LEAF_UNITS hidden units, but no fewer than FEWEST_GROUPS and no
# more than MOST_GROUPS groups: there it costs more in calls than it saves in products.
LEAF_UNITS, FEWEST_GROUPS, MOST_GROUPS = 32, 4, 16

# For a few rows a whole pass costs little more than one group of the substitution: as much as
# 1 + weights / WEIGHTS_PER_GROUP groups. So for up to FEW_ROWS rows passes are tried first, for at
# most half of the time that the substitution would take.
FEW_ROWS = 4
WEIGHTS_PER_GROUP = 60_000

#: One direction of a univariate map: of values ``(..., D)`` and parameters ``(..., D, P)`` it makes
#: images and ladjs, both ``(..., D)``.
Map = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.compiler.disable  # a compiler would unroll all groups
def solve(net: MaskedNet, g: Map, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""Finds ``z`` with :math:`z = g(v; \operatorname{net}(z, c))` for the price of about one pass.

    Exact up to rounding. Differentiable once, in all that goes in; works under
    :func:`torch.func.vmap` unless the weights are mapped over.

    Args:
        net: The network of :math:`\theta`.
        g: One direction of a univariate map. It is called in inference mode first.
        v: Shape ``(..., D)``.
        context: Shape ``(..., C)``, whose batch broadcasts to that of ``v``; None if there is none.

    Returns:
        ``z`` of shape ``(..., D)`` and the sum of the ladjs of ``g``, shape ``(...)``.

    Raises:
        NotImplementedError: If :func:`torch.func.vmap` maps over the weights.

    Example:
        >>> import torch
        >>> from pyro_nf.univariate.affine import Affine
        >>> net, v = MaskedNet(5, 2), torch.randn(100, 5)
        >>> z, _ = solve(net, Affine().forward_and_ladj, v, None)
        >>> torch.allclose(z, Affine().forward_and_ladj(v, net(z))[0], atol=1e-5)
        True
    """
    layers = cast(Sequence[MaskedLinear], net.layers)
    plan = _Plan(g, net.activation, net.skips, [layer.mask for layer in layers], net.groups)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    offset, columns = net.offset(v.shape[:-1], context), features_first(v)
    with torch.no_grad():
        start = offset.expand(-1, columns.shape[-1])
        # apply serves vmap alone, and costs as much as one coordinate does
        run = _Solve.apply if torch._C._are_functorch_transforms_active() else _Solve.forward
        z, ladj = run(plan, columns, start, *weights, *biases[1:])
        z, ladj = z.T.reshape(v.shape), ladj.reshape(v.shape[:-1])
    if not (
        torch.is_grad_enabled() and any(t.requires_grad for t in (v, offset, *weights, *biases))
    ):
        return z, ladj
    theta = _with_implicit_gradient(plan, columns, net.sums(z, context), weights)
    z, ladj = g(v, theta.T.reshape(*v.shape, net.num_params))
    return z, ladj.sum(-1)


@torch.compiler.disable
def push_score(
    net: MaskedNet, u: Map, x: Tensor, score: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    r"""Carries points and their scores through :math:`y = u(x; \operatorname{net}(x, c))`.

    .. math:: \nabla_y \log q(y) = J^{-\top} (\nabla_x \log p(x) - \nabla_x \log|\det J|)

    With :math:`a = \partial u/\partial x` and :math:`U = \partial u/\partial\theta`, :math:`J = a
    + U N` is triangular. The score :math:`r` of ``y`` is what the network gives back,

    .. math::
        \mu = N^\top \bar\theta, \qquad
        \bar\theta = U^\top r + \partial\ell/\partial\theta, \qquad
        a r = \nabla_x \log p(x) - \partial\ell/\partial x - \mu,

    where :math:`\ell` is the ladj of ``u``: the same ring as for the gradient of :func:`solve`.

    Args:
        net: The network of :math:`\theta`.
        u: One direction of a univariate map.
        x: Shape ``(..., D)``.
        score: :math:`\nabla_x \log p(x)`, of that shape.
        context: Shape ``(..., C)``, whose batch broadcasts to that of ``x``; None if there is none.

    Returns:
        ``y`` and its score, each of shape ``(..., D)``, without a graph.
    """
    layers = cast(Sequence[MaskedLinear], net.layers)
    plan = _Plan(u, net.activation, net.skips, [layer.mask for layer in layers], net.groups)
    with torch.no_grad():
        inputs = [features_first(x), *net.sums(x, context)]
    with torch.enable_grad():
        columns, *hidden, theta = (t.detach().requires_grad_() for t in inputs)
        y, ladj = u(columns.T, theta.T.unflatten(-1, (len(columns), -1)))
        units = sum((net.activation(s.clone()).sum() for s in hidden), y.sum())
        a, U, *slopes = torch.autograd.grad(units, [columns, theta, *hidden], retain_graph=True)
        # a volume-preserving map has a constant ladj
        parts = torch.autograd.grad(ladj.sum(), [columns, theta], materialize_grads=True)
    with torch.inference_mode():
        rest = features_first(score) - parts[0]

        def of_theta(value: Tensor) -> Tensor:
            return (U.unflatten(0, (len(a), -1)) * (value / a).unsqueeze(1)).flatten(0, 1)

        tau = of_theta(rest) + parts[1]
        weights = [layer.weight for layer in layers]
        slopes = [*slopes, -of_theta(torch.ones_like(a))]
        mu, _ = _by_transposed_substitution(plan, tau, slopes, weights)
        r = (rest - mu) / a
    return y.detach().reshape(x.shape), r.clone().T.reshape(x.shape)


class Link(NamedTuple):
    """One link of a ring: its sums collect ``weight`` times the values of the link before.

    As everywhere below, features come first, ``(features, N)``: a group is one piece of memory.

    Attributes:
        weight: Block lower triangular where ``mask`` is 1; the rest is not looked at.
        mask: 1 where the weight counts.
        sums: Starts as the bias, collects products.
        values: What ``point`` makes of the sums. May be the same tensor.
        sum_groups: The groups of the sums.
        value_groups: The groups of the values.
        point: ``(i, finished sums of group i) -> values of group i``.
    """

    weight: Tensor
    mask: Tensor
    sums: Tensor
    values: Tensor
    sum_groups: Groups
    value_groups: Groups
    point: Callable[[int, Tensor], Tensor]


def substitute(ring: Sequence[Link], leaf: int, first: int, last: int) -> None:
    """Computes the values of the groups from ``first`` to before ``last``.

    Args:
        ring: The links in the order in which a group is computed. The first link takes the values
            of the last one, and of earlier groups only.
        leaf: How many groups are not halved any further.
        first: The first group. All products with the groups before it are in the sums already.
        last: One past the last group.
    """
    if last - first <= leaf:
        return _substitute_group_by_group(ring, first, last)
    middle = (first + last) // 2
    substitute(ring, leaf, first, middle)
    for before, link in zip((ring[-1], *ring), ring, strict=False):
        rows = link.sum_groups.span(middle, last)
        columns = before.value_groups.span(first, middle)
        link.sums[rows].addmm_(link.weight[rows, columns], before.values[columns])
    substitute(ring, leaf, middle, last)


def _substitute_group_by_group(ring: Sequence[Link], first: int, last: int) -> None:
    steps: list[list[tuple[Any, ...]]] = [[] for _ in range(first, last)]
    for before, link in zip((ring[-1], *ring), ring, strict=False):
        rows = link.sum_groups.span(first, last)
        columns = before.value_groups.span(first, last)
        sizes = link.sum_groups.sizes[first:last]
        # Weights to be masked are near the diagonal only. A group multiplies all columns of the
        # leaf: those that are not computed yet have weight 0.
        known = before.values[columns]
        weights = (link.weight[rows, columns] * link.mask[rows, columns]).split_with_sizes(sizes)
        sums = link.sums[rows].split_with_sizes(sizes)
        values = sums
        if link.values is not link.sums:
            leaf = link.values[link.value_groups.span(first, last)]
            values = leaf.split_with_sizes(link.value_groups.sizes[first:last])
        for step, size, *group in zip(steps, sizes, weights, sums, values, strict=True):
            if size:  # narrow layers have no unit of some degrees
                step.append((link.point, known, *group))
    for i, step in enumerate(steps, start=first):
        for point, known, weight, sums_i, values_i in step:
            image = point(i, sums_i.addmm_(weight, known))
            if image is not values_i:
                values_i.copy_(image)


class _Plan(NamedTuple):
    """What a solve must know besides tensors that have a gradient or a batch."""

    g: Map
    activation: nn.Module
    skips: list[bool]
    masks: list[Tensor]
    groups: list[Groups]

    @property
    def leaf(self) -> int:
        """How many groups make a leaf of the substitution."""
        widest = max((groups.ends[-1] for groups in self.groups[1:-1]), default=1)
        count = LEAF_UNITS * len(self.groups[0].sizes) // widest
        return min(max(count, FEWEST_GROUPS), MOST_GROUPS)


class _Solve(torch.autograd.Function):
    """``z`` and the ladj, of ``v`` and of the first sums as they are before any ``z`` is known."""

    @staticmethod
    def forward(
        plan: _Plan, v: Tensor, start: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        count = len(plan.masks)
        weights, biases = parameters[:count], parameters[count:]
        few = v.shape[-1] <= FEW_ROWS
        # Made out here they stay ordinary tensors.
        z, ladj = v.clone(memory_format=torch.contiguous_format), v.new_zeros(v.shape[-1])
        with torch.inference_mode():  # makes all the small calls some 10 % cheaper
            if not (few and _by_passes(plan, z, ladj, start, weights, biases)):
                _by_substitution(plan, z, ladj, start, weights, biases)
        return z, ladj

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], plan: _Plan, *tensors: Tensor) -> Any:
        return _fold_vmap(_Solve, info.batch_size, in_dims, plan, tensors, 2 * len(plan.masks) - 1)


def _by_passes(
    plan: _Plan,
    v: Tensor,
    ladj: Tensor,
    start: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> bool:
    """Iterates ``z <- g(v; net(z))`` until no bit changes: then ``z`` solves. False if not in time.

    Each pass settles at least one more coordinate, and mostly many more. Overwrites as
    :func:`_by_substitution` does.
    """
    groups_per_pass = 1 + sum(w.numel() for w in weights) / WEIGHTS_PER_GROUP
    first, *rest = (weight * mask for weight, mask in zip(weights, plan.masks, strict=True))
    layers = [partial(torch.addmm, b, weight) for b, weight in zip(biases, rest, strict=True)]
    z = v
    for _ in range(int(len(v) / groups_per_pass / 2)):
        *_, theta = propagate(torch.addmm(start, first, z), layers, plan.skips, plan.activation)
        image, ladjs = plan.g(v.T, theta.T.unflatten(-1, (len(v), -1)))
        if torch.equal(image.T, z):
            v.copy_(z)
            torch.sum(ladjs, -1, out=ladj)
            return True
        z = image.T
    return False


def _by_substitution(
    plan: _Plan,
    z: Tensor,
    ladj: Tensor,
    start: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> None:
    r"""The ring :math:`z \to s_1 \to \dots \to s_L \to \theta \to z`.

    Fresh memory is dear, so values take the place of what they are computed from: ``z`` is given as
    ``v``, and ladjs are added to ``ladj``.
    """
    z_groups, *groups = plan.groups
    v_of = z.unbind()
    starts = (start, *(bias.expand(-1, z.shape[-1]) for bias in biases))
    sums = [start.clone(memory_format=torch.contiguous_format) for start in starts]
    values = sums[:-1]
    if any(plan.skips):  # which need the sums when the values are there
        values = [torch.zeros_like(s) for s in values]
    overwriting = type(plan.activation) is nn.ReLU and plan.activation.inplace
    activate = torch.relu_ if overwriting else plan.activation.forward
    s = z  # the sums of the layer before

    def unit(skip: bool) -> Callable[[int, Tensor], Tensor]:
        def point(i: int, sums: Tensor) -> Tensor:
            nonlocal s
            s = sums.add_(s) if skip else sums
            return activate(s)

        return point

    def output(i: int, theta: Tensor) -> Tensor:
        z_i, ladj_i = plan.g(v_of[i], theta.T)
        ladj.add_(ladj_i)
        return z_i

    skips = (False, *plan.skips)
    ring = [
        Link(weights[k], plan.masks[k], sums[k], values[k], groups[k], groups[k], unit(skips[k]))
        for k in range(len(values))
    ]
    ring.append(Link(weights[-1], plan.masks[-1], sums[-1], z, groups[-1], z_groups, output))
    substitute(ring, plan.leaf, 0, len(z))


def _with_implicit_gradient(
    plan: _Plan, v: Tensor, sums: Sequence[Tensor], weights: Sequence[Tensor]
) -> Tensor:
    r"""Returns :math:`\theta`, the last of the sums at the solution, with its whole gradient."""

    def pointwise(v: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        *hidden, theta = sums
        z, _ = plan.g(v.T, theta.T.unflatten(-1, (len(v), -1)))
        return *(plan.activation(s.clone()) for s in hidden), z.T

    # The type of vjp cannot say that without an auxiliary output it returns a pair.
    images, pull = torch.func.vjp(pointwise, *(t.detach() for t in (v, *sums)))  # type: ignore[misc]
    slopes = pull(tuple(torch.ones_like(image) for image in images))
    return _ImplicitGradient.apply(plan, v, sums[-1], *slopes, *(w.detach() for w in weights))


class _ImplicitGradient(torch.autograd.Function):
    r"""The identity of :math:`\theta`; its backward gives :math:`\bar v` and :math:`\bar\theta`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(plan: _Plan, v: Tensor, theta: Tensor, *slopes_and_weights: Tensor) -> Tensor:
        return theta.view_as(theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.plan, _, _, *slopes_and_weights = inputs
        ctx.save_for_backward(*slopes_and_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tau: Tensor) -> tuple[Tensor | None, ...]:
        grad_v, grad_theta = _SolveTransposed.apply(ctx.plan, tau, *ctx.saved_tensors)
        return None, grad_v, grad_theta, *(None for _ in ctx.saved_tensors)


class _SolveTransposed(torch.autograd.Function):
    r""":math:`\bar v` and :math:`\bar\theta`, of :math:`\tau` and of the slopes at the solution."""

    @staticmethod
    def forward(plan: _Plan, tau: Tensor, *slopes_and_weights: Tensor) -> tuple[Tensor, Tensor]:
        count = len(plan.masks)
        slope_v, *slopes = slopes_and_weights[:-count]
        weights = slopes_and_weights[-count:]
        with torch.inference_mode():
            mu, theta_bar = _by_transposed_substitution(plan, tau, slopes, weights)
        return slope_v * mu, theta_bar.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], plan: _Plan, *tensors: Tensor) -> Any:
        return _fold_vmap(
            _SolveTransposed, info.batch_size, in_dims, plan, tensors, len(plan.masks)
        )


def _by_transposed_substitution(
    plan: _Plan, tau: Tensor, slopes: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    r"""The ring :math:`\bar\theta \to \bar s_L \to \dots \to \bar s_1 \to \mu \to \bar\theta`.

    .. math:: \bar s_l = \sigma'(s_l) \odot W_{l+1}^\top \bar s_{l+1} \; [+ \bar s_{l+1}]

    The last group comes first, so everything is turned round.
    """
    groups = [Groups.of(groups.sizes[::-1]) for groups in plan.groups]
    transposed = [
        (weight.T.flip(0, 1), mask.T.flip(0, 1))
        for weight, mask in zip(weights, plan.masks, strict=True)
    ]

    def turned(t: Tensor, groups: Groups) -> tuple[Tensor, ...]:
        return t.flip(0).contiguous().split(groups.sizes)

    *slopes, slope_theta = slopes
    tau_of, theta_slope_of = turned(tau, groups[-1]), turned(slope_theta, groups[-1])
    s_bar = tau

    def parameters(i: int, mu: Tensor) -> Tensor:
        nonlocal s_bar
        s_bar = torch.addcmul(tau_of[i], theta_slope_of[i], mu)
        return s_bar

    def unit(slope: tuple[Tensor, ...], skip: bool) -> Callable[[int, Tensor], Tensor]:
        def point(i: int, sums: Tensor) -> Tensor:
            nonlocal s_bar
            s_bar = torch.addcmul(s_bar, slope[i], sums) if skip else slope[i] * sums
            return s_bar

        return point

    mu = tau.new_zeros(groups[0].ends[-1], tau.shape[-1])
    theta_bar = tau.new_zeros(tau.shape)
    ring = [Link(*transposed[0], mu, theta_bar, groups[0], groups[-1], parameters)]
    for k in reversed(range(1, len(weights))):
        sums = tau.new_zeros(groups[k].ends[-1], tau.shape[-1])
        point = unit(turned(slopes[k - 1], groups[k]), plan.skips[k - 1])
        ring.append(Link(*transposed[k], sums, sums, groups[k], groups[k], point))
    substitute(ring, plan.leaf, 0, len(mu))
    return mu.flip(0), theta_bar.flip(0)


def _fold_vmap(
    function: type[torch.autograd.Function],
    size: int,
    in_dims: tuple[Any, ...],
    plan: _Plan,
    tensors: Sequence[Tensor],
    count_unmapped: int,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Applies ``function`` to the mapped dimension as more of the batch, the last dimension."""
    dims, count = in_dims[1:], len(tensors) - count_unmapped
    if any(dim is not None for dim in dims[count:]):
        raise NotImplementedError(
            "The slow direction of an autoregressive transform cannot be vmapped over its weights; "
            "loop over the networks, or vmap over inputs and contexts only."
        )
    folded = [
        t.unsqueeze(-2).expand(*t.shape[:-1], size, -1) if dim is None else t.movedim(dim, -2)
        for t, dim in zip(tensors[:count], dims, strict=False)
    ]
    outputs = function.apply(plan, *(t.flatten(-2) for t in folded), *tensors[count:])
    outputs = tuple(t.unflatten(-1, (size, -1)) for t in outputs)
    return outputs, tuple(t.dim() - 2 for t in outputs)
