"""Fits of two processes under torchrun: they agree, with each other and with one process alone."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_nf.train.density.recipe import DensityRecipe
from pyro_nf.train.world import PeerLost, World, signals_put_off
from tests.train import world_cases
from tests.train.world_cases import ALSO_ALONE, TOGETHER, Line, Result, fit_line, rows

ROOT = Path(__file__).parents[2]


def torchrun(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine, which find each other through a free port."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node=2", "--local-addr=127.0.0.1"),
            *("-m", world_cases.__name__, str(folder), *names),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All cases, then one in which a process is killed: a folder, and what was said."""
    folder = tmp_path_factory.mktemp("world")
    ended = torchrun(folder, *(case.__name__ for case in TOGETHER), "killed")
    assert ended.returncode != 0
    return folder, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def results(run: tuple[Path, str]) -> dict[str, list[Result]]:
    """What each process returned for each case."""
    folder, said = run
    names = [case.__name__ for case in TOGETHER]
    assert all((folder / f"{name}.{rank}").exists() for name in names for rank in (0, 1)), said
    return {name: [torch.load(folder / f"{name}.{rank}") for rank in (0, 1)] for name in names}


def check_same(first: Any, second: Any, name: str = "") -> None:
    """To the bit, but for what is each process's own."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), name
        for key in first:
            if key != "own":
                check_same(first[key], second[key], f"{name}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), name
        for i, pair in enumerate(zip(first, second, strict=True)):
            check_same(*pair, f"{name}[{i}]")
    elif isinstance(first, Tensor):
        assert torch.equal(first, second), name
    else:
        assert first == second or (first != first and second != second), name


@pytest.mark.parametrize("case", TOGETHER, ids=lambda case: case.__name__)
def test_both_processes_have_the_same_to_the_bit(
    case: Any, results: dict[str, list[Result]]
) -> None:
    check_same(*results[case.__name__])


@pytest.mark.parametrize("case", ALSO_ALONE, ids=lambda case: case.__name__)
def test_two_processes_are_one_on_the_same_batches(
    case: Any, results: dict[str, list[Result]], tmp_path: Path
) -> None:
    together, alone = results[case.__name__][0], case(tmp_path)
    assert len(together["losses"]) == len(alone["losses"]) >= 30
    for name in ("losses", "learning_rates", "checked_values"):
        assert together[name] == pytest.approx(alone[name], rel=1e-9), name
    for name in ("starts", "baselines"):
        if name in alone:
            assert together[name] == pytest.approx(alone[name], rel=1e-9), name
    assert together["best_step"] == alone["best_step"]
    assert together["state"].keys() == alone["state"].keys()
    for name, value in alone["state"].items():
        torch.testing.assert_close(together["state"][name], value, rtol=1e-7, atol=1e-9, msg=name)


def test_noise_is_each_processes_own_and_buffers_are_the_same(
    results: dict[str, list[Result]],
) -> None:
    first, second = results["noise_and_buffers"]
    assert not set(first["own"]["drawn"]) & set(second["own"]["drawn"])
    assert first["state"]["norm.running_mean"].abs().min() > 0.5


def test_a_resumed_fit_of_two_is_bitwise_the_uninterrupted_one(
    results: dict[str, list[Result]],
) -> None:
    for result in results["resumed"]:
        assert result["first"]["stopped"] == "interrupted"
        assert len(result["first"]["losses"]) == 27
        assert result["same"] and result["whole"] == result["again"]


def test_processes_with_rows_of_their_own_take_them_whole(
    results: dict[str, list[Result]],
) -> None:
    first, second = (result["own"]["sampled"] for result in results["own_rows"])
    passes = [torch.cat(pair) for pair in zip(first.split(12), second.split(12), strict=True)]
    assert len(passes) == 2
    for seen in passes:  # the sampler divides the rows anew in each pass
        assert set(map(tuple, seen.tolist())) == set(map(tuple, rows(24).tolist()))
    assert not torch.equal(first[:12], first[12:])


def test_what_is_not_finite_in_one_is_skipped_by_all(results: dict[str, list[Result]]) -> None:
    assert results["not_finite_in_one"][0]["skipped"] == [12, 13]
    assert results["gradient_not_finite_in_one"][0]["skipped"] == [12]
    for name in ("not_finite_in_one", "gradient_not_finite_in_one"):
        losses = results[name][0]["losses"]
        assert math.isnan(losses[12]) and losses[-1] < losses[0]
    what = ("another process's loss", "the loss (nan)")
    for result, words in zip(results["never_finite_in_one"], what, strict=True):
        assert result["own"]["error"] == "ValueError"
        assert f"{words} is not finite at step 22, for 10 steps" in result["own"]["message"]
        assert all(value.isfinite().all() for value in result["state"].values())


def test_an_error_in_one_is_an_error_in_all(results: dict[str, list[Result]]) -> None:
    first, second = (result["own"] for result in results["error_in_one"])
    assert second == {"error": "KeyError", "message": "'no such column'"}
    assert first["error"] == "RuntimeError"
    assert "the process of rank 1 failed with KeyError: 'no such column'" in first["message"]
    for result in results["error_in_the_search"]:
        assert result == {"error": "LookupError", "message": "no start"}
    first, second = (result["own"] for result in results["bad_row_in_one"])
    assert second["error"] == "ValueError" and "column 1 of x is not finite" in second["message"]
    assert "rank 1 failed" in first["message"] and "column 1 of x" in first["message"]


def test_ctrl_c_in_one_ends_all_with_the_best_state(results: dict[str, list[Result]]) -> None:
    line = results["ctrl_c_in_one"][0]
    assert line["stopped"] == "interrupted" and len(line["losses"]) == line["best_step"] == 13
    assert line["is_put_back"]
    searched = results["ctrl_c_while_another_searches"][0]
    assert searched["stopped"] == "interrupted" and math.isfinite(searched["validation"])
    first = results["ctrl_c_in_the_first"][0]
    assert first["stopped"] == "interrupted" and first["starts"].keys() == {"whitened"}
    assert first["validation"] == pytest.approx(min(first["starts"].values()), rel=1e-12)
    assert results["posterior_interrupted"][0]["stopped"] == "interrupted"


def test_seconds_and_patience_are_one_verdict(results: dict[str, list[Result]]) -> None:
    for result in results["seconds"]:
        assert result["stopped"] == "max_seconds"
        assert result["own"]["steps"] == len(result["losses"]) > 2
        assert result["own"]["seconds"] < 1.1 * 0.5 + 0.5
    stopped = results["patience"][0]
    assert stopped["stopped"] == "patience"
    assert stopped["checked_values"] == [1.0, 0.5, 0.4, 1.1, 1.1]  # the mean over the processes
    assert stopped["best_step"] == 20
    assert results["posterior_in_seconds"][0]["stopped"] == "max_seconds"


def test_who_does_not_answer_in_time_is_lost(results: dict[str, list[Result]]) -> None:
    first = results["no_answer"][0]["own"]
    assert first["error"] == "PeerLost" and "does not answer" in first["message"]


def test_a_posterior_of_two_processes_is_the_posterior(results: dict[str, list[Result]]) -> None:
    result, y = results["posterior"][0], rows(20)
    precision = 20 + 1 / 100  # of the conjugate normal
    torch.testing.assert_close(result["mean"], 20 * y.mean(0) / precision, atol=0.03, rtol=0)
    torch.testing.assert_close(
        result["sd"], torch.full((2,), precision**-0.5).double(), atol=0.02, rtol=0
    )


def test_who_loses_another_ends_with_a_message_and_a_checkpoint(run: tuple[Path, str]) -> None:
    folder, said = run
    assert "another process of this fit has ended, or does not answer" in said
    assert "keeps what was learned" in said
    assert not (folder / "killed.0").exists()

    def line() -> Line:
        module = Line()
        module.norm = nn.Identity()  # type: ignore[assignment]
        return module

    resumed, whole = line(), line()
    result = fit_line(resumed, checkpoint=folder / "killed" / "line")
    assert len(resumed.drawn) == 40 - 27
    expected = fit_line(whole)
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-9)
    torch.testing.assert_close(resumed.layer.weight, whole.layer.weight, rtol=1e-7, atol=1e-9)


# ---- one process


def test_alone_nothing_is_asked_of_anybody() -> None:
    with World.joined() as world:
        assert (world.rank, world.size, world.is_first) == (0, 1, True)
        assert world.together(lambda: 3) == world.share(lambda: 3) == 3
        assert world.mean(0.5) == 0.5 and world.gather("a") == ["a"] and world.seed(7) == 7
        assert world.parallel(abs, []) is abs  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            world.together(lambda: signal.raise_signal(signal.SIGINT))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_and_then_do_what_they_would_have(number: signal.Signals) -> None:
    heard: list[int] = []
    before = signal.signal(number, lambda got, _: heard.append(got))
    try:
        try:
            with signals_put_off() as outer, signals_put_off() as inner:
                signal.raise_signal(number)
                signal.raise_signal(number)
                assert inner is outer and inner.came and not heard
        except KeyboardInterrupt:
            assert number == signal.SIGINT
        else:
            assert number == signal.SIGTERM
        assert heard == ([] if number == signal.SIGINT else [number])
    finally:
        signal.signal(number, before)


def test_a_second_ctrl_c_is_not_put_off() -> None:
    with signals_put_off() as signals:
        signal.raise_signal(signal.SIGINT)
        signals.first -= 10.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signals.is_attended_to = True


def test_an_interrupt_that_was_attended_to_is_over() -> None:
    with signals_put_off() as signals:
        signal.raise_signal(signal.SIGINT)
        signals.is_attended_to = True


def test_errors_of_the_network_are_told_from_others() -> None:
    assert issubclass(PeerLost, RuntimeError)
    with pytest.raises(TypeError, match=r"must hold nn\.Parameters"):
        World(size=2).parallel(torch.sum, [torch.ones(2, requires_grad=True)])
    assert DensityRecipe().batch_size(10**6) == 256
