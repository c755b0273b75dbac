"""Recorded operations: made once by running a function, and replayed without it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
    for i, (node, value) in enumerate(values.items()):
        if node.op == "get_attr" or not isinstance(value, Tensor):
            continue
        if not any(user in varying for user in node.users):
            continue
        name = f"_folded_{i}"
        graph.register_buffer(name, value.detach().clone())
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(name))
    graph.graph.eliminate_dead_code()
    graph.recompile()
