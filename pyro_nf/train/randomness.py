"""Randomness of its own for a fit: seeded inside, and outside as if the fit had never been."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_nf.train.modes import exclusive


@contextmanager
def own_randomness(seed: int | None) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python inside; put them back on leaving.

    Models and data loaders draw from the global generators, so a fit has to seed those. What the
    user draws afterwards is the same as without the fit. There is one set of generators in a
    process, so one thread at a time is inside (:func:`~pyro_nf.train.modes.exclusive`).

    Args:
        seed: The seed, or None for a fresh one.

    Example:
        >>> before = torch.random.get_rng_state()
        >>> with own_randomness(0):
        ...     _ = torch.randn(3)
        >>> bool((torch.random.get_rng_state() == before).all())
        True
    """
    seed = random.SystemRandom().getrandbits(31) if seed is None else int(seed)
    with exclusive():
        python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
        torch_states = _device_states()
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
        finally:
            _set_device_states(torch_states)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _device_states() -> dict[str, Tensor]:
    """The states of torch's global generators, that of the CPU and those of all accelerators."""
    states = {"cpu": torch.random.get_rng_state()}
    for kind, module in _accelerators():
        if kind == "mps":  # one device, without an index
            states["mps.0"] = module.get_rng_state()
        else:
            states |= {f"{kind}.{i}": module.get_rng_state(i) for i in range(module.device_count())}
    return states


def _set_device_states(states: Mapping[str, Tensor]) -> None:
    """Put back what is there; a checkpoint may come from a machine with other devices."""
    torch.random.set_rng_state(states["cpu"])
    for kind, module in _accelerators():
        for i in range(module.device_count()):
            state = states.get(f"{kind}.{i}")
            if state is not None:
                module.set_rng_state(*([state] if kind == "mps" else [state, i]))


def _accelerators() -> list[tuple[str, Any]]:
    """The kinds of devices beside the CPU that are there, with their modules in torch."""
    kinds = [(kind, getattr(torch, kind, None)) for kind in ("cuda", "xpu", "mps")]
    return [(kind, module) for kind, module in kinds if module and module.is_available()]


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of the global generators as tensors and as JSON values."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, gauss_next = random.getstate()
    values = {
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss_next],
    }
    return _device_states(), values


def set_random_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Put the global generators where `random_state` found them."""
    _set_device_states(tensors)
    name, keys, *rest = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss_next = values["python"]
    random.setstate((version, tuple(internal), gauss_next))
