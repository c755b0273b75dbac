"""What is global in a process or set around a call: whose turn it is, and how torch records."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# By process: a forked one has none of its parent's threads, so nobody there would let go.
_LOCKS: dict[int, threading.RLock] = {}
# After so many seconds of waiting it is said who is waited for.
_PATIENCE = 5.0
_holder = "another thread"
_AUTOCAST = ("cpu", "cuda")


@contextmanager
def exclusive() -> Iterator[None]:
    """One thread at a time, for what Pyro, torch, numpy and Python keep once for a process.

    That are Pyro's handlers and its validation, the warning filters, and the global generators of
    random numbers. Another thread waits for its turn; the one that is in may enter again.

    Example:
        >>> with exclusive(), exclusive():
        ...     print("in")
        in
    """
    global _holder
    lock = _LOCKS.setdefault(os.getpid(), threading.RLock())
    if not lock.acquire(timeout=_PATIENCE):
        logging.getLogger("pyro_nf").warning(
            "pyro_nf: thread %r waits for %r, which works with a Pyro model; models run one at a "
            "time in a process. Use processes to run them beside each other.",
            threading.current_thread().name,
            _holder,
        )
        lock.acquire()
    try:
        _holder = threading.current_thread().name
        yield
    finally:
        lock.release()


@contextmanager
def full_precision() -> Iterator[None]:
    """Autocast is off inside: a log density is a difference of large numbers, which needs digits.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision():
        ...     print((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
        torch.float32
    """
    with ExitStack() as inside:
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                inside.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def evaluating() -> Iterator[None]:
    """Models are run inside, for their values: alone, and whatever the user has set around it.

    What is made inside are ordinary tensors, which can take part in a fit later.

    Example:
        >>> with torch.inference_mode(), evaluating():
        ...     print(torch.ones(1).is_inference())
        False
    """
    with exclusive(), torch.inference_mode(False), torch.no_grad(), full_precision():
        yield


@contextmanager
def recording(owner: str) -> Iterator[None]:
    """Gradients can be taken inside, whatever the user has set around the call.

    ``torch.no_grad``, ``torch.inference_mode`` and autocast are left, and anomaly detection is off:
    particles and steps whose gradient is not finite are expected, and attended to.

    Args:
        owner: Who asks, for the message.

    Raises:
        RuntimeError: If torch cannot differentiate because a tensor was made in inference mode.

    Example:
        >>> with torch.inference_mode(), recording("example"):
        ...     print(torch.is_grad_enabled())
        True
    """
    anomaly = torch.is_anomaly_enabled()
    quiet = torch.autograd.set_detect_anomaly(False) if anomaly else nullcontext()
    try:
        with torch.inference_mode(False), torch.enable_grad(), full_precision(), quiet:
            yield
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise RuntimeError(
            f"{owner}: a tensor or a module was made under torch.inference_mode(), and torch "
            "cannot differentiate through it. Make it outside of that mode, or pass x.clone()."
        ) from error


def ordinary(value: Any) -> Any:
    """Tensors that were made in inference mode as ordinary ones; all else as it is.

    Args:
        value: A tensor, or tuples, lists and dicts that may hold some.

    Example:
        >>> with torch.inference_mode():
        ...     x = torch.ones(2)
        >>> x.is_inference(), ordinary({"x": [x]})["x"][0].is_inference()
        (True, False)
    """
    if isinstance(value, Tensor):
        with torch.inference_mode(False):
            return value.clone() if value.is_inference() else value
    if type(value) in (tuple, list):
        return type(value)(ordinary(entry) for entry in value)
    if type(value) is dict:
        return {key: ordinary(entry) for key, entry in value.items()}
    return value
