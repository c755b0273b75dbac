"""Random states: the fit's own inside, and outside as they were, on every kind of device."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pyro_nf.train.randomness import (
    Stream,
    joined_states,
    own_randomness,
    random_state,
    set_random_state,
    state_of_rank,
)


def test_24_the_state_of_every_device_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake mps, which has one device and no index."""
    states = [torch.arange(4, dtype=torch.uint8)]
    fake = SimpleNamespace(
        is_available=lambda: True,
        _is_in_bad_fork=lambda: True,  # torch.manual_seed then leaves it alone
        device_count=lambda: 1,
        get_rng_state=lambda: states[-1].clone(),
        set_rng_state=lambda state: states.append(state),
    )
    monkeypatch.setattr(torch, "mps", fake)
    tensors, values = random_state()
    assert torch.equal(tensors["mps.0"], states[0])
    with own_randomness(0):
        states.append(torch.zeros(4, dtype=torch.uint8))
    assert torch.equal(states[-1], states[0])
    states.append(torch.zeros(4, dtype=torch.uint8))
    set_random_state(tensors, values)
    assert torch.equal(states[-1], states[0])


def test_24_the_cpu_alone() -> None:
    before = torch.get_rng_state()
    with own_randomness(1):
        first = torch.randn(3)
    with own_randomness(1):
        assert torch.equal(torch.randn(3), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_state_of_a_device_that_torch_alone_knows_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fake accelerator with two devices."""
    states = {0: torch.tensor([1], dtype=torch.uint8), 1: torch.tensor([2], dtype=torch.uint8)}
    fake = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_rng_state=lambda i: states[i].clone(),
        set_rng_state=lambda state, i: states.update({i: state}),
    )
    known = SimpleNamespace(
        is_available=lambda: True, current_accelerator=lambda: SimpleNamespace(type="npu")
    )
    monkeypatch.setattr(torch, "npu", fake, raising=False)
    monkeypatch.setattr(torch, "accelerator", known, raising=False)
    tensors, values = random_state()
    assert {"cpu", "npu.0", "npu.1"} <= tensors.keys()
    with own_randomness(0):
        states[1] += 5
    assert int(states[1]) == 2
    states[0] += 5
    set_random_state(tensors, values)
    assert int(states[0]) == 1


def test_a_stream_goes_on_where_it_was_left() -> None:
    def drawn() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002

    with own_randomness(4):
        expected = [drawn(), drawn(), drawn()]
    before = torch.get_rng_state()
    stream, seen = Stream(4), []
    for _ in range(3):
        with stream.entered():
            seen.append(drawn())
        torch.rand(5)
    assert seen == expected
    torch.set_rng_state(before)


def test_the_states_of_several_processes_come_apart_again() -> None:
    states = []
    for seed in range(3):
        with own_randomness(seed):
            states.append(random_state())
    tensors, values = joined_states(states)
    values = json.loads(json.dumps(values))  # as a checkpoint keeps it
    for rank, (theirs, numbers) in enumerate(states):
        mine = state_of_rank(rank, tensors, values)
        assert mine is not None
        assert torch.equal(mine[0]["cpu"], theirs["cpu"])
        assert mine[1] == json.loads(json.dumps(numbers))
    assert state_of_rank(3, tensors, values) is None
    assert state_of_rank(1, *joined_states(states[:1])) is None
