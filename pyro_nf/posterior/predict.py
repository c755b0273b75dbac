"""The model run again at given draws of its latents."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from pyro_nf.model.joint import LogJoint
from pyro_nf.sites.latents import Message, Model
from pyro_nf.sites.supports import is_flat

# Nothing around a run for a single draw.
_ONCE: AbstractContextManager[object] = nullcontext()


class SetFree(UnconditionMessenger):
    """Draws what was observed anew, and leaves deterministic sites as they are."""

    def _pyro_sample(self, msg: Message) -> None:
        if not _is_deterministic(msg):
            super()._pyro_sample(msg)


def _is_deterministic(site: Message) -> bool:
    return bool(site["infer"].get("_deterministic"))


def _observed_nodes(trace: poutine.Trace) -> dict[str, Any]:
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and node["is_observed"] and hasattr(node["fn"], "log_prob")
        if not (poutine.util.site_is_subsample(node) or _is_deterministic(node))
    }


def _log_prob(node: Message) -> Tensor:
    """Of each observation; 0 where it is masked."""
    log_prob: Tensor = scale_and_mask(node["fn"].log_prob(node["value"]), mask=node["mask"])
    return log_prob


def _run(
    joint: LogJoint,
    values: Mapping[str, Tensor],
    draws: AbstractContextManager[object] = _ONCE,
) -> dict[str, Any]:
    """The observed sites of one run; sites given here do not count as observed."""
    with torch.no_grad(), poutine.block(), draws:
        model = poutine.condition(joint.model, dict(values))
        trace = poutine.trace(model).get_trace(*joint.args, **joint.kwargs)
    return {name: node for name, node in _observed_nodes(trace).items() if name not in values}


def _padded(joint: LogJoint, samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Draws ``(S, *shape)`` with the draws to the left of all plates, ``(S, 1, ..., *shape)``."""
    padded = {}
    for name, draws in samples.items():
        pad = (1,) * (joint.max_plate_nesting - joint.sites[name].batch_ndim)
        padded[name] = draws.reshape(len(draws), *pad, *draws.shape[1:])
    return padded


def _draws(joint: LogJoint, count: int) -> AbstractContextManager[object]:
    """The plate of the draws, in which what does not depend on them is drawn for each anew."""
    return pyro.plate("_draws", count, dim=-1 - joint.max_plate_nesting)


def _forward(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    draws: AbstractContextManager[object] = _ONCE,
) -> dict[str, Message]:
    """The nodes of all sites of one run but those that are given and bare factors."""
    with torch.no_grad(), poutine.block(), draws:
        trace = poutine.trace(poutine.condition(model, dict(values))).get_trace(*args, **kwargs)
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and name not in values
        if not poutine.util.site_is_subsample(node)
        if not isinstance(node["fn"], pyro.distributions.Unit)
    }


def _natural(value: Tensor, count: int, shape: torch.Size) -> Tensor:
    """A batched value without the dimensions of size 1 between the draws and ``shape``."""
    if value.numel() == shape.numel():  # it does not depend on the draws
        return value.reshape(shape).expand(count, *shape)
    pad = (1,) * (value.dim() - 1 - len(shape))
    return value.expand(count, *pad, *shape).reshape(count, *shape)


def predict(
    joint: LogJoint,
    samples: Mapping[str, Tensor],
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Runs a model forward from draws of its latents, once for all draws if it broadcasts.

    A batch whose deterministic sites differ from those of a single run is run draw by draw.

    Args:
        joint: Says whether and how the model broadcasts.
        samples: Draws of the latents, ``(S, *shape)`` each.
        model: The model, as it is or with its data set free.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Returns:
        For each site that is not given ``(S, *shape)``.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal((x * beta).sum(-1), 1.0))
        >>> joint = LogJoint(poutine.condition(model, {"y": torch.zeros(3)}), (torch.ones(3, 2),))
        >>> draws = predict(joint, {"beta": torch.zeros(5, 2)}, model, (torch.ones(7, 2),), {})
        >>> draws["y"].shape
        torch.Size([5, 7])
    """
    count = len(next(iter(samples.values())))
    one = _forward(model, args, kwargs, {name: draws[0] for name, draws in samples.items()})
    if joint.kind == "batched":
        nodes = _forward(model, args, kwargs, _padded(joint, samples), _draws(joint, count))
        if all(_agree(nodes[name], node, count) for name, node in one.items()):
            return {
                name: _natural(nodes[name]["value"], count, node["value"].shape)
                for name, node in one.items()
            }
    each = [{name: draws[i] for name, draws in samples.items()} for i in range(count)]
    runs = [_forward(model, args, kwargs, values) for values in each]
    return {name: torch.stack([run[name]["value"] for run in runs]) for name in one}


def _agree(batched: Message, one: Message, count: int) -> bool:
    """Whether a deterministic site has for the first draw what a run for it alone has.

    The log joint has been checked, but it does not see these sites: ``x.mean()`` would be over all
    draws.
    """
    if not _is_deterministic(one):
        return True
    wanted = one["value"]
    try:
        got = _natural(batched["value"], count, wanted.shape)[0]
    except RuntimeError:  # its shape is another one
        return False
    return torch.allclose(got, wanted, rtol=1e-4, atol=1e-6, equal_nan=True)


class _Completed(Messenger):
    """Gives latents their draws, and draws anew the entries that have no coordinates."""

    def __init__(self, joint: LogJoint, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.joint, self.values = joint, values
        self.found: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        if msg["is_observed"] or name not in self.values:
            return
        site, value = self.joint.sites[name], self.values[name]
        if site.keep is not None and not is_flat(msg["fn"]):
            keep = site.keep.reshape(*site.keep.shape, *(1,) * site.event_dim)
            value = torch.where(keep, value, msg["fn"].sample())
        msg["value"] = self.found[name] = value


def complete(joint: LogJoint, samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Draws whose entries without coordinates are drawn from their prior, given the others.

    Args:
        joint: Says which entries have no coordinates: those that are masked.
        samples: Draws of the latents, ``(S, *shape)`` each, as `LogJoint.unpack` gives them.
    """
    samples = dict(samples)
    partly = [name for name, site in joint.sites.items() if site.keep is not None]
    if not partly or not len(samples[partly[0]]):
        return samples

    def run(
        values: Mapping[str, Tensor], draws: AbstractContextManager[object] = _ONCE
    ) -> dict[str, Tensor]:
        completed = _Completed(joint, values)
        with torch.no_grad(), poutine.block(), completed, draws:
            joint.model(*joint.args, **joint.kwargs)
        return completed.found

    count = len(samples[partly[0]])
    if joint.kind == "batched" and not joint.enumerated_sites:
        found = run(_padded(joint, samples), _draws(joint, count))
        return samples | {
            name: _natural(found[name], count, joint.sites[name].shape) for name in partly
        }
    runs = [run({name: draws[i] for name, draws in samples.items()}) for i in range(count)]
    return samples | {name: torch.stack([found[name] for found in runs]) for name in partly}


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

    Raises:
        ValueError: If the model sums out discrete latents, or draws random numbers of its own.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.zeros(3))
        >>> pointwise_log_likelihood(LogJoint(model), {"mu": torch.zeros(5)})["y"].shape
        torch.Size([5, 3])
    """
    if joint.enumerated_sites or joint.is_random:
        why = (
            f"sums out {list(joint.enumerated_sites)}"
            if joint.enumerated_sites
            else ("takes a subsample or draws random numbers of its own")
        )
        raise ValueError(
            f"log_likelihood: the model {why}, so an observation has no log likelihood given the "
            "draws alone. Write a model that sums over it, or takes all rows."
        )
    count = len(next(iter(samples.values())))
    singles = (
        _run(joint, {name: draws[i] for name, draws in samples.items()}) for i in range(count)
    )
    if joint.kind != "batched":
        rows = [{name: _log_prob(node) for name, node in nodes.items()} for nodes in singles]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    one = next(singles)
    depth = joint.max_plate_nesting
    nodes = _run(joint, _padded(joint, samples), _draws(joint, count))
    return {
        name: _log_prob(node)
        .expand(count, *(1,) * (depth - len(shape)), *shape)
        .reshape(count, *shape)
        for name, node in nodes.items()
        for shape in [_log_prob(one[name]).shape]
    }
