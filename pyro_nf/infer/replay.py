"""The model run again at given draws of its latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_nf.infer.joint import LogJoint, Message, init_anywhere, is_flat


def _no_sample(site: Message) -> Tensor:
    raise NotImplementedError


class FlatPriorsAtRest(Messenger):
    """Gives flat priors, which cannot be sampled, the image of 0; whoever conditions wins.

    Pyro's ``Predictive`` runs a model once without values to learn its shapes; it fails there.

    Args:
        dtype: Of the latents.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._init = init_anywhere(_no_sample, dtype)

    def _pyro_sample(self, msg: Message) -> None:
        if msg["value"] is None and is_flat(msg["fn"]):
            msg["value"] = self._init(msg).expand(msg["fn"].shape())


def _observed_nodes(trace: poutine.Trace) -> dict[str, Any]:
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and node["is_observed"] and hasattr(node["fn"], "log_prob")
        if not poutine.util.site_is_subsample(node)
    }


def _run(joint: LogJoint, values: Mapping[str, Tensor]) -> dict[str, Any]:
    """The observed sites of one run; sites given here do not count as observed."""
    with torch.no_grad(), poutine.block():
        model = poutine.condition(joint.model, dict(values))
        trace = poutine.trace(model).get_trace(*joint.args, **joint.kwargs)
    return {name: node for name, node in _observed_nodes(trace).items() if name not in values}


def failing_sites(joint: LogJoint, z: Tensor) -> list[str]:
    """The sites whose log density is not finite at one point, in the order of the model.

    Args:
        joint: Has the model and its arguments.
        z: Unconstrained coordinates, ``(D,)``.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal((x - 3).sqrt(), 1.0), obs=torch.tensor(0.0))
        >>> failing_sites(LogJoint(model, init_loc_fn=lambda _: torch.tensor(4.0)), torch.zeros(1))
        ['y']
    """
    with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        model = poutine.condition(joint.model, joint.unpack(z))
        nodes: dict[str, Any] = dict(
            poutine.trace(model).get_trace(*joint.args, **joint.kwargs).nodes
        )
        return [
            name
            for name, node in nodes.items()
            if node["type"] == "sample" and not poutine.util.site_is_subsample(node)
            if not bool(node["fn"].log_prob(node["value"]).isfinite().all())
        ]


def observed_values(joint: LogJoint, samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The value of each observed site.

    Args:
        joint: Has the model and its arguments.
        samples: Draws of the latents, ``(S, *shape)`` each.
    """
    nodes = _run(joint, {name: draws[0] for name, draws in samples.items()})
    return {name: node["value"] for name, node in nodes.items()}


def pointwise_log_likelihood(joint: LogJoint, samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The log likelihood of each observation for each draw.

    The model runs once for all draws if it broadcasts over them, and else once for each.

    Args:
        joint: Has the model and its arguments.
        samples: Draws of the latents, ``(S, *shape)`` each.

    Returns:
        For each observed site ``(S, *batch_shape)``.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.zeros(3))
        >>> pointwise_log_likelihood(LogJoint(model), {"mu": torch.zeros(5)})["y"].shape
        torch.Size([5, 3])
    """
    count = len(next(iter(samples.values())))
    singles = (
        _run(joint, {name: draws[i] for name, draws in samples.items()}) for i in range(count)
    )
    if joint.kind != "batched":
        rows = [
            {name: node["fn"].log_prob(node["value"]) for name, node in nodes.items()}
            for nodes in singles
        ]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    one = next(singles)
    depth = joint.max_batch_ndim
    padded = {}
    for name, draws in samples.items():
        site = joint.sites[name]
        pad = (1,) * (depth - site.batch_ndim)
        padded[name] = draws.reshape(count, *pad, *draws.shape[1:])
    with pyro.plate("_draws", count, dim=-1 - depth):
        nodes = _run(joint, padded)
    return {
        name: node["fn"]
        .log_prob(node["value"])
        .expand(count, *(1,) * (depth - len(shape)), *shape)
        .reshape(count, *shape)
        for name, node in nodes.items()
        for shape in [one[name]["fn"].log_prob(one[name]["value"]).shape]
    }
