"""The loss of a density fit: rows as a flow sees them, and what is learned of it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nf.flows.base import Base
from pyro_nf.flows.flow import Flow
from pyro_nf.ops.devices import in_double
from pyro_nf.train.budget import Budget
from pyro_nf.train.density.table import Table, columns_of
from pyro_nf.train.randomness import own_randomness
from pyro_nf.transforms.affine import FixedAffine
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.stochastic import StochasticTransform

Units = tuple[FixedAffine | None, FixedAffine | None]
"""Of rows and of contexts."""

ROWS_AT_ONCE = 4_096


def units_in(flow: Flow) -> Units:
    """The units that a flow has."""
    return flow.units, flow.context_units


def seen(table: Table, units: Units) -> Table:
    """Rows and contexts as the transform of a flow with these units sees them."""
    y, context = table.y, table.context
    if units[0] is not None:
        y = units[0].inverse_and_ladj(y)[0]
    if units[1] is not None and context is not None:
        context = units[1].inverse_and_ladj(context)[0]
    return Table(y, context)


def embedded(rows: Table, flow: Flow) -> Table:
    """Rows and contexts in units, the contexts as the embedding of a flow makes them."""
    embed = flow.embed
    if embed is None or rows.context is None:
        return rows
    with torch.no_grad():
        return Table(rows.y, torch.cat([embed(part.context) for part in rows.pieces()]))


def log_scales(units: FixedAffine | None) -> float:
    """What units add to a negative log density."""
    return 0.0 if units is None else in_double(units.scale).log().sum().item()


def mean_loss(
    flow: Flow, table: Table, at_once: int = ROWS_AT_ONCE, budget: Budget | None = None
) -> float:
    """Mean negative log density of the rows, or of the first of them if the budget ends before.

    Args:
        flow: The flow.
        table: The rows.
        at_once: Rows that pass through the flow at once.
        budget: Seconds that it may take.
    """
    total, count = 0.0, 0
    # bounds and estimates by the same draws at each look, so that states are compared without noise
    draws = own_randomness(0) if flow.log_prob_kind != "exact" else nullcontext()
    with torch.no_grad(), draws:
        for part in table.pieces(at_once):
            total += flow(part.context).log_prob(part.y).sum().item()
            count += len(part)
            if budget is not None and budget.is_spent():
                break
    return -total / count


def farthest(batch: tuple[Tensor, Tensor | None]) -> str:
    """Say what may be wrong with a batch whose loss is not finite."""
    y = columns_of(batch[0])
    far = (y.abs() / y.abs().median(0).values.clamp_min(1e-30)).amax(0)
    return f"The farthest entry of that batch is in column {int(far.argmax())}."


def draws_in_training(flow: Flow) -> bool:
    """Whether a flow may draw random numbers in training, as dropout does."""
    return flow.log_prob_kind != "exact" or any(
        type(module).__module__.split(".")[0] not in ("pyro_nf", "torch")
        or isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU))
        for module in flow.modules()
    )


def parameter_groups(flow: Flow, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices of networks decay; what their biases make of each coordinate stays."""
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": 0.0},
        {"params": [], "weight_decay": weight_decay},
    ]
    for module in flow.modules():
        network = not isinstance(module, (FlowTransform, StochasticTransform, Base, Flow))
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                groups[network and name.startswith("weight") and p.dim() > 1]["params"].append(p)
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("fit_density: the flow has no parameter that requires a gradient.")
    return groups
