"""The one training loop: every fit of the library runs through `train`."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

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
    check_seed,
    is_sequence,
    shown,
)
from pyro_nf._storage import InvalidFile, check_writable, plain, refuse_corrupt
from pyro_nf.train.budget import Budget, Clock, OutOfTime
from pyro_nf.train.checkpoint import TrainingState, load_state, save_state
from pyro_nf.train.digest import architecture, digest
from pyro_nf.train.modes import recording
from pyro_nf.train.randomness import own_randomness, random_state, set_random_state

MOST_BAD_STEPS = 10
"""So many steps in a row with a loss or gradient that is not finite end the fit."""

BAD_STEPS_BEFORE_RETREAT = 3
"""After so many the parameters go back to the last good state: skipping alone does not help."""

RETREAT = 0.5
"""Factor on the learning rate after each retreat."""

PATIENCE_GAIN = 1e-3
"""A metric, in nats, that is better by less does not renew the patience."""

OVERFIT_SHARE = 0.1
"""Share of the budget without a better metric after which a falling loss means overfitting."""

OVERFIT_LOSS = 0.03
"""A metric, in nats, that is worse by less is within the noise."""

DECAY_RISE = 4.0
"""Factor on the weight decay each time that the fit overfits."""

RAISED_DECAYS = (2.0, 30.0)
"""Less would not be felt by the weights, of which Adam lets none grow past 1 / decay; more would
leave nothing of them."""

LARGEST_SHARE = 0.5
"""A step under raised decay takes no larger share of a weight."""


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
    return torch.optim.AdamW(
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


class Minibatches:
    """Shuffled batches of the rows of some tensors, one pass over the rows after the other.

    The last rows of a pass that do not fill a batch are left out of that pass.

    Args:
        tensors: Tensors with the same number of rows; None stays None.
        batch_size: Rows in a batch; at most all of them.
        seed: Seed of the order, which is the batches' own: a resumed fit sees the same one.

    Raises:
        ValueError: If ``batch_size`` is not positive.

    Example:
        >>> batches = iter(Minibatches((torch.arange(6.0),), batch_size=2))
        >>> len({float(v) for _ in range(3) for v in next(batches)[0]})
        6
    """

    def __init__(self, tensors: Sequence[Tensor | None], batch_size: int, seed: int = 0) -> None:
        check_count("Minibatches", "batch_size", batch_size)
        check_seed("Minibatches", seed)
        check_listed("Minibatches", "tensors", tensors, "a tuple of tensors")
        self.tensors = tuple(tensors)
        for tensor in self.tensors:
            check_kind("Minibatches", "every entry of tensors", tensor, Tensor, optional=True)
        sizes = {tuple(t.shape[:1]) for t in self.tensors if t is not None}
        if len(sizes) != 1 or sizes & {(), (0,)}:
            shapes = [None if t is None else tuple(t.shape) for t in self.tensors]
            raise ValueError(
                f"Minibatches: tensors must have one number of rows, at least 1, got {shapes}."
            )
        self.rows = next(len(t) for t in self.tensors if t is not None)
        self.batch_size = min(batch_size, self.rows)
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor | None, ...]]:
        order = torch.randperm(self.rows, generator=self.generator)
        for i in range(0, self.rows - self.batch_size + 1, self.batch_size):
            rows = order[i : i + self.batch_size]
            yield tuple(None if t is None else t[rows.to(t.device)] for t in self.tensors)


def train(
    module: nn.Module,
    stages: Sequence[Stage] | Stage,
    *,
    batches: Iterable[Any] = (None,),
    validate: Callable[[], float] | None = None,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    check_every: int = 50,
    patience: float | None = None,
    max_grad_norm: float | None = 10.0,
    average: float | None = None,
    raise_decay: bool = False,
    seed: int | None = 0,
    draws: bool = True,
    progress: bool = True,
    metric: str = "loss",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    settings: Mapping[str, Any] | None = None,
    explain: Callable[[Any], str] | None = None,
    seconds_before: float = 0.0,
    clock: Clock = time.monotonic,
) -> History:
    r"""Minimise a loss, keep the best state, and leave the module in it.

    The progress that the schedules follow is
    :math:`\max(\text{step} / \text{max\_steps}, \text{seconds} / \text{max\_seconds})`, where
    the seconds are those of training. A step that would not end within ``max_seconds``, with a last
    check after it, is not begun; nor does a loss or a validation have to begin for which there is
    no time: it may raise :class:`~pyro_nf.train.budget.OutOfTime`. Every
    ``check_every`` steps the metric is taken: ``validate()`` in eval mode and without gradients, or
    else the mean loss since the last check. The best state is copied in memory and put back
    at the end, whatever ends the fit: the budget, patience, Ctrl-C or an error. A second Ctrl-C,
    while the first is attended to, is raised.

    With ``average``, what is checked, kept and left in the module is not the last state but a
    moving average of all, which is free of the noise of single steps; steps go on from the last:

    .. math:: \bar\theta_t = d_t \bar\theta_{t-1} + (1 - d_t) \theta_t, \qquad
        d_t = \min\left(\text{average}, \tfrac{1 + t}{10 + t}\right)

    *Acceleration of Stochastic Approximation by Averaging* (Polyak, Juditsky, 1992).

    With ``raise_decay`` the weight decay follows the validation. Where the metric has not improved
    for a tenth of the budget and is worse, although the loss is lower than it was at the best
    metric, the fit overfits: it goes back to its best state, and every decay that is not zero rises
    to four times itself, but to 2 at least and 30 at most, and half the inverse learning rate.

    A step whose loss or gradient is not finite is skipped. After three such steps in a row the
    parameters go back to the last good state and the learning rate is halved; after ten the fit
    ends with an error.

    Args:
        module: What is trained; its ``state_dict`` is what is kept and restored.
        stages: One stage, or several that run one after the other.
        batches: Gives the batches; it is started again when it is exhausted.
        validate: Returns the number that is to be small; it decides the best state.
        max_steps: The most steps.
        max_seconds: The most seconds of the clock, those before training and before a resume
            included.
        check_every: Steps between two checks.
        patience: Stop when the metric has not improved for so many steps (an int) or for this share
            of the budget (a float, for example 0.5); None for never.
        max_grad_norm: The norm that gradients are clipped to; None for no clipping.
        average: The decay of the moving average of the parameters, for example 0.99; None for none.
        raise_decay: Whether weight decay rises when the fit overfits, as ``validate`` tells.
        seed: Seed of the fit; None for a fresh one. The global generators are left as they were.
        draws: Whether losses, batches or ``validate`` draw from the global generators. If not,
            those are not touched, so that such fits can run beside each other in threads.
        progress: Whether to show a progress bar.
        metric: Name of the metric in the bar and in messages.
        checkpoint: A file for the state of the fit. If it exists the fit goes on from there, and
            with ``max_steps`` ends exactly as an uninterrupted one.
        checkpoint_every: Steps between two writes of it, rounded up to a check.
        settings: What must be the same when a fit is resumed; anything that JSON can hold. The
            seed, the classes of the module, and tensors that ``batches`` holds are compared anyway.
        explain: Takes the batch whose loss was not finite and says what may be wrong with it.
        seconds_before: Seconds of ``max_seconds`` that something else took before training.
        clock: Returns the seconds that ``max_seconds`` counts.

    Returns:
        The history.

    Raises:
        ValueError: If there is no budget, the checkpoint is of another fit, or the loss is not
            finite for ten steps in a row.
        OSError: If the checkpoint cannot be written.

    Example:
        >>> line = nn.Linear(1, 1)
        >>> x = torch.linspace(-1, 1, 32)[:, None]
        >>> stage = Stage(lambda _: (line(x) - 3 * x).square().mean(), adam(line.parameters(), 0.1))
        >>> history = train(line, stage, max_steps=200, progress=False)
        >>> history.stopped, round(line.weight.item(), 2)
        ('max_steps', 3.0)
    """
    check_kind("train", "module", module, nn.Module)
    if not isinstance(stages, Stage):
        check_listed("train", "stages", stages, "a Stage, or a list of them")
    stages = [stages] if isinstance(stages, Stage) else list(stages)
    check_count("train", "the number of stages", len(stages))
    for stage in stages:
        check_kind("train", "every entry of stages", stage, Stage)
    if not isinstance(batches, Iterable) or isinstance(batches, type):
        raise TypeError(
            f"train: batches must be a list, a DataLoader or the like, got {shown(batches)}."
        )
    check_callable("train", "validate", validate, "a function of nothing", count=0, optional=True)
    check_callable("train", "explain", explain, "a function of a batch", count=1, optional=True)
    check_budget("train", max_steps, max_seconds)
    check_count("train", "check_every", check_every)
    check_patience("train", patience)
    check_positive("train", "max_grad_norm", max_grad_norm, optional=True)
    wanted = "a decay from 0 to below 1, or None"
    check_number("train", "average", average, wanted, at_least=0, below=1, optional=True)
    check_flag("train", "raise_decay", raise_decay)
    check_flag("train", "draws", draws)
    check_running("train", seed, progress, checkpoint, checkpoint_every, clock)
    check_number("train", "seconds_before", seconds_before, "a number >= 0", at_least=0)
    check_kind("train", "metric", metric, str)
    check_kind("train", "settings", settings, Mapping, optional=True)
    if max_steps is None and max_seconds is None:
        raise ValueError("train: there is no budget; give max_steps, max_seconds or both.")
    if checkpoint is not None:
        check_writable(checkpoint)

    noted: dict[str, Any] = plain(dict(settings or {}), "settings") | {
        "seed": plain(seed, "seed"),
        "average": average,
        "raise_decay": raise_decay,
    }
    if checkpoint is not None:
        noted["network"] = architecture(module)
        if isinstance(batches, (Minibatches, list, tuple)):
            noted["batches"] = digest(
                [batches.tensors, batches.batch_size]
                if isinstance(batches, Minibatches)
                else batches
            )
    was_training = module.training
    run = _Run(module, stages, validate, metric, average, noted, explain, seed, draws)
    history = run.history
    history.seconds_before = seconds_before
    bar = tqdm(total=max_steps, disable=not progress, unit="step")
    try:
        run.budget = Budget(max_steps, max_seconds, clock, began=clock() - seconds_before)
        with recording("train"), run.randomness():
            if checkpoint is not None and os.path.exists(checkpoint):
                run.read(checkpoint)
            elif validate is not None:
                run.check()  # the start counts too: a fit never ends worse than it began
            bar.update(history.steps)
            written = history.steps
            source = islice(_again_and_again(batches), history.steps, None)
            history.stopped = ""
            module.train()
            while not (reason := run.out_of_budget() or run.out_of_patience(patience)):
                run.one_step(next(source), max_grad_norm)
                bar.update()
                if history.steps % check_every == 0:
                    run.check()
                    if raise_decay and run.overfits():
                        run.decay_more()
                    bar.set_postfix_str(f"{metric} {history.checked_values[-1]:.4f}", refresh=False)
                    if checkpoint is not None and history.steps >= written + checkpoint_every:
                        run.write(checkpoint)
                        written = history.steps
            history.stopped = reason
            if checkpoint is not None and history.steps > written:
                run.write(checkpoint)
            run.check()
    except OutOfTime:
        history.stopped = history.stopped or "max_seconds"
        run.last_check()
    except KeyboardInterrupt:
        history.stopped = "interrupted"
        run.last_check()
    finally:
        _load(module, run.best)
        module.train(was_training)
        bar.close()
    return history


class _Run:
    """What a fit holds beside the module: all that a checkpoint has to keep."""

    def __init__(
        self,
        module: nn.Module,
        stages: list[Stage],
        validate: Callable[[], float] | None,
        metric: str,
        average: float | None,
        settings: dict[str, Any],
        explain: Callable[[Any], str] | None,
        seed: int | None,
        draws: bool,
    ) -> None:
        self.seed, self.draws = seed, draws
        self.module, self.stages, self.validate = module, stages, validate
        self.budget = Budget()
        self.step_seconds = self.check_seconds = 0.0
        self.metric, self.settings, self.explain = metric, settings, explain
        self.history = History()
        self.best = _copy(module)
        self.average = None if average is None else _Average(module, average)
        self.rate_factor = 1.0
        self.bad_steps = 0
        self.full_rates = [[g["lr"] for g in stage.optimizer.param_groups] for stage in stages]
        ends = [sum(stage.share for stage in stages[: i + 1]) for i in range(len(stages))]
        self.ends = [end / ends[-1] for end in ends]

    def progress(self, step: int, seconds: float) -> float:
        """The share of the training that is done by a step or a second, whichever is later."""
        budget, before = self.budget, self.history.seconds_before
        by_steps = step / budget.max_steps if budget.max_steps else 0.0
        by_seconds = 0.0
        if budget.max_seconds is not None and budget.max_seconds > before:
            by_seconds = (seconds - before) / (budget.max_seconds - before)
        return min(1.0, max(by_steps, by_seconds))

    def out_of_budget(self) -> str:
        """Say whether another step, and a check after it, would not end in time, or nothing."""
        if self.budget.max_steps is not None and self.history.steps >= self.budget.max_steps:
            return "max_steps"
        left = self.budget.seconds_left if self.budget.has_seconds else math.inf
        return "" if left > self.step_seconds + self.check_seconds else "max_seconds"

    def randomness(self) -> AbstractContextManager[None]:
        """Random numbers of its own, if there is anything that draws."""
        return own_randomness(self.seed) if self.draws else nullcontext()

    def one_step(self, batch: Any, max_grad_norm: float | None) -> None:
        history = self.history
        step = history.steps
        began = self.budget.seconds
        progress = self.progress(step, began)
        i = min(sum(progress >= end for end in self.ends), len(self.stages) - 1)
        stage, optimizer = self.stages[i], self.stages[i].optimizer
        start = self.ends[i - 1] if i else 0.0
        factor = self.rate_factor * stage.schedule(
            step, (progress - start) / (self.ends[i] - start)
        )
        for group, rate in zip(optimizer.param_groups, self.full_rates[i], strict=True):
            group["lr"] = factor * rate

        optimizer.zero_grad()
        loss = stage.loss(batch)
        value = loss.item()
        good = math.isfinite(value)
        if good:
            loss.backward()
            if max_grad_norm is not None:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                good = bool(nn.utils.clip_grad_norm_(parameters, max_grad_norm).isfinite())
        if good:
            optimizer.step()
            self.bad_steps = 0
            if self.average is not None:
                self.average.update(step)
        else:
            self._skip(step, value, batch, optimizer)
        history.losses.append(value if good else math.nan)
        history.learning_rates.append(optimizer.param_groups[0]["lr"])
        history.seconds.append(self.budget.seconds)
        self.step_seconds = history.seconds[-1] - began

    def _skip(self, step: int, value: float, batch: Any, optimizer: Optimizer) -> None:
        self.history.skipped.append(step)
        self.bad_steps += 1
        if self.bad_steps == BAD_STEPS_BEFORE_RETREAT:
            self._go_back()
            optimizer.state.clear()
            self.rate_factor *= RETREAT
        if self.bad_steps == MOST_BAD_STEPS:
            what = "the gradient" if math.isfinite(value) else f"the {self.metric} ({value})"
            reason = f" {self.explain(batch)}" if self.explain is not None else ""
            raise ValueError(
                f"train: {what} is not finite at step {step}, for {MOST_BAD_STEPS} steps in a row."
                f"{reason} The state of step {self.history.best_step} was put back; look at "
                "the data and the model there, or lower the learning rate."
            )

    def _go_back(self) -> None:
        _load(self.module, self.best)
        if self.average is not None:
            self.average.restart()

    @property
    def is_checked(self) -> bool:
        """Whether the metric of the present step is known."""
        checked = self.history.checked_steps
        return bool(checked) and checked[-1] == self.history.steps

    def out_of_patience(self, patience: float | None) -> str:
        """Say whether the metric has not improved for too long, or nothing."""
        history = self.history
        if patience is None or not self.is_checked or history.steps == 0:
            return ""
        # The start does not count: a settled state is worse at first under a high learning rate.
        checks = zip(history.checked_values, history.checked_steps, strict=True)
        later = [(value, step) for value, step in checks if step > 0 and not math.isnan(value)]
        least = min((value for value, _ in later), default=math.nan)
        # what is gained by less than anybody can see is not worth waiting for
        best_step = next((step for value, step in later if value <= least + PATIENCE_GAIN), 1)
        if isinstance(patience, int):
            return "patience" if history.steps - best_step >= patience else ""
        return "patience" if self._share_since(best_step) >= patience else ""

    def _share_since(self, step: int) -> float:
        now = self.progress(self.history.steps, self.budget.seconds)
        return now - self.progress(step, self.history.seconds[step - 1])

    def overfits(self) -> bool:
        """Say whether the metric has become worse while the loss has become better."""
        steps, values = self.history.checked_steps, self.history.checked_values
        # As for patience, the start does not count.
        later = [i for i in range(1, len(steps)) if not math.isnan(values[i])]
        if not later:
            return False
        best = min(later, key=values.__getitem__)
        since = max([steps[best], *self.history.overfits[-1:]])
        return (
            self._share_since(since) >= OVERFIT_SHARE
            and values[-1] > values[best] + OVERFIT_LOSS
            and self._loss_before(-1) < self._loss_before(best)
        )

    def _loss_before(self, i: int) -> float:
        """Mean loss between the check before the i-th and the i-th."""
        steps = self.history.checked_steps
        losses = self.history.losses[steps[i - 1] : steps[i]]
        finite = [loss for loss in losses if math.isfinite(loss)]
        return sum(finite) / len(finite) if finite else math.nan

    def decay_more(self) -> None:
        """Go back to the best state under more weight decay, if it can rise."""
        if self._raise_decays():
            self._go_back()
            self.history.overfits.append(self.history.steps)

    def _raise_decays(self) -> bool:
        """Raise what decays, and say whether anything has risen."""
        least, most = RAISED_DECAYS
        groups = [group for stage in self.stages for group in stage.optimizer.param_groups]
        rates = [rate for rates in self.full_rates for rate in rates]
        risen = False
        for group, rate in zip(groups, rates, strict=True):
            decay = group["weight_decay"]
            if decay > 0 and rate > 0:
                higher = min(max(DECAY_RISE * decay, least), most, LARGEST_SHARE / rate)
                group["weight_decay"] = max(decay, higher)
                risen |= higher > decay
        return risen

    def check(self) -> None:
        """Take the metric, and keep the state if it is the best so far."""
        if self.is_checked:
            return
        began = self.budget.seconds
        with nullcontext() if self.average is None else self.average.in_place():
            self._check()
        self.check_seconds = self.budget.seconds - began

    def last_check(self) -> None:
        """Keep what was learned since the last check if it is better."""
        if self.history.steps > 0:
            with recording("train"), self.randomness(), suppress(OutOfTime):
                self.check()

    def _check(self) -> None:
        history = self.history
        if self.validate is not None:
            self.module.eval()
            with torch.no_grad():
                value = self.validate()
            self.module.train()
        else:
            since = history.checked_steps[-1] if history.checked_steps else 0
            finite = [loss for loss in history.losses[since:] if math.isfinite(loss)]
            value = sum(finite) / len(finite) if finite else math.nan
        history.checked_steps.append(history.steps)
        history.checked_values.append(value)
        if value < history.best_value:
            history.best_value, history.best_step = value, history.steps
            self.best = _copy(self.module)

    def write(self, path: str | os.PathLike[str]) -> None:
        generators, generator_values = random_state()
        state = TrainingState(
            module=_copy(self.module),
            best=self.best,
            average={} if self.average is None else self.average.values,
            optimizers=[stage.optimizer.state_dict()["state"] for stage in self.stages],
            generators=generators,
            values={
                "history": asdict(self.history),
                "rate_factor": self.rate_factor,
                "bad_steps": self.bad_steps,
                "memories": [stage.memory for stage in self.stages],
                "generators": generator_values,
                "settings": self.settings,
            },
        )
        try:
            save_state(path, state)
        except OSError as error:  # a full disk must not cost the hours that are in memory
            warnings.warn(f"train: the fit goes on without this checkpoint. {error}", stacklevel=3)

    def read(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint."""
        state = load_state(path, _copy(self.module), self.settings)
        with refuse_corrupt(path):
            self._take(state)

    def _take(self, state: TrainingState) -> None:
        self.best = state.best
        _load(self.module, state.module)
        if self.average is not None:
            self.average.values = state.average
        for stage, saved in zip(self.stages, state.optimizers, strict=True):
            groups = stage.optimizer.state_dict()["param_groups"]
            stage.optimizer.load_state_dict({"state": saved, "param_groups": groups})
        values = state.values
        history = History(**values["history"])
        _check_history(history)
        before = self.budget.seconds + (history.seconds[-1] if history.seconds else 0.0)
        self.budget = replace(self.budget, began=self.budget.clock() - before)
        self.history.__dict__.update(vars(history))
        for _ in self.history.overfits:
            self._raise_decays()
        self.rate_factor, self.bad_steps = values["rate_factor"], values["bad_steps"]
        for stage, memory in zip(self.stages, values["memories"], strict=True):
            stage.memory.update(memory)
        if self.draws:
            set_random_state(state.generators, values["generators"])


class _Average:
    """A moving average of the parameters that are trained."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.restart()

    def restart(self) -> None:
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    def update(self, step: int) -> None:
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


def _check_history(history: History) -> None:
    """Raise unless a history that was read can be one."""
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


def _again_and_again(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        count = 0
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            yield batch
        if count == 0:
            raise ValueError(
                "train: batches gave no batch. Give an iterable that can be started again "
                "(a list, a DataLoader), not an iterator that ends."
            )


def _copy(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {name: value.detach().clone() for name, value in state.items() if torch.is_tensor(value)}


def _load(module: nn.Module, state: dict[str, Tensor]) -> None:
    module.load_state_dict(state, strict=False)
