"""What is global in a process or set around a call: whose turn it is, and how torch records."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

_LOCK = threading.RLock()
# After so many seconds of waiting it is said who is waited for.
_PATIENCE = 5.0
_holder = "another thread"


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
    if not _LOCK.acquire(timeout=_PATIENCE):
        logging.getLogger("pyro_nf").warning(
            "pyro_nf: thread %r waits for %r, which works with a Pyro model; models run one at a "
            "time in a process. Use processes to run them beside each other.",
            threading.current_thread().name,
            _holder,
        )
        _LOCK.acquire()
    try:
        _holder = threading.current_thread().name
        yield
    finally:
        _LOCK.release()


@contextmanager
def recording(owner: str) -> Iterator[None]:
    """Gradients can be taken inside, whatever the user has set around the call.

    ``torch.no_grad`` and ``torch.inference_mode`` are left, and anomaly detection is off: particles
    and steps whose gradient is not finite are expected, and attended to.

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
        with torch.inference_mode(False), torch.enable_grad(), quiet:
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
