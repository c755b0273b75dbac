"""A fit under way: one step, one check, one checkpoint, and what has to be kept for them."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_nf._checks import seed_or_fresh
from pyro_nf._storage import plain, refuse_corrupt
from pyro_nf.train.batches import Minibatches, part_of, passes
from pyro_nf.train.budget import Budget, OutOfTime
from pyro_nf.train.modes import recording
from pyro_nf.train.randomness import (
    Stream,
    joined_states,
    own_randomness,
    random_state,
    set_random_state,
    set_seed,
    state_of_rank,
)
from pyro_nf.train.saved.checkpoint import (
    TrainingState,
    copied,
    load_state,
    put_into,
    save_state,
)
from pyro_nf.train.saved.digest import architecture, digest
from pyro_nf.train.stages import Average, History, Plan, check_history, finite_mean
from pyro_nf.train.world import World

MOST_BAD_STEPS = 10
"""So many steps in a row with a loss or gradient that is not finite end the fit."""

BAD_STEPS_BEFORE_RETREAT = 3
"""After so many the parameters go back to the last good state: skipping alone does not help."""

BATCHES_SEED = 7_919
"""Added to the seed for what batches draw."""

OVERFIT_SHARE = 0.1
"""Share of the budget without a better metric after which a falling loss means overfitting."""

RETREAT = 0.5
"""Factor on the learning rate after each retreat."""

DECAY_RISE = 4.0
"""Factor on the weight decay each time that the fit overfits."""

RAISED_DECAYS = (2.0, 30.0)
"""Less would not be felt by the weights, of which Adam lets none grow past 1 / decay; more would
leave nothing of them."""

LARGEST_SHARE = 0.5
"""A step under raised decay takes no larger share of a weight."""


class NotFinite(Exception):
    """The loss or the gradient of a step is not finite, in this process or in another.

    Args:
        what: What is not finite.
    """

    def __init__(self, what: str) -> None:
        self.what = what


class Run:
    """What a fit holds beside the module: all that a checkpoint has to keep.

    Args:
        plan: What was asked for.
        world: The processes that take part.
    """

    def __init__(self, plan: Plan, world: World) -> None:
        self.world, self.module, self.stages = world, plan.module, plan.stages
        self.settings = self._settings(plan)
        seed, before = plan.seed, plan.seconds_before
        if world.size > 1:
            # where the processes were given different things, those of the first count
            seed, before, steps, seconds, state = world.share(
                lambda: (
                    seed_or_fresh("train", seed),
                    before,
                    plan.max_steps,
                    plan.max_seconds,
                    copied(self.module, "cpu"),
                )
            )
            plan = replace(plan, seed=seed, max_steps=steps, max_seconds=seconds)
            put_into(self.module, state)
        self.plan, self.budget = plan, Budget()
        self.history = History(seconds_before=before)
        self.step_seconds = self.check_seconds = 0.0
        self.best = copied(self.module)
        self.average = None if plan.average is None else Average(self.module, plan.average)
        self.rate_factor, self.bad_steps = 1.0, 0
        optimizers = [stage.optimizer for stage in self.stages]
        self.full_rates = [[g["lr"] for g in optimizer.param_groups] for optimizer in optimizers]
        ends = [sum(stage.share for stage in self.stages[: i + 1]) for i in range(len(optimizers))]
        self.ends = [end / ends[-1] for end in ends]
        learned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        self.loss = world.parallel(self._loss, learned)
        self.batch: Any = None
        self.value = math.nan
        self.are_batches_shared = False
        self.source: Iterator[Any] = iter(())

    def start_clock(self) -> None:
        """From now on seconds count."""
        plan = self.plan
        clock = plan.clock if plan.max_seconds is None else self.world.clock(plan.clock)
        began = clock() - self.history.seconds_before
        self.budget = Budget(plan.max_steps, plan.max_seconds, clock, began)

    def close(self) -> None:
        """Let go of what averages gradients, which is tied to the parameters."""
        del self.loss

    # ---- what decides how it goes on

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

    def out_of_patience(self) -> str:
        """Say whether the metric has not improved for too long, or nothing."""
        patience = self.plan.patience
        if patience is None or not self.is_checked or self.history.steps == 0:
            return ""
        step = self.history.last_gain()
        if isinstance(patience, int):
            return "patience" if self.history.steps - step >= patience else ""
        return "patience" if self._share_since(step) >= patience else ""

    def _share_since(self, step: int) -> float:
        now = self.progress(self.history.steps, self.budget.seconds)
        return now - self.progress(step, self.history.seconds[step - 1])

    def randomness(self) -> AbstractContextManager[None]:
        """Random numbers of its own, if there is anything that draws."""
        if not self.plan.draws:
            return nullcontext()
        seed = self.plan.seed
        return own_randomness(None if seed is None else self.world.seed(seed))

    # ---- one step

    def begin(self) -> None:
        """Begin the batches, where a fit that goes on from a checkpoint had come to."""
        plan, world = self.plan, self.world
        around: Callable[[], AbstractContextManager[None]] = nullcontext
        if plan.draws and not isinstance(plan.batches, (Minibatches, list, tuple)):
            # the same order in all processes, and after a resume
            seed = seed_or_fresh("train", plan.seed)
            around = Stream((seed + BATCHES_SEED) % 2**63).entered
        self.source = islice(passes(plan.batches, around), self.history.steps, None)
        if world.size > 1:
            first = world.together(lambda: next(self.source))
            self.are_batches_shared = len(set(world.gather(digest(first)))) == 1
            self.source = chain([first], self.source)

    def one_step(self) -> None:
        """Take the next batch and a step by its gradient, or skip it."""
        history, step, began = self.history, self.history.steps, self.budget.seconds
        i = self._set_rates(step, began)
        optimizer = self.stages[i].optimizer
        optimizer.zero_grad()
        try:
            loss = self.loss(i)
            self.world.backward(loss)
            self._clip(optimizer)
        except NotFinite as bad:
            self._skip(step, bad.what, optimizer)
            history.losses.append(math.nan)
        else:
            optimizer.step()
            self.bad_steps = 0
            if self.average is not None:
                self.average.update(step)
            history.losses.append(self.value)
        history.learning_rates.append(optimizer.param_groups[0]["lr"])
        history.seconds.append(self.budget.seconds)
        self.step_seconds = history.seconds[-1] - began

    def _set_rates(self, step: int, seconds: float) -> int:
        """Set the learning rates of the stage that it is time for, and return its number."""
        progress = self.progress(step, seconds)
        i = min(sum(progress >= end for end in self.ends), len(self.stages) - 1)
        start = self.ends[i - 1] if i else 0.0
        schedule, groups = self.stages[i].schedule, self.stages[i].optimizer.param_groups
        factor = self.rate_factor * schedule(step, (progress - start) / (self.ends[i] - start))
        for group, rate in zip(groups, self.full_rates[i], strict=True):
            group["lr"] = factor * rate
        return i

    def _loss(self, i: int) -> Tensor:
        """The loss of the i-th stage on this process's part of the next batch.

        Raises:
            NotFinite: If it is not finite in some process.
        """

        def of_this_process() -> tuple[tuple[Tensor, float], tuple[float, float]]:
            self.batch, weight = next(self.source), 1.0
            if self.are_batches_shared:
                self.batch, weight = part_of(self.batch, self.world.rank, self.world.size)
            loss = self.stages[i].loss(self.batch)
            loss = loss if weight == 1 else weight * loss
            value = loss.item()
            is_bad = not math.isfinite(value)
            return (loss, value), (0.0 if is_bad else value, float(is_bad))

        (loss, value), (total, count_bad) = self.world.counted(of_this_process, 2)
        if count_bad:
            metric = self.plan.metric
            is_here = not math.isfinite(value)
            raise NotFinite(f"the {metric} ({value})" if is_here else f"another process's {metric}")
        self.value = total / self.world.size
        return loss

    def _clip(self, optimizer: Optimizer) -> None:
        """Clip the gradient, which is the same in all processes."""
        if self.plan.max_grad_norm is None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.plan.max_grad_norm)
        if not bool(norm.isfinite()):
            raise NotFinite("the gradient")

    def _skip(self, step: int, what: str, optimizer: Optimizer) -> None:
        self.history.skipped.append(step)
        self.bad_steps += 1
        if self.bad_steps == BAD_STEPS_BEFORE_RETREAT:
            self._go_back()
            optimizer.state.clear()
            self.rate_factor *= RETREAT
        if self.bad_steps == MOST_BAD_STEPS:
            reason = f" {self.plan.explain(self.batch)}" if self.plan.explain is not None else ""
            raise ValueError(
                f"train: {what} is not finite at step {step}, for {MOST_BAD_STEPS} steps in a row."
                f"{reason} The state of step {self.history.best_step} was put back; look at "
                "the data and the model there, or lower the learning rate."
            )

    def _go_back(self) -> None:
        put_into(self.module, self.best)
        if self.average is not None:
            self.average.restart()

    # ---- overfitting

    def overfits(self) -> bool:
        """Say whether the metric has become worse while the loss has become better."""
        best = self.history.overfits_since()
        return best is not None and self._share_since(best) >= OVERFIT_SHARE

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

    # ---- checks

    @property
    def is_checked(self) -> bool:
        """Whether the metric of the present step is known."""
        checked = self.history.checked_steps
        return bool(checked) and checked[-1] == self.history.steps

    def check(self) -> None:
        """Take the metric, and keep the state if it is the best so far."""
        if self.is_checked:
            return
        began = self.budget.seconds
        # parameters are the same in all processes, what a layer counts for itself is not
        self.world.same_as_first(self.module.buffers())
        with nullcontext() if self.average is None else self.average.in_place():
            self._check()
        self.check_seconds = self.budget.seconds - began

    def last_check(self) -> None:
        """Keep what was learned since the last check if it is better."""
        if self.history.steps > 0:
            with recording("train"), self.randomness(), suppress(OutOfTime):
                self.check()

    def _check(self) -> None:
        history, validate = self.history, self.plan.validate
        if validate is not None:
            self.module.eval()
            with torch.no_grad():
                value = self.world.mean(self.world.together(validate))
            self.module.train()
        else:
            since = history.checked_steps[-1] if history.checked_steps else 0
            value = finite_mean(history.losses[since:])
        history.checked_steps.append(history.steps)
        history.checked_values.append(value)
        if value < history.best_value:
            history.best_value, history.best_step = value, history.steps
            self.best = copied(self.module)

    # ---- checkpoints

    @staticmethod
    def _settings(plan: Plan) -> dict[str, Any]:
        """What must be the same when the fit is resumed."""
        batches = plan.batches
        noted: dict[str, Any] = plain(dict(plan.settings or {}), "settings") | {
            "seed": plain(plan.seed, "seed"),
            "average": plan.average,
            "raise_decay": plan.raise_decay,
        }
        if plan.checkpoint is not None:
            noted["network"] = architecture(plan.module)
            if isinstance(batches, Minibatches):
                noted["batches"] = digest([batches.tensors, batches.batch_size])
            elif isinstance(batches, (list, tuple)):
                noted["batches"] = digest(batches)
        return noted

    def write(self, path: str | os.PathLike[str], is_alone: bool = False) -> None:
        """Write a checkpoint.

        Args:
            path: The file.
            is_alone: Whether the other processes are gone.
        """
        memories = [stage.memory for stage in self.stages]
        mine = random_state(), memories
        of_all = [mine] if is_alone else self.world.gather(mine)
        if not self.world.is_first:
            return
        generators, generator_values = joined_states([state for state, _ in of_all])
        state = TrainingState(
            module=copied(self.module),
            best=self.best,
            average={} if self.average is None else self.average.values,
            optimizers=[stage.optimizer.state_dict()["state"] for stage in self.stages],
            generators=generators,
            values=generator_values
            | {
                "history": asdict(self.history),
                "rate_factor": self.rate_factor,
                "bad_steps": self.bad_steps,
                "memories": memories,
                "memories_of_others": [memories for _, memories in of_all[1:]],
                "settings": self.settings,
            },
        )
        try:
            save_state(path, state)
        except OSError as error:  # a full disk must not cost the hours that are in memory
            warnings.warn(f"train: the fit goes on without this checkpoint. {error}", stacklevel=3)

    def read(self, path: str | os.PathLike[str]) -> bool:
        """Go on from a checkpoint, if there is one."""
        load = partial(load_state, path, copied(self.module, "cpu"), self.settings)
        state = self.world.share(lambda: load() if os.path.exists(path) else None)
        if state is not None:
            with refuse_corrupt(path):
                self._take(state)
        return state is not None

    def _take(self, state: TrainingState) -> None:
        self.best = state.best
        put_into(self.module, state.module)
        if self.average is not None:
            self.average.take(state.average)
        for stage, saved in zip(self.stages, state.optimizers, strict=True):
            groups = stage.optimizer.state_dict()["param_groups"]
            stage.optimizer.load_state_dict({"state": saved, "param_groups": groups})
        values = state.values
        history = History(**values["history"])
        check_history(history)
        before = self.budget.seconds + (history.seconds[-1] if history.seconds else 0.0)
        self.budget = replace(self.budget, began=self.budget.clock() - before)
        self.history.__dict__.update(vars(history))
        for _ in self.history.overfits:
            self._raise_decays()
        self.rate_factor, self.bad_steps = values["rate_factor"], values["bad_steps"]
        of_all = [values["memories"], *values.get("memories_of_others", [])]
        mine = of_all[self.world.rank if self.world.rank < len(of_all) else 0]
        for stage, memory in zip(self.stages, mine, strict=True):
            stage.memory.update(memory)
        if self.plan.draws:
            self._take_randomness(state)

    def _take_randomness(self, state: TrainingState) -> None:
        mine = state_of_rank(self.world.rank, state.generators, state.values)
        if mine is not None:
            set_random_state(*mine)
        else:  # there were fewer processes then: numbers that none has drawn yet
            set_seed(self.world.seed(self.plan.seed or 0) + self.history.steps + 1)
