"""What a fit consists of: its stages, what it was asked for, and its history."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pyro_nf._checks import (
    check_budget,
    check_callable,
    check_count,
    check_flag,
    check_kind,
    check_listed,
    check_number,
    check_patience,
    check_positive,
    check_running,
    is_sequence,
    shown,
)
from pyro_nf._storage import InvalidFile
from pyro_nf.train.budget import Clock

PATIENCE_GAIN = 1e-3
"""A metric, in nats, that is better by less does not renew the patience."""

OVERFIT_LOSS = 0.03
"""A metric, in nats, that is worse by less is within the noise."""


@dataclass
class History:
    """What happened in a fit.

    Attributes:
        losses: The loss of every step; nan for a step that was skipped.
        learning_rates: The learning rate of the first parameter group at every step.
        seconds: The clock at the end of every step, from the start of the fit; what came before
            training counts.
        seconds_before: What came before training, as far as it is known.
        checked_steps: The steps after which the metric was taken; 0 is the start.
        checked_values: The metric there: the validation loss, or the mean loss of the last steps.
        best_step: The step after which the metric was best; the fit ends with that state.
        best_value: The metric there.
        skipped: The steps that were skipped because the loss or the gradient was not finite.
        overfits: The steps after which the fit went back to its best state under more weight decay.
        stopped: Why the fit ended: ``"max_steps"``, ``"max_seconds"``, ``"patience"``,
            ``"interrupted"``, or ``""`` while it runs.
    """

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    seconds_before: float = 0.0
    checked_steps: list[int] = field(default_factory=list)
    checked_values: list[float] = field(default_factory=list)
    best_step: int = 0
    best_value: float = math.inf
    skipped: list[int] = field(default_factory=list)
    overfits: list[int] = field(default_factory=list)
    stopped: str = ""

    def __repr__(self) -> str:
        return (
            f"History({self.steps} steps, best {self.best_value:.6g} at step {self.best_step}, "
            f"{len(self.skipped)} skipped, stopped by {self.stopped or 'nothing yet'})"
        )

    @property
    def steps(self) -> int:
        """The number of steps taken."""
        return len(self.losses)

    def last_gain(self) -> int:
        """The step after which the metric was as good as it ever became, but for what nobody sees.

        The start does not count: a settled state is worse at first under a high learning rate.
        """
        checks = zip(self.checked_values, self.checked_steps, strict=True)
        later = [(value, step) for value, step in checks if step > 0 and not math.isnan(value)]
        least = min((value for value, _ in later), default=math.nan)
        return next((step for value, step in later if value <= least + PATIENCE_GAIN), 1)

    def overfits_since(self) -> int | None:
        """The step since which the metric has become worse while the loss has become better.

        That is the best step, or the last one where the fit went back. None if it does not overfit.
        """
        steps, values = self.checked_steps, self.checked_values
        # as in last_gain, the start does not count
        later = [i for i in range(1, len(steps)) if not math.isnan(values[i])]
        if not later:
            return None
        best = min(later, key=values.__getitem__)
        is_worse = values[-1] > values[best] + OVERFIT_LOSS
        learns = self._loss_before(-1) < self._loss_before(best)
        return max([steps[best], *self.overfits[-1:]]) if is_worse and learns else None

    def _loss_before(self, i: int) -> float:
        """Mean loss between the check before the i-th and the i-th."""
        return finite_mean(self.losses[self.checked_steps[i - 1] : self.checked_steps[i]])


def adam(
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
    learning_rate: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> Optimizer:
    """Adam with decoupled weight decay, fused into one kernel where torch has that.

    The fused kernel is the largest cheap gain in the training of small networks.

    *Decoupled Weight Decay Regularization* (Loshchilov, Hutter, 2019).

    Args:
        parameters: Parameters, or groups of them, as torch's optimisers take.
        learning_rate: For the groups that bring none.
        betas: Decay of the two moments.
        weight_decay: For the groups that bring none; 0 is plain Adam.
    """
    check_listed("adam", "parameters", parameters, "a list of parameters, or of groups of them")
    groups: list[Any] = list(parameters)
    if not groups:
        raise ValueError("adam: parameters must have at least one entry, got none.")
    for group in groups:
        is_group = isinstance(group, dict) and "params" in group
        if not is_group:
            check_kind("adam", "every entry of parameters", group, Tensor)
    check_number("adam", "learning_rate", learning_rate, "a number >= 0", at_least=0)
    check_number("adam", "weight_decay", weight_decay, "a number >= 0", at_least=0)
    if not is_sequence(betas) or len(betas) != 2:
        raise TypeError(f"adam: betas must be two numbers, got {shown(betas)}.")
    for beta in betas:
        check_number("adam", "each of betas", beta, "from 0 to below 1", at_least=0, below=1)
    tensors = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
    fused = all(p.device.type in ("cpu", "cuda", "xpu", "mps") for p in tensors)
    return AdamW(
        groups, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=fused or None
    )


def warm_cosine(warmup_steps: int = 20, last: float = 0.0) -> Callable[[int, float], float]:
    r"""A learning rate that rises linearly, then falls along a half cosine.

    .. math:: r(t, p) = \min\left(1, \tfrac{t + 1}{w}\right)
        \left(\ell + (1 - \ell) \tfrac{1 + \cos \pi p}{2}\right)

    Args:
        warmup_steps: The steps :math:`w` of the rise.
        last: The share :math:`\ell` of the rate that is left at the end.

    Returns:
        A function of the step :math:`t` and of the progress :math:`p` from 0 to 1.

    Example:
        >>> rate = warm_cosine(warmup_steps=10)
        >>> rate(0, 0.0), rate(50, 0.5), rate(99, 1.0)
        (0.1, 0.5, 0.0)
    """
    check_count("warm_cosine", "warmup_steps", warmup_steps, at_least=0)
    check_number("warm_cosine", "last", last, "from 0 to 1", at_least=0, at_most=1)

    def rate(step: int, progress: float) -> float:
        warmth = min(1.0, (step + 1) / max(warmup_steps, 1))
        return warmth * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress)))

    return rate


@dataclass
class Stage:
    """A part of a fit: what it minimises, over which parameters, and for which share of the budget.

    Attributes:
        loss: Takes a batch, returns a scalar tensor.
        optimizer: Holds the parameters and their learning rates.
        schedule: Factor on the learning rates, from the step and the progress of this stage.
        share: Its weight in the division of the budget among the stages.
        memory: What the loss remembers from step to step; a checkpoint keeps it.
    """

    loss: Callable[[Any], Tensor]
    optimizer: Optimizer
    schedule: Callable[[int, float], float] = field(default_factory=warm_cosine)
    share: float = 1.0
    memory: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_callable("Stage", "loss", self.loss, "a function of a batch", count=1)
        check_kind("Stage", "optimizer", self.optimizer, Optimizer, "make one by adam(parameters)")
        wanted = "a function of the step and the progress, such as warm_cosine()"
        check_callable("Stage", "schedule", self.schedule, wanted, count=2)
        check_positive("Stage", "share", self.share)
        check_kind("Stage", "memory", self.memory, dict)


class Average:
    """A moving average of the parameters that are trained.

    Args:
        module: Holds the parameters.
        decay: The most that is kept of the average in a step.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.restart()

    def restart(self) -> None:
        """Begin again at the parameters as they are."""
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    def take(self, values: dict[str, Tensor]) -> None:
        """Go on from an average that was saved."""
        self.values = {name: t.to(self.parameters[name].device) for name, t in values.items()}

    def update(self, step: int) -> None:
        """Take the parameters after a step into the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in self.parameters.items():
            self.values[name].lerp_(p.detach(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the module have the average for a while."""
        last = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._set(self.values)
            yield
        finally:
            self._set(last)

    def _set(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(values[name])


@dataclass(frozen=True)
class Plan:
    """What :func:`~pyro_nf.train.loop.train` was asked for; its arguments by their names.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If one is out of its range, or there is no budget.
        OSError: If the checkpoint cannot be written.
    """

    module: nn.Module
    stages: list[Stage]
    batches: Iterable[Any]
    validate: Callable[[], float] | None
    max_steps: int | None
    max_seconds: float | None
    check_every: int
    patience: float | None
    max_grad_norm: float | None
    average: float | None
    raise_decay: bool
    seed: int | None
    draws: bool
    progress: bool
    metric: str
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int
    settings: Mapping[str, Any] | None
    explain: Callable[[Any], str] | None
    seconds_before: float
    clock: Clock

    def __post_init__(self) -> None:
        check_kind("train", "module", self.module, nn.Module)
        check_count("train", "the number of stages", len(self.stages))
        for stage in self.stages:
            check_kind("train", "every entry of stages", stage, Stage)
        if not isinstance(self.batches, Iterable) or isinstance(self.batches, type):
            raise TypeError(
                "train: batches must be a list, a DataLoader or the like, got "
                f"{shown(self.batches)}."
            )
        wanted = "a function of nothing"
        check_callable("train", "validate", self.validate, wanted, count=0, optional=True)
        wanted = "a function of a batch"
        check_callable("train", "explain", self.explain, wanted, count=1, optional=True)
        check_budget("train", self.max_steps, self.max_seconds)
        check_count("train", "check_every", self.check_every)
        check_patience("train", self.patience)
        check_positive("train", "max_grad_norm", self.max_grad_norm, optional=True)
        wanted = "a decay from 0 to below 1, or None"
        check_number("train", "average", self.average, wanted, at_least=0, below=1, optional=True)
        check_flag("train", "raise_decay", self.raise_decay)
        check_flag("train", "draws", self.draws)
        check_running(
            "train", self.seed, self.progress, self.checkpoint, self.checkpoint_every, self.clock
        )
        check_number("train", "seconds_before", self.seconds_before, "a number >= 0", at_least=0)
        check_kind("train", "metric", self.metric, str)
        check_kind("train", "settings", self.settings, Mapping, optional=True)
        if self.max_steps is None and self.max_seconds is None:
            raise ValueError("train: there is no budget; give max_steps, max_seconds or both.")


def check_history(history: History) -> None:
    """Raises unless a history that was read can be one."""
    steps = len(history.losses)
    numbers = (history.losses, history.learning_rates, history.seconds, history.checked_values)
    counts = (history.checked_steps, history.skipped, history.overfits, [history.best_step])
    good = (
        len(history.learning_rates) == len(history.seconds) == steps
        and len(history.checked_steps) == len(history.checked_values)
        and all(isinstance(x, (int, float)) for xs in numbers for x in xs)
        and all(isinstance(i, int) and 0 <= i <= steps for xs in counts for i in xs)
        and isinstance(history.best_value, (int, float))
    )
    if not good:
        raise InvalidFile("train: the history of the checkpoint is none. Use another copy of it.")


def finite_mean(losses: list[float]) -> float:
    """The mean of the losses of the steps that were not skipped; NaN of none."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan
