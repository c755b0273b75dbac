"""The one training loop: every fit of the library runs through `train`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from tqdm import tqdm

from pyro_nf._checks import check_listed
from pyro_nf._storage import check_writable
from pyro_nf.train.batches import Minibatches
from pyro_nf.train.budget import Clock, OutOfTime
from pyro_nf.train.modes import recording
from pyro_nf.train.run import Run
from pyro_nf.train.saved.checkpoint import put_into
from pyro_nf.train.stages import History, Plan, Stage, adam, warm_cosine
from pyro_nf.train.world import PeerLost, World

__all__ = ["History", "Minibatches", "Stage", "adam", "train", "warm_cosine"]


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

    Where ``torch.distributed`` is initialised, all its processes must call this alike, and fit
    together: each takes its part of the rows of every batch, gradients are averaged by
    ``DistributedDataParallel``, and so are losses, which should be means over rows, and what
    ``validate`` returns. So parameters are the same in all. Batches that differ between the
    processes, as those of a ``DistributedSampler``, are taken whole. What one process meets, a loss
    that is not finite, an error, Ctrl-C, the end of the time, is a verdict for all. The first one
    shows the progress and writes checkpoints; the others read through it. Where a process is lost
    the others end with an error, and the first one writes a checkpoint before. A signal to
    terminate ends the fit as Ctrl-C does, then the process. One fit at a time runs so.

    A step whose loss or gradient is not finite is skipped. After three such steps in a row the
    parameters go back to the last good state and the learning rate is halved; after ten the fit
    ends with an error.

    Args:
        module: What is trained; its ``state_dict`` is what is kept and restored.
        stages: One stage, or several that run one after the other.
        batches: Gives the batches; it is started again when it is exhausted. What it draws from the
            global generators, as a ``DataLoader`` does to shuffle, depends on the seed alone.
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
        RuntimeError: If another process failed, or is lost.
        ValueError: If there is no budget, the checkpoint is of another fit, or the loss is not
            finite for ten steps in a row.
        OSError: If the checkpoint cannot be written.

    Example:
        >>> import torch
        >>> line = nn.Linear(1, 1)
        >>> x = torch.linspace(-1, 1, 32)[:, None]
        >>> stage = Stage(lambda _: (line(x) - 3 * x).square().mean(), adam(line.parameters(), 0.1))
        >>> history = train(line, stage, max_steps=200, progress=False)
        >>> history.stopped, round(line.weight.item(), 2)
        ('max_steps', 3.0)
    """
    if not isinstance(stages, Stage):
        check_listed("train", "stages", stages, "a Stage, or a list of them")
    plan = Plan(
        module=module,
        stages=[stages] if isinstance(stages, Stage) else list(stages),
        batches=batches,
        validate=validate,
        max_steps=max_steps,
        max_seconds=max_seconds,
        check_every=check_every,
        patience=patience,
        max_grad_norm=max_grad_norm,
        average=average,
        raise_decay=raise_decay,
        seed=seed,
        draws=draws,
        progress=progress,
        metric=metric,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        settings=settings,
        explain=explain,
        seconds_before=seconds_before,
        clock=clock,
    )
    with World.joined() as world:
        return _train(plan, world)


def _train(plan: Plan, world: World) -> History:
    """The fit, whatever ends it."""
    if plan.checkpoint is not None:
        path = plan.checkpoint
        world.share(lambda: check_writable(path))
    module, was_training = plan.module, plan.module.training
    run = Run(plan, world)
    history = run.history
    bar = tqdm(total=plan.max_steps, disable=not (plan.progress and world.is_first), unit="step")
    try:
        with recording("train"), run.randomness():
            _steps(run, bar)
    except OutOfTime:
        history.stopped = history.stopped or "max_seconds"
        run.last_check()
    except KeyboardInterrupt:
        history.stopped = "interrupted"
        run.last_check()
    except PeerLost as lost:
        raise PeerLost(f"{lost} {_rescued(run)}") from lost
    finally:
        put_into(module, run.best)
        module.train(was_training)
        run.close()
        bar.close()
    return history


def _steps(run: Run, bar: tqdm[Any]) -> None:
    """Take steps until the budget or the patience ends, checking and writing in between."""
    plan, history = run.plan, run.history
    run.start_clock()
    has_read = plan.checkpoint is not None and run.read(plan.checkpoint)
    if not has_read and plan.validate is not None:
        run.check()  # the start counts too: a fit never ends worse than it began
    bar.update(history.steps)
    written = history.steps
    run.begin()
    history.stopped = ""
    plan.module.train()
    while not (reason := run.out_of_budget() or run.out_of_patience()):
        run.one_step()
        bar.update()
        if history.steps % plan.check_every == 0:
            run.check()
            if plan.raise_decay and run.overfits():
                run.decay_more()
            shown = f"{plan.metric} {history.checked_values[-1]:.4f}"
            bar.set_postfix_str(shown, refresh=False)
            if plan.checkpoint is not None and history.steps >= written + plan.checkpoint_every:
                run.write(plan.checkpoint)
                written = history.steps
    history.stopped = reason
    if plan.checkpoint is not None and history.steps > written:
        run.write(plan.checkpoint)
    run.check()


def _rescued(run: Run) -> str:
    """What is kept of a fit that has lost one of its processes."""
    path, history = run.plan.checkpoint, run.history
    if path is None:
        return "The state of the best step was put back; with a checkpoint the fit could go on."
    if run.world.is_first:
        history.seconds += history.seconds[-1:] * (history.steps - len(history.seconds))
        run.write(path, is_alone=True)
    return f"The checkpoint {str(path)!r} keeps what was learned: start all again to go on from it."
