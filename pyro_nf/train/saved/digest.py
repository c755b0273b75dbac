"""A short mark of what a fit was given, the same in every process."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Set
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_nf._storage import tensor_bytes

_LENGTH = 8  # bytes: what differs by accident differs here
_DEEPEST = 100  # levels of lists in lists; more is a list that holds itself


def digest(value: Any) -> str:
    """The mark of a value: what kind it is, and a hash of what it holds.

    Tensors and arrays count by dtype, shape, numbers and their order, wherever they lie; mappings
    and sequences by what they hold; modules by class and state; functions and classes by their
    names. Any other object counts by its class alone: what it holds may change by use.

    Args:
        value: Anything.

    Example:
        >>> x = torch.arange(3.0)
        >>> digest(x)
        'float32 (3,) b01e0d01500ed418'
        >>> digest({"x": [x, None]}) == digest({"x": (x.clone(), None)})
        True
        >>> digest(x) == digest(x.flip(0))
        False
    """
    total = hashlib.blake2b(digest_size=_LENGTH)
    _add(total, value, 0)
    return f"{_kind(value)} {total.hexdigest()}"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_dtype(value)} {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, (bool, int, float)):
        return f"{value!r}"
    return type(value).__name__


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _add(total: Any, value: Any, depth: int) -> None:
    """Feeds a value to the hash, each part with its kind and size before it."""

    def say(*words: Any) -> None:
        total.update(json.dumps(words).encode() + b"\n")

    def parts(*values: Any) -> None:
        for part in values:
            _add(total, part, depth + 1)

    if depth > _DEEPEST:
        say("deeper")
    elif isinstance(value, Tensor):
        dense = value.detach().to_dense() if value.layout is not torch.strided else value.detach()
        dense = dense.resolve_conj().resolve_neg()
        say("array", _dtype(value), list(value.shape))
        if not value.is_meta:
            total.update(tensor_bytes(dense))
    elif isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            say("objects", list(value.shape))
            parts(*value.reshape(-1).tolist())
        else:
            say("array", str(value.dtype), list(value.shape))
            total.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, np.generic):
        parts(value.item())
    elif value is None or isinstance(value, (bool, int, float, complex, str, Enum, PurePath)):
        say("value", type(value).__name__, str(value))
    elif isinstance(value, (bytes, bytearray)):
        say("bytes", len(value))
        total.update(value)
    elif isinstance(value, (torch.dtype, torch.device, range, slice)):
        say("value", repr(value))
    elif isinstance(value, Mapping):
        say("mapping", len(value))
        parts(*sorted(([digest(key), part] for key, part in value.items()), key=lambda p: p[0]))
    elif isinstance(value, Set):
        say("set", sorted(digest(part) for part in value))
    elif isinstance(value, (list, tuple)):
        say("sequence", len(value))
        parts(*value)
    elif isinstance(value, nn.Module):
        say("module", _name(type(value)))
        parts({name: t for name, t in value.state_dict().items() if isinstance(t, Tensor)})
    elif isinstance(value, torch.distributions.Distribution):
        say("distribution", _name(type(value)))
        parts({name: getattr(value, name, None) for name in value.arg_constraints})
    elif isinstance(value, functools.partial):
        say("partial")
        parts(value.func, value.args, value.keywords)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        say("dataclass", _name(type(value)))
        parts({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif hasattr(value, "to_numpy"):  # a table or a column of pandas or polars
        say("table", [str(name) for name in getattr(value, "columns", [])])
        parts(np.asarray(value.to_numpy()))
    else:
        say("object", _name(value) if callable(value) else _name(type(value)))


def _name(value: Any) -> str:
    """The name of a class or function, or of the class of what is called."""
    if not hasattr(value, "__qualname__"):
        value = type(value)
    return f"{value.__module__}.{value.__qualname__}"


def architecture(module: nn.Module) -> str:
    """The mark of the classes of which a module is made."""
    return digest([f"{name}: {type(part).__name__}" for name, part in module.named_modules()])
