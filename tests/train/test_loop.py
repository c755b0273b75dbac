"""The training loop: budgets, the best state, resuming, interruption, bad losses."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyro_nf.train.batches import Minibatches
from pyro_nf.train.loop import train
from pyro_nf.train.stages import Stage, adam, warm_cosine


class Quadratic(nn.Module):
    """Has its minimum where ``w`` is 3; its loss draws noise, and can be told to misbehave."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4))
        self.calls = 0

    def loss(self, batch: Tensor | None) -> Tensor:
        self.calls += 1
        noise = 0.1 * torch.randn(4)
        target = 3.0 if batch is None else 3.0 + batch.mean()
        return (self.w - target - noise).square().sum()


def stage(module: Quadratic, rate: float = 0.1) -> Stage:
    return Stage(module.loss, adam(module.parameters(), rate))


def fit(module: Quadratic, **options: object):
    options = {"max_steps": 200, "progress": False, "check_every": 10} | options
    return train(module, stage(module), **options)


def test_reaches_the_minimum_and_says_why_it_stopped():
    module = Quadratic()
    history = fit(module)
    torch.testing.assert_close(module.w.detach(), torch.full((4,), 3.0), atol=0.05, rtol=0)
    assert history.stopped == "max_steps"
    assert history.steps == len(history.losses) == len(history.seconds) == 200
    assert history.checked_steps == list(range(10, 201, 10))


def test_seconds_end_a_fit_and_drive_the_schedule():
    now = iter(range(100_000))
    module = Quadratic()
    history = fit(module, max_steps=None, max_seconds=300.0, clock=lambda: float(next(now)))
    assert history.stopped == "max_seconds"
    assert history.seconds[-1] >= 290
    assert history.learning_rates[-1] < 0.01 * max(history.learning_rates)


def test_schedule_warms_up_and_follows_the_further_of_steps_and_seconds():
    module = Quadratic()
    history = fit(module, max_steps=100, max_seconds=1e6)
    rates = torch.tensor(history.learning_rates) / 0.1
    expected = torch.tensor([warm_cosine(20)(i, i / 100) for i in range(100)])
    torch.testing.assert_close(rates, expected, atol=1e-5, rtol=1e-5)


def test_best_state_on_validation_is_kept():
    module = Quadratic()
    values = iter([5.0, 4.0, 1.0, 2.0, 3.0] + [9.0] * 100)
    seen: list[Tensor] = []

    def validate() -> float:
        assert not module.training
        assert not torch.is_grad_enabled()
        seen.append(module.w.detach().clone())
        return next(values)

    history = fit(module, validate=validate)
    assert history.best_step == 20
    assert history.best_value == 1.0
    assert torch.equal(module.w.detach(), seen[2])
    assert not torch.equal(module.w.detach(), seen[-1])
    assert module.training


def test_a_fit_never_ends_worse_than_it_began():
    module = Quadratic()
    values = iter([0.0] + [1.0] * 100)
    fit(module, validate=lambda: next(values))
    assert torch.equal(module.w.detach(), torch.zeros(4))


@pytest.mark.parametrize("patience", [0.25, 50])
def test_patience_is_a_share_of_the_budget_or_steps(patience):
    values = iter([0.5, 1.0] + [2.0] * 100)  # the start does not count
    history = fit(Quadratic(), validate=lambda: next(values), patience=patience)
    assert history.stopped == "patience"
    assert history.steps == 10 + 50


