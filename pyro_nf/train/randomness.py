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
        outside = _taken()
        try:
            set_seed(seed)
            yield
        finally:
            _put_back(*outside)


class Stream:
    """Random numbers that go on each time they are entered, whatever is drawn in between.

    Args:
        seed: The seed.

    Example:
        >>> stream = Stream(0)
        >>> with stream.entered():
        ...     first = torch.randn(1)
        >>> with stream.entered():
        ...     second = torch.randn(1)
        >>> with own_randomness(0):
        ...     print(bool((torch.cat([first, second]) == torch.randn(2)).all()))
        True
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._inside: _States | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The global generators are at this stream's place inside, and outside as they were."""
        with exclusive():
            outside = _taken()
            try:
                if self._inside is None:
                    set_seed(self.seed)
                else:
                    _put_back(*self._inside)
                yield
            finally:
                self._inside = _taken()
                _put_back(*outside)


_States = tuple[dict[str, Tensor], Any, Any]
"""Of torch on all devices, of numpy and of Python."""


def set_seed(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python.

    Args:
        seed: The seed.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def _taken() -> _States:
    return _device_states(), np.random.get_state(), random.getstate()  # noqa: NPY002


def _put_back(tensors: Mapping[str, Tensor], of_numpy: Any, of_python: Any) -> None:
    _set_device_states(tensors)
    np.random.set_state(of_numpy)  # noqa: NPY002
    random.setstate(of_python)


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
    kinds = ["cuda", "xpu", "mps"]
    accelerator = getattr(torch, "accelerator", None)  # not in the oldest torch that is supported
    if accelerator is not None and accelerator.is_available():  # a kind that is not named above
        kinds.append(accelerator.current_accelerator().type)
    found = [(kind, getattr(torch, kind, None)) for kind in dict.fromkeys(kinds)]
    return [(kind, module) for kind, module in found if module and module.is_available()]


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


def joined_states(
    states: list[tuple[dict[str, Tensor], dict[str, Any]]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of all processes as one of tensors and JSON values; the first is as if alone.

    Args:
        states: What `random_state` returned in each.
    """
    (tensors, values), others = states[0], states[1:]
    for rank, (theirs, _) in enumerate(others, start=1):
        tensors = tensors | {f"{rank}/{name}": state for name, state in theirs.items()}
    more = {"generators_of_others": [theirs for _, theirs in others]} if others else {}
    return tensors, {"generators": values} | more


def state_of_rank(
    rank: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `set_random_state` takes in one process, of what `joined_states` returned.

    Args:
        rank: The number of the process.
        tensors: The states of torch's generators.
        values: The JSON values.

    Returns:
        None if there was no such process.
    """
    if rank == 0:
        return dict(tensors), values["generators"]
    others = values.get("generators_of_others", [])
    start = f"{rank}/"
    mine = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    return (mine, others[rank - 1]) if rank <= len(others) else None
