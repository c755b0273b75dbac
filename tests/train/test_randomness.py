"""Random states: the fit's own inside, and outside as they were, on every kind of device."""

from types import SimpleNamespace

import pytest
import torch

from pyro_nf.train.randomness import own_randomness, random_state, set_random_state


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
