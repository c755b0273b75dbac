"""Randomness of its own for a fit: seeded inside, and outside as if the fit had never been."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


@contextmanager
def own_randomness(seed: int | None) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python inside; put them back on leaving.

    Models and data loaders draw from the global generators, so a fit has to seed those. What the
    user draws afterwards is the same as without the fit.

    Args:
        seed: The seed, or None for a fresh one.

    Example:
        >>> before = torch.random.get_rng_state()
        >>> with own_randomness(0):
        ...     _ = torch.randn(3)
        >>> bool((torch.random.get_rng_state() == before).all())
        True
    """
    seed = random.SystemRandom().getrandbits(31) if seed is None else seed
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of the global generators as tensors and as JSON values."""
    tensors = {"cpu": torch.random.get_rng_state()}
    for i in range(torch.cuda.device_count()):
        tensors[f"cuda.{i}"] = torch.cuda.get_rng_state(i)
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, gauss_next = random.getstate()
    values = {
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss_next],
    }
    return tensors, values


def set_random_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Put the global generators where `random_state` found them."""
    torch.random.set_rng_state(tensors["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
    name, keys, *rest = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss_next = values["python"]
    random.setstate((version, tuple(internal), gauss_next))