def test_the_average_is_checked_and_kept_while_steps_go_on_from_the_last_state():
    def states(average: float | None) -> tuple[list[Tensor], list[float], Tensor]:
        module, seen = Quadratic(), []

        def validate() -> float:
            seen.append(module.w.detach().clone())
            return -len(seen)  # the last is the best

        history = fit(module, max_steps=40, check_every=1, validate=validate, average=average)
        return seen, history.losses, module.w.detach()

    last, losses, _ = states(None)
    averages, same_losses, kept = states(0.9)
    assert same_losses == losses
    assert torch.equal(kept, averages[-1])
    expected = last[0]
    for t, (state, average) in enumerate(zip(last[1:], averages[1:], strict=True)):
        decay = min(0.9, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * state
        torch.testing.assert_close(average, expected)


@pytest.mark.parametrize("average", [None, 0.9])
@pytest.mark.parametrize("interrupted_at", [0, 3, 57])
def test_ctrl_c_keeps_the_best_state_and_returns(interrupted_at, average):
    module = Quadratic()
    plain = module.loss

    def loss(batch: Tensor | None) -> Tensor:
        if module.calls == interrupted_at:
            raise KeyboardInterrupt
        return plain(batch)

    history = train(
        module,
        Stage(loss, adam(module.parameters(), 0.1)),
        max_steps=200,
        validate=lambda: (module.w.detach() - 3).square().sum().item(),
        check_every=10,
        average=average,
        progress=False,
    )
    assert history.stopped == "interrupted"
    assert history.steps == interrupted_at
    if interrupted_at:
        assert history.best_step == interrupted_at  # what came after the last check is kept too
        assert (module.w.detach() > 0).all()


@pytest.mark.parametrize("average", [None, 0.95])
def test_resumed_fit_is_bitwise_the_uninterrupted_one(tmp_path, average):
    data = torch.randn(50, 1, generator=torch.Generator().manual_seed(1))

    def run(stop_at: int | None, checkpoint):
        module = Quadratic()
        plain = module.loss

        def loss(batch: tuple[Tensor]) -> Tensor:
            if module.calls == stop_at:
                raise KeyboardInterrupt
            return plain(batch[0])

        history = train(
            module,
            [
                Stage(loss, adam(module.parameters(), 0.1), share=0.25),
                Stage(loss, adam(module.parameters(), 0.05)),
            ],
            batches=Minibatches((data,), 8),
            max_steps=120,
            check_every=10,
            average=average,
            checkpoint=checkpoint,
            checkpoint_every=20,
            progress=False,
        )
        return module.w.detach().clone(), history

    whole_w, whole = run(None, None)
    _, first = run(75, tmp_path / "fit.safetensors")
    assert first.stopped == "interrupted"
    torch.randn(17)
    resumed_w, resumed = run(None, tmp_path / "fit.safetensors")
    assert torch.equal(whole_w, resumed_w)
    assert resumed.losses == whole.losses
    assert resumed.checked_values == whole.checked_values
    assert resumed.learning_rates == whole.learning_rates
    assert (resumed.best_step, resumed.best_value) == (whole.best_step, whole.best_value)


def test_global_generators_are_left_alone_and_the_seed_decides():
    def draws() -> tuple[Tensor, float, float]:
        return torch.randn(3), np.random.rand(), random.random()  # noqa: NPY002

    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    without = draws()
    results = []
    for seed, before in ((0, 11), (0, 12), (1, 13)):
        torch.manual_seed(before)
        results.append(fit(Quadratic(), seed=seed).losses)
    assert results[0] == results[1] != results[2]
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    fit(Quadratic(), max_steps=20)
    after = draws()
    assert torch.equal(without[0], after[0])
    assert without[1:] == after[1:]


def misbehaving(module: Quadratic, bad_calls: range, value: float = math.nan) -> Stage:
    plain = module.loss

    def loss(batch: Tensor | None) -> Tensor:
        result = plain(batch)
        return result * value if module.calls in bad_calls else result

    return Stage(loss, adam(module.parameters(), 0.1))


@pytest.mark.parametrize("average", [None, 0.9])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_few_bad_steps_are_skipped(value, average):
    module = Quadratic()
    history = train(
        module,
        misbehaving(module, range(50, 55), value),
        max_steps=300,
        average=average,
        progress=False,
    )
    assert history.skipped == [49, 50, 51, 52, 53]
    assert all(math.isnan(history.losses[i]) for i in history.skipped)
    assert history.learning_rates[60] < 0.06  # backed off
    torch.testing.assert_close(module.w.detach(), torch.full((4,), 3.0), atol=0.1, rtol=0)


def test_many_bad_steps_end_the_fit_with_step_and_reason_and_the_last_good_state():
    module = Quadratic()
    with pytest.raises(ValueError, match=r"nan.*step 89, for 10 steps.*site 'theta'.*step 80 was"):
        train(
            module,
            misbehaving(module, range(81, 10_000)),
            max_steps=300,
            check_every=40,
            progress=False,
            explain=lambda batch: "It comes from site 'theta'.",
        )
    assert module.w.isfinite().all()
    assert (module.w > 1).all()


def test_a_gradient_that_is_not_finite_is_skipped_too():
    module = Quadratic()

    def loss(_: object) -> Tensor:
        module.calls += 1
        zero = torch.zeros_like(module.w) * module.w.detach()
        bad = (module.w * zero).sum().sqrt() if module.calls == 5 else 0.0  # 0 with gradient nan
        return (module.w - 3).square().sum() + bad

    history = train(
        module, Stage(loss, adam(module.parameters(), 0.1)), max_steps=20, progress=False
    )
    assert history.skipped == [4]
    assert module.w.isfinite().all()


def test_another_error_puts_the_best_state_back():
    module = Quadratic()
    plain = module.loss

    def loss(batch: Tensor | None) -> Tensor:
        if module.calls == 35:
            module.w.data.fill_(math.nan)
            raise RuntimeError("the model failed")
        return plain(batch)

    with pytest.raises(RuntimeError, match="the model failed"):
        train(
            module,
            Stage(loss, adam(module.parameters(), 0.1)),
            max_steps=99,
            check_every=10,
            progress=False,
        )
    assert module.w.isfinite().all()
    assert (module.w > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": None}, "no budget"),
        ({"max_steps": 0}, "max_steps must"),
        ({"max_seconds": -1.0}, "max_seconds must"),
        ({"check_every": 0}, "check_every must"),
        ({"average": 1.0}, "average must"),
        ({"batches": []}, "gave no batch"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        fit(Quadratic(), **options)


def test_minibatches_visit_every_row_once_a_pass():
    batches = Minibatches((torch.arange(10), None), 5)
    first = [batch[0] for batch in batches]
    assert torch.cat(first).sort().values.tolist() == list(range(10))
    assert next(iter(batches))[1] is None
    assert torch.cat([batch[0] for batch in batches]).tolist() != torch.cat(first).tolist()
    with pytest.raises(ValueError, match="batch_size must"):
        Minibatches((torch.arange(3),), 0)


def test_progress_bar_shows_the_metric(capsys):
    fit(Quadratic(), progress=True, metric="-ELBO")
    assert "-ELBO" in capsys.readouterr().err


def test_gains_that_nobody_sees_do_not_renew_patience() -> None:
    module = nn.Linear(1, 1)
    values = iter(1 - 1e-6 * i for i in range(10_000))
    history = train(
        module,
        Stage(lambda _: module.weight.square().sum(), adam(module.parameters())),
        validate=lambda: next(values),
        max_steps=5000,
        check_every=10,
        patience=100,
        progress=False,
    )
    assert history.stopped == "patience"
    assert history.steps <= 120


def overfit(module: Quadratic, decay: float = 0.5, rate: float = 0.01, **options: object):
    """A fit whose validation is best at 1, on the way to the 3 of its loss."""
    weights, rest = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = [
        {"params": [module.w], "weight_decay": 0.0},
        {"params": [weights], "weight_decay": decay, "lr": rate},
        {"params": [rest], "weight_decay": 0.0},
    ]
    stage = Stage(lambda b: module.loss(b) + 0 * (weights + rest).sum(), adam(groups, 0.1))
    seen: list[Tensor] = []

    def validate() -> float:
        seen.append(module.w.detach().clone())
        return (module.w - 1).square().sum().item()

    options = {"max_steps": 160, "check_every": 10, "progress": False} | options
    history = train(module, stage, validate=validate, raise_decay=True, **options)
    return history, [g["weight_decay"] for g in stage.optimizer.param_groups], seen


@pytest.mark.parametrize(("rate", "levels"), [(0.01, (0.5, 2, 8, 30)), (0.1, (0.5, 2, 5))])
def test_overfitting_goes_back_to_the_best_state_under_more_decay(
    rate: float, levels: tuple[float, ...]
) -> None:
    plain, _, _ = overfit(Quadratic(), decay=0.0)
    assert plain.overfits == []  # where nothing decays there is nothing to raise
    module = Quadratic()
    history, decays, seen = overfit(module, rate=rate)
    assert history.overfits
    i = history.checked_steps.index(history.overfits[0])
    best = min(range(1, i + 1), key=history.checked_values.__getitem__)
    assert history.checked_steps[i] - history.checked_steps[best] >= 0.1 * 160
    assert (seen[i] - seen[best]).abs().min() > (seen[i + 1] - seen[best]).abs().max()
    assert decays[0] == decays[2] == 0
    assert decays[1] == levels[len(history.overfits)]
    assert torch.equal(module.w.detach(), seen[history.checked_steps.index(history.best_step)])


def test_worse_validation_alone_is_no_overfitting() -> None:
    module = Quadratic()
    still = Stage(lambda _: 1 + 0 * module.w.sum(), adam([module.w], 0.1, weight_decay=0.1))
    values = iter([0.0, 1.0] + [2.0] * 100)  # but the loss does not fall
    options = {"max_steps": 100, "check_every": 10, "progress": False, "raise_decay": True}
    assert train(module, still, validate=lambda: next(values), **options).overfits == []
    for rise, times in ((0.02, 0), (0.05, 1)):  # within the noise, and beyond
        module = Quadratic()
        falls = Stage(module.loss, adam([module.w], 0.1, weight_decay=0.1))
        values = iter([0.0, 1.0] + [1 + rise] * 100)
        history = train(module, falls, validate=lambda v=values: next(v), **options)
        assert bool(history.overfits) == bool(times)


@pytest.mark.parametrize("average", [None, 0.9])
@pytest.mark.parametrize("interrupted_at", [35, 77, 143])
def test_resumed_after_overfitting_is_bitwise_uninterrupted(
    tmp_path: Path, interrupted_at: int, average: float | None
) -> None:
    whole, resumed = Quadratic(), Quadratic()
    options = {"average": average}
    expected, decays, _ = overfit(whole, **options)
    assert expected.overfits
    options |= {"checkpoint": tmp_path / "fit", "checkpoint_every": 10}
    broken = Quadratic()
    plain = broken.loss

    def loss(batch: Tensor | None) -> Tensor:
        if broken.calls == interrupted_at:
            raise KeyboardInterrupt
        return plain(batch)

    broken.loss = loss  # type: ignore[method-assign]
    assert overfit(broken, **options)[0].stopped == "interrupted"
    history, same_decays, _ = overfit(resumed, **options)
    assert (history.losses, history.overfits) == (expected.losses, expected.overfits)
    assert same_decays == decays
    assert torch.equal(whole.w, resumed.w)


def test_the_end_is_written_wherever_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "fit"
    module = nn.Linear(1, 1)
    stage = Stage(lambda _: module.weight.square().sum(), adam(module.parameters()))
    history = train(module, stage, max_steps=60, check_every=50, checkpoint=path, progress=False)
    assert history.steps == 60
    assert path.exists()


@pytest.mark.parametrize("step", [0.1, 1.0, 7.0, 30.0])
@pytest.mark.parametrize("check", [0.0, 2.0])
@pytest.mark.parametrize("before", [0.0, 6.0])
def test_8_training_ends_in_time_with_its_last_check(step, check, before):
    now = 100.0
    module = Quadratic()
    plain = module.loss

    def loss(batch: Tensor | None) -> Tensor:
        nonlocal now
        now += step
        return plain(batch)

    def validate() -> float:
        nonlocal now
        now += check
        return float((module.w.detach() - 3).square().sum())

    history = train(
        module,
        Stage(loss, adam(module.parameters(), 0.1)),
        validate=validate,
        max_seconds=20.0,
        check_every=4,
        seconds_before=before,
        progress=False,
        clock=lambda: now,
    )
    assert history.stopped == "max_seconds"
    assert history.checked_steps[-1] == history.steps
    assert now - 100.0 + before <= max(20.0, before + step + 2 * check) + 1e-9  # the first is tried
    assert now - 100.0 + before + 2 * step + 2 * check > 20.0


@pytest.mark.parametrize("interrupted_check", [1, 2, 4])
def test_15_ctrl_c_in_a_check_keeps_the_best_state(interrupted_check):
    module, checks = Quadratic(), 0

    def validate() -> float:
        nonlocal checks
        checks += 1
        if checks == interrupted_check:
            raise KeyboardInterrupt
        return float((module.w.detach() - 3).square().sum())

    history = fit(module, validate=validate, average=0.9)
    assert history.stopped == "interrupted"
    assert history.steps == 10 * (interrupted_check - 1)
    assert history.best_step == history.steps
    assert module.w.isfinite().all() and module.training


def test_15_ctrl_c_while_a_checkpoint_is_written_leaves_the_last_one(tmp_path, monkeypatch):
    path, module, writes = tmp_path / "fit.safetensors", Quadratic(), 0
    replace = os.replace

    def interrupted(source: object, target: object) -> None:
        nonlocal writes
        writes += 1
        if writes == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    history = fit(module, checkpoint=path, checkpoint_every=20)
    assert (history.stopped, history.steps) == ("interrupted", 40)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    resumed = fit(Quadratic(), checkpoint=path, checkpoint_every=20)
    assert resumed.losses == fit(Quadratic()).losses
