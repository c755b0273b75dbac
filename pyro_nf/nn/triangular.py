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
    \bar v = (\partial g/\partial v)^\top \mu,

and weights :math:`\phi` that ``g`` has of its own :math:`(\partial g/\partial\phi)^\top \mu`.
:math:`N^\top` is a chain of transposed weights and slopes of activations, so this is such a ring
again, and read backwards it is block lower triangular: :func:`substitute` solves it too. And as all
of it is linear, groups can be solved many at once, by the triangular Jacobian of each row, which
is what few rows are best at. The path gradient is the same task (:func:`solve_transposed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyro_nf.nn.masked import Groups, MaskedLinear, MaskedNet, propagate
from pyro_nf.ops.gradients import apart, derivative
from pyro_nf.ops.layout import features_first

# Halving ends at leaves of about LEAF_UNITS hidden units, but no fewer than FEWEST_GROUPS and no
# more than MOST_GROUPS groups: there it costs more in calls than it saves in products. Where a leaf
# is a single call, it may be larger.
LEAF_UNITS, FEWEST_GROUPS, MOST_GROUPS = 32, 4, 16
ONE_CALL_UNITS, ONE_CALL_GROUPS = 64, 128

# For a few rows a pass costs little more than one group of an uncompiled substitution: as much as
# 1 + weights / WEIGHTS_PER_GROUP groups. So for up to FEW_ROWS rows passes are tried first, for at
# most half of the time that the substitution would take.
FEW_ROWS = 4
WEIGHTS_PER_GROUP = 60_000

# Backwards, groups can be solved many at once by Jacobians, which together have at most
# JACOBIAN_ENTRIES entries. That saves calls and costs operations: it pays for many groups only.
JACOBIAN_ENTRIES = 2**15
FEWEST_JACOBIAN_GROUPS, MOST_JACOBIAN_GROUPS = 9, 25

#: One direction of a univariate map: of values ``(..., D)`` and parameters ``(..., D, P)`` it makes
#: images and ladjs, both ``(..., D)``.
Map = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.compiler.disable  # a compiler would unroll all groups
def solve(
    net: MaskedNet, g: Map, v: Tensor, context: Tensor | None, leaf: Leaf | None = None
) -> tuple[Tensor, Tensor]:
    r"""Finds ``z`` with :math:`z = g(v; \operatorname{net}(z, c))` for the price of about one pass.

    Exact up to rounding. Differentiable once, in all that goes in; works under
    :func:`torch.func.vmap` unless the weights are mapped over.

    Args:
        net: The network of :math:`\theta`.
        g: One direction of a univariate map. It is called without gradients first. If it is a
            method of a Module, the gradient reaches the parameters of that too.
        v: Shape ``(..., D)``.
        context: Shape ``(..., C)``, whose batch broadcasts to that of ``v``; None if there is none.
        leaf: A quicker way through the leaves of the substitution; made for ``net`` and ``g``.

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
    if torch._C._get_tracing_state() is not None:
        return solve_by_coordinates(net, g, v, context)
    layers = cast(Sequence[MaskedLinear], net.layers)
    plan = _Plan(g, net.activation, net.skips, [layer.mask for layer in layers], net.groups, leaf)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    offset, columns = net.offset(v.shape[:-1], context), features_first(v)
    own = [p for p in _parameters_of(g) if p.requires_grad]
    with torch.no_grad():
        start = offset.expand(-1, columns.shape[-1])
        # apply serves vmap alone, and costs as much as one coordinate does
        run = _Solve.apply if torch._C._are_functorch_transforms_active() else _Solve.forward
        z, ladj = run(plan, columns, start, *weights, *biases[1:])
        z, ladj = z.T.reshape(v.shape), ladj.reshape(v.shape[:-1])
    if not (
        torch.is_grad_enabled()
        and any(t.requires_grad for t in (v, offset, *weights, *biases, *own))
    ):
        return z, ladj
    sums = net.sums(z, context)
    theta = _with_implicit_gradient(plan, columns, sums, weights, bool(own))
    z, ladj = g(apart(v), theta.T.reshape(*v.shape, net.num_params))
    return z, ladj.sum(-1)


def _parameters_of(g: Map) -> Iterator[Tensor]:
    """Those of the Module that ``g`` is a method of; of anything else there are none."""
    owner = getattr(g, "__self__", None)
    return owner.parameters() if isinstance(owner, nn.Module) else iter(())


def solve_by_coordinates(
    net: Callable[[Tensor, Tensor | None], Tensor], g: Map, v: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The solution by one pass a coordinate, of any network that is autoregressive.

    It is also what ``torch.jit.trace`` can record, which knows neither gradients by hand nor what
    is chosen by the numbers.

    Args:
        net: Takes ``(..., D)`` and the context, returns parameters ``(..., D, P)``.
        g: One direction of a univariate map.
        v: Shape ``(..., D)``.
        context: Shape ``(..., C)``, whose batch broadcasts to that of ``v``; None if there is none.

    Returns:
        ``z`` of shape ``(..., D)`` and the sum of the ladjs of ``g``, shape ``(...)``.
    """
    z = torch.zeros_like(v)
    for i in range(v.shape[-1]):
        z_i = g(v, net(z, context))[0][..., i : i + 1]
        z = torch.cat([z[..., :i], z_i, z[..., i + 1 :]], -1)
    z, ladj = g(v, net(z, context))
    return z, ladj.sum(-1)


@torch.compiler.disable
def solve_transposed(net: MaskedNet, sums: Sequence[Tensor], G: Tensor, tau: Tensor) -> Tensor:
    r"""Finds the :math:`\mu` with :math:`\mu = N^\top (\tau + G^\top \mu)`.

    Args:
        net: The network with the Jacobian :math:`N`.
        sums: What its :meth:`~pyro_nf.nn.masked.MaskedNet.sums` are where :math:`N` is taken.
        G: A number for each parameter, which belongs to one coordinate, shape ``(..., D, P)``.
        tau: Of that shape.

    Returns:
        Shape ``(..., D)``, without a graph.

    Example:
        >>> import torch
        >>> net = MaskedNet(3, 1, hidden_dims=())
        >>> torch.nn.init.ones_(net.layers[0].weight)
        Parameter containing:
        tensor([[1., 1., 1.],
                [1., 1., 1.],
                [1., 1., 1.]], requires_grad=True)
        >>> G = tau = torch.ones(3, 1)
        >>> solve_transposed(net, net.sums(torch.zeros(3)), G, tau).tolist()
        [3.0, 1.0, 0.0]
    """
    layers = cast("list[MaskedLinear]", list(net.layers))
    weights, masks = [layer.weight for layer in layers], [layer.mask for layer in layers]
    slopes = [derivative(net.activation, s.detach()) for s in sums[:-1]]
    with torch.inference_mode():
        columns = [features_first(t.flatten(-2)) for t in (G, tau)]
        slopes.append(columns[0])
        mu = _solve_transposed(net.groups, net.skips, masks, weights, slopes, columns[1])
    return mu.clone().T.reshape(tau.shape[:-1])


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


#: Computes the groups from ``first`` to before ``last`` of a ring and adds the ladjs of ``z``:
#: ``(ladj, ring, first, last)``. Every group before and every product from there is done.
Leaf = Callable[[Tensor, Sequence[Link], int, int], None]


def substitute(
    ring: Sequence[Link],
    size: int,
    first: int,
    last: int,
    leaf: Callable[[Sequence[Link], int, int], None],
) -> None:
    """Computes the values of the groups from ``first`` to before ``last``.

    Args:
        ring: The links in the order in which a group is computed. The first link takes the values
            of the last one, and of earlier groups only.
        size: How many groups are not halved any further.
        first: The first group. All products with the groups before it are in the sums already.
        last: One past the last group.
        leaf: Computes those that are not halved, ``(ring, first, last)``.
    """
    if last - first <= size:
        return leaf(ring, first, last)
    middle = (first + last) // 2
    substitute(ring, size, first, middle, leaf)
    for before, link in zip((ring[-1], *ring), ring, strict=False):
        rows = link.sum_groups.span(middle, last)
        columns = before.value_groups.span(first, middle)
        link.sums[rows].addmm_(link.weight[rows, columns], before.values[columns])
    substitute(ring, size, middle, last, leaf)


def _group_by_group(ring: Sequence[Link], first: int, last: int) -> None:
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
    leaf: Leaf | None = None


def _leaf_size(groups: Sequence[Groups], units: int = LEAF_UNITS, most: int = MOST_GROUPS) -> int:
    """How many groups make a leaf of about so many hidden units."""
    widest = max((g.ends[-1] for g in groups[1:-1]), default=1)
    return min(max(units * len(groups[0].sizes) // widest, FEWEST_GROUPS), most)


class _Solve(torch.autograd.Function):
    """``z`` and the ladj, of ``v`` and of the first sums as they are before any ``z`` is known."""

    @staticmethod
    def forward(
        plan: _Plan, v: Tensor, start: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        try:
            with torch.inference_mode():  # makes all the small calls some 10 % cheaper
                return _solved(plan, v, start, parameters)
        except RuntimeError:
            # In that mode autograd is off for good: a map that takes its slope by autograd fails.
            return _solved(plan, v, start, parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], plan: _Plan, *tensors: Tensor) -> Any:
        return _fold_vmap(_Solve, info.batch_size, in_dims, plan, tensors, 2 * len(plan.masks) - 1)


def _solved(
    plan: _Plan, v: Tensor, start: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The solution and its ladj, as ordinary tensors, whatever the mode."""
    count = len(plan.masks)
    weights, biases = parameters[:count], parameters[count:]
    with torch.inference_mode(False), torch.no_grad():
        z, ladj = v.clone(memory_format=torch.contiguous_format), v.new_zeros(v.shape[-1])
    few = v.shape[-1] <= FEW_ROWS and plan.leaf is None
    if not (few and _by_passes(plan, z, ladj, start, weights, biases)):
        _by_substitution(plan, z, ladj, start, weights, biases)
    return z, ladj


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
    if plan.leaf is None:
        substitute(ring, _leaf_size(plan.groups), 0, len(z), _group_by_group)
    else:
        size = _leaf_size(plan.groups, ONE_CALL_UNITS, ONE_CALL_GROUPS)
        substitute(ring, size, 0, len(z), partial(plan.leaf, ladj))


def _with_implicit_gradient(
    plan: _Plan,
    v: Tensor,
    sums: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_weights: bool = False,
) -> Tensor:
    r"""Returns :math:`\theta`, the last of the sums at the solution, with its whole gradient.

    Args:
        plan: The plan of the solve.
        v: Features first.
        sums: What the network's sums are at the solution, features first.
        weights: Of the network.
        has_weights: Whether the map has weights of its own that learn.
    """

    def image(v: Tensor, theta: Tensor) -> Tensor:
        return plan.g(v.T, theta.T.unflatten(-1, (len(v), -1)))[0].T

    def pointwise(v: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        *hidden, theta = sums
        return *(plan.activation(s.clone()) for s in hidden), image(v, theta)

    slopes = _slopes(pointwise, [t.detach() for t in (v, *sums)])
    # Of v and theta the slopes are known; only the map's own weights need a graph.
    z = image(v.detach(), sums[-1].detach()) if has_weights else None
    return _ImplicitGradient.apply(plan, v, sums[-1], z, *slopes, *(w.detach() for w in weights))


def _slopes(
    pointwise: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients of the sum of all images of a function that acts on each number alone."""
    if torch._C._are_functorch_transforms_active():
        # The type of vjp cannot say that without an auxiliary output it returns a pair.
        images, pull = torch.func.vjp(pointwise, *inputs)  # type: ignore[misc]
        return tuple(pull(tuple(torch.ones_like(image) for image in images)))
    with torch.enable_grad():
        leaves = [t.requires_grad_() for t in inputs]
        images = pointwise(*leaves)
        ones = [torch.ones_like(image) for image in images]
        return torch.autograd.grad(images, leaves, ones, materialize_grads=True)


class _ImplicitGradient(torch.autograd.Function):
    r"""The identity of :math:`\theta`; its backward gives :math:`\bar v` and :math:`\bar\theta`.

    It gives :math:`\mu` to the image ``z``, if there is one, and so to the weights of the map.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        plan: _Plan, v: Tensor, theta: Tensor, z: Tensor | None, *slopes_and_weights: Tensor
    ) -> Tensor:
        return theta.view_as(theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.plan, _, _, z, *slopes_and_weights = inputs
        ctx.has_weights = z is not None
        ctx.save_for_backward(*slopes_and_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tau: Tensor) -> tuple[Tensor | None, ...]:
        slope_v, *rest = ctx.saved_tensors
        mu, grad_theta = _SolveTransposed.apply(ctx.plan, tau, *rest)
        grad_z = mu if ctx.has_weights else None
        return None, slope_v * mu, grad_theta, grad_z, *(None for _ in ctx.saved_tensors)


class _SolveTransposed(torch.autograd.Function):
    r""":math:`\mu` and :math:`\bar\theta`, of :math:`\tau` and of the slopes at the solution."""

    @staticmethod
    def forward(plan: _Plan, tau: Tensor, *slopes_and_weights: Tensor) -> tuple[Tensor, Tensor]:
        count = len(plan.masks)
        slopes, weights = slopes_and_weights[:-count], slopes_and_weights[-count:]
        with torch.inference_mode():
            mu = _solve_transposed(plan.groups, plan.skips, plan.masks, weights, slopes, tau)
            theta_bar = tau + _given_to_parameters(slopes[-1], mu)
        return mu.clone(), theta_bar.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], plan: _Plan, *tensors: Tensor) -> Any:
        return _fold_vmap(
            _SolveTransposed, info.batch_size, in_dims, plan, tensors, len(plan.masks)
        )


def _solve_transposed(
    groups: Sequence[Groups],
    skips: Sequence[bool],
    masks: Sequence[Tensor],
    weights: Sequence[Tensor],
    slopes: Sequence[Tensor],
    tau: Tensor,
) -> Tensor:
    r"""Returns the :math:`\mu` of the transposed ring: by Jacobians if there are few rows.

    Args:
        groups: Of ``x``, each hidden layer and the parameters.
        skips: Of each layer after the first.
        masks: Of :math:`W_1` to :math:`W_{L+1}`.
        weights: Those.
        slopes: :math:`\sigma'(s_l)` of each hidden layer, and :math:`G`; features first.
        tau: Features first.
    """
    count_groups, (count_params, count_rows) = len(groups[0].sizes), tau.shape
    entries = max(count_params // count_groups * count_rows, 1)  # of the Jacobian of one group
    leaf = min(math.isqrt(JACOBIAN_ENTRIES // entries), MOST_JACOBIAN_GROUPS)
    if leaf < FEWEST_JACOBIAN_GROUPS:
        return _by_transposed_substitution(groups, skips, masks, weights, slopes, tau)
    masked = [weight * mask for weight, mask in zip(weights, masks, strict=True)]
    bars = [tau.new_zeros(weight.shape[-1], count_rows) for weight in weights]
    ring = _TransposedRing(masked, skips, slopes[:-1], slopes[-1], [*bars, tau.clone()])
    if count_groups <= leaf:
        ring.find_mu()
    else:
        ring.halve(groups, leaf, 0, count_groups)
    return ring.bars[0]


def _given_to_parameters(G: Tensor, mu: Tensor) -> Tensor:
    r"""Returns :math:`G^\top \mu`, features first."""
    return (G.unflatten(0, (len(mu), -1)) * mu.unsqueeze(1)).reshape(G.shape)


class _TransposedRing(NamedTuple):
    r"""The ring :math:`\bar\theta \to \bar s_L \to \dots \to \bar s_1 \to \mu \to \bar\theta`.

    .. math::
        \bar\theta = \tau + G^\top \mu, \qquad
        \bar s_l = \sigma'(s_l) \odot W_{l+1}^\top \bar s_{l+1} \; [+ \bar s_{l+1}], \qquad
        \mu = W_1^\top \bar s_1

    The last group comes first. All of this is linear, so that many groups can be solved at once.

    Attributes:
        weights: :math:`W_1` to :math:`W_{L+1}`, masked.
        skips: Of each layer after the first.
        slopes: :math:`\sigma'(s_l)` of each hidden layer; features first, as all that follows.
        G: A number for each parameter, which belongs to one coordinate, ``(D P, N)``.
        bars: :math:`\mu, \bar s_1, \dots, \bar s_L, \bar\theta`: at first what other groups have
            brought (if none has, 0 and :math:`\tau`), then the values.
    """

    weights: Sequence[Tensor]
    skips: Sequence[bool]
    slopes: Sequence[Tensor]
    G: Tensor
    bars: Sequence[Tensor]

    def halve(self, groups: Sequence[Groups], leaf: int, first: int, last: int) -> None:
        """Solves like :func:`substitute`, but the last group comes first."""
        if last - first <= leaf:
            part = self._part([g.span(first, last) for g in groups])
            part.find_mu()
            if first:
                part.spread_mu()
            return
        middle = (first + last) // 2
        self.halve(groups, leaf, middle, last)
        for k, weight in enumerate(self.weights):
            rows, columns = groups[k + 1].span(middle, last), groups[k].span(first, middle)
            self.bars[k][columns].addmm_(weight[rows, columns].T, self.bars[k + 1][rows])
        self.halve(groups, leaf, first, middle)

    def _part(self, spans: Sequence[slice]) -> _TransposedRing:
        """Some groups as a ring of their own."""
        pairs = pairwise(spans)
        return _TransposedRing(
            [w[rows, columns] for w, (columns, rows) in zip(self.weights, pairs, strict=True)],
            self.skips,
            [slope[span] for slope, span in zip(self.slopes, spans[1:-1], strict=True)],
            self.G[spans[-1]],
            [bar[span] for bar, span in zip(self.bars, spans, strict=True)],
        )

    def find_mu(self) -> None:
        r"""By the Jacobian :math:`K = G N` of each row, a small triangular matrix.

        First the network is given :math:`\tau`, then :math:`(I - K^\top) \mu` is what came back.
        """
        for k in reversed(range(len(self.weights))):
            self.bars[k].addmm_(self.weights[k].T, self.bars[k + 1])
            if k:
                self.bars[k].mul_(self.slopes[k - 1])
                if self.skips[k - 1]:
                    self.bars[k].add_(self.bars[k + 1])
        mu = self.bars[0]
        if len(mu) > 1:
            A, b = -self._jacobian().permute(2, 1, 0), mu.T.unsqueeze(-1)
            solved = torch.linalg.solve_triangular(A, b, upper=True, unitriangular=True)
            mu.copy_(solved.squeeze(-1).T)

    def _jacobian(self) -> Tensor:
        """K, shape ``(D, D, N)``."""
        first, *rest = self.weights
        dim, N = first.shape[-1], first.unsqueeze(-1)
        for k, weight in enumerate(rest):
            slope = self.slopes[k]
            if k == 0 and slope.shape[-1] > len(weight):  # products of weights serve all rows
                image = (weight.unsqueeze(1) * first.T).flatten(0, 1) @ slope
            else:
                image = weight @ (slope.unsqueeze(1) * N).flatten(1)
            image = image.view(len(weight), dim, slope.shape[-1])
            N = N + image if self.skips[k] else image
        return (self.G.unsqueeze(1) * N).unflatten(0, (dim, -1)).sum(1)

    def spread_mu(self) -> None:
        r"""Adds to :math:`\bar\theta` and :math:`\bar s_l` what :math:`\mu` is to them."""
        delta = _given_to_parameters(self.G, self.bars[0])
        self.bars[-1].add_(delta)
        for k in reversed(range(1, len(self.weights))):
            image = self.slopes[k - 1] * (self.weights[k].T @ delta)
            delta = delta + image if self.skips[k - 1] else image
            self.bars[k].add_(delta)


def _by_transposed_substitution(
    groups: Sequence[Groups],
    skips: Sequence[bool],
    masks: Sequence[Tensor],
    weights: Sequence[Tensor],
    slopes: Sequence[Tensor],
    tau: Tensor,
) -> Tensor:
    r"""Group by group: the last one comes first, so everything is turned round."""
    groups = [Groups.of(g.sizes[::-1]) for g in groups]
    transposed = [
        (weight.T.flip(0, 1), mask.T.flip(0, 1))
        for weight, mask in zip(weights, masks, strict=True)
    ]

    def turned(t: Tensor, groups: Groups) -> tuple[Tensor, ...]:
        return t.flip(0).contiguous().split(groups.sizes)

    *slopes, G = slopes
    tau_of, G_of = turned(tau, groups[-1]), turned(G, groups[-1])
    s_bar = tau

    def parameters(i: int, mu: Tensor) -> Tensor:
        nonlocal s_bar
        s_bar = torch.addcmul(tau_of[i], G_of[i], mu)
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
        point = unit(turned(slopes[k - 1], groups[k]), skips[k - 1])
        ring.append(Link(*transposed[k], sums, sums, groups[k], groups[k], point))
    substitute(ring, _leaf_size(groups), 0, len(mu), _group_by_group)
    return mu.flip(0)


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
