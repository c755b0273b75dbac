"""Every message about shapes, context, dtype and other arguments: what, wanted, got, do."""

from __future__ import annotations

import inspect
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, cast

import numpy as np
import torch
from torch import Size, Tensor, nn

# A value whose text is longer than this is cut in a message.
_MOST_CHARACTERS = 80


def check_dims(owner: str, input_dim: int | None, context_dim: int) -> None:
    """Raises unless the dimensions that a transform was built with make sense."""
    check_count(owner, "input_dim", input_dim, optional=True)
    check_count(owner, "context_dim", context_dim, at_least=0)


def shown(value: object) -> str:
    """A value as a message shows it: tensors and arrays by their shape, all else in short."""
    if isinstance(value, (Tensor, np.ndarray)):
        kind = "a tensor" if isinstance(value, Tensor) else "a numpy array"
        return f"{kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    text = repr(value)
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."


# Numbers. An integer or a float of numpy's is one too, a bool is none.


def is_count(value: object) -> bool:
    """Whether a value is an integer, of numpy's for example, but no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number, of numpy's for example, but no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_count(
    owner: str, name: str, value: int | None, at_least: int = 1, *, optional: bool = False
) -> None:
    """Raises unless ``value`` is an integer that is large enough."""
    if optional and value is None:
        return
    if value is None or not is_count(value) or value < at_least:
        raise ValueError(f"{owner}: {name} must be an integer >= {at_least}, got {shown(value)}.")


def is_sequence(values: object) -> bool:
    """Whether a value is a list or a tuple, and no text."""
    return isinstance(values, Sequence) and not isinstance(values, (str, bytes))


def check_counts(
    owner: str, name: str, values: object, *, at_least: int = 1, empty: bool = False
) -> None:
    """Raises unless ``values`` is a list or tuple of integers that are large enough."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        do = f"write ({values!r},)" if is_count(values) else "write (64, 64), for example"
        raise TypeError(f"{owner}: {name} must be a tuple of integers, got {shown(values)}; {do}.")
    if not (values or empty):
        raise ValueError(f"{owner}: {name} must have at least one entry, got {values!r}.")
    for value in values:
        check_count(owner, f"every entry of {name}", value, at_least)


def check_number(
    owner: str,
    name: str,
    value: Any,
    wanted: str = "a finite number",
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
    optional: bool = False,
) -> None:
    """Raises unless ``value`` is a number between the bounds; ``wanted`` says so in words."""
    if optional and value is None:
        return
    if not (is_number(value) and above < value < below and at_least <= value <= at_most):
        raise ValueError(f"{owner}: {name} must be {wanted}, got {shown(value)}.")


def check_positive(owner: str, name: str, value: float | None, *, optional: bool = False) -> None:
    """Raises unless ``value`` is a positive finite number."""
    check_number(owner, name, value, "a positive number", above=0.0, optional=optional)


def check_work(owner: str, name: str, value: float) -> None:
    """Raises unless ``value`` is a positive number; inf is one."""
    if not (is_number(value) and value > 0):
        raise ValueError(f"{owner}: {name} must be a positive number or inf, got {shown(value)}.")


def check_flag(owner: str, name: str, value: bool) -> None:
    """Raises unless ``value`` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{owner}: {name} must be True or False, got {shown(value)}.")


def check_seed(owner: str, seed: int) -> None:
    """Raises unless ``seed`` is an integer that every generator takes."""
    if not is_count(seed) or not 0 <= seed < 2**63:
        raise ValueError(
            f"{owner}: seed must be an integer from 0 to 2**63 - 1, got {shown(seed)}."
        )


def seed_or_fresh(owner: str, seed: int | None) -> int:
    """The seed, or a fresh one for None."""
    if seed is None:
        return random.SystemRandom().getrandbits(31)
    check_seed(owner, seed)
    return int(seed)


def check_listed(owner: str, name: str, values: object, wanted: str) -> None:
    """Raises unless ``values`` is a list, a tuple or a generator."""
    words = (str, bytes, Mapping, Tensor, np.ndarray)
    if not isinstance(values, Iterable) or isinstance(values, (*words, type)):
        raise TypeError(f"{owner}: {name} must be {wanted}, got {shown(values)}.")


# Words, files, objects and functions.


def check_choice(owner: str, name: str, value: str, choices: Iterable[str]) -> None:
    """Raises unless ``value`` is one of some words."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {list(choices)}, got {shown(value)}.")


def check_path(owner: str, name: str, path: object, *, optional: bool = False) -> None:
    """Raises unless ``path`` names a file, as a string or a ``pathlib.Path``."""
    if optional and path is None:
        return
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{owner}: {name} must be a str or a pathlib.Path, got {shown(path)}.")
    if not os.fspath(path) or "\0" in str(path):
        raise ValueError(f"{owner}: {name} must be the name of a file, got {shown(path)}.")


def check_kind(
    owner: str,
    name: str,
    value: object,
    kind: type | tuple[type, ...],
    do: str = "",
    *,
    optional: bool = False,
) -> None:
    """Raises unless ``value`` is of a kind; a class is no instance of itself, and ``do`` helps."""
    if (optional and value is None) or isinstance(value, kind):
        return
    kinds = " or a ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
    got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    end = f"; {do}." if do else "."
    raise TypeError(f"{owner}: {name} must be a {kinds}, got {got}{end}")


def check_callable(
    owner: str, name: str, value: object, wanted: str, *, count: int, optional: bool = False
) -> None:
    """Raises unless ``value`` can be called with so many arguments."""
    if optional and value is None:
        return
    called = value.forward if isinstance(value, nn.Module) else value
    if not callable(called) or not _binds(called, (None,) * count, {}):
        raise TypeError(f"{owner}: {name} must be {wanted}, got {shown(value)}.")


def _binds(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function takes these arguments, as far as its signature is known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without one
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def made_by(owner: str, activation: Any) -> nn.Module:
    """What ``activation`` makes; raises unless it is a Module."""
    wanted = "a class or function that makes a Module, such as torch.nn.ReLU"
    if isinstance(activation, nn.Module):
        made = type(activation).__name__
        raise TypeError(f"{owner}: activation must be {wanted}, got the Module {made} itself.")
    check_callable(owner, "activation", activation, wanted, count=0)
    try:
        module = activation()
    except TypeError as error:  # a builtin that wants arguments, but does not say so
        raise TypeError(
            f"{owner}: activation must be {wanted}, got {shown(activation)}: {error}."
        ) from error
    if not isinstance(module, nn.Module):
        raise TypeError(f"{owner}: activation must be {wanted}; it makes {shown(module)}.")
    return module


def check_clock(owner: str, clock: object) -> None:
    """Raises unless ``clock`` can be called as ``time.monotonic`` can."""
    check_callable(owner, "clock", clock, "a function such as time.monotonic", count=0)


def check_entries(owner: str, name: str, values: object, kind: type) -> None:
    """Raises unless ``values`` is a list or tuple of things of one kind."""
    if not is_sequence(values):
        raise TypeError(
            f"{owner}: {name} must be a list with entries of the kind {kind.__name__}, got "
            f"{shown(values)}."
        )
    for value in values:  # type: ignore[attr-defined]
        check_kind(owner, f"every entry of {name}", value, kind)


def check_model(owner: str, model: object) -> None:
    """Raises unless ``model`` can be a Pyro model."""
    if not callable(model) or isinstance(model, type):
        raise TypeError(f"{owner}: model must be a function with Pyro sites, got {shown(model)}.")


def check_arguments(
    owner: str,
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> None:
    """Raises unless ``model`` is a function that takes the arguments."""
    check_model(owner, model)
    if not isinstance(args, (tuple, list)):
        raise TypeError(
            f"{owner}: args must be a tuple of the model's arguments, got {shown(args)}; "
            "write args=(y,) for one of them."
        )
    if kwargs is not None and not (
        isinstance(kwargs, Mapping) and all(isinstance(name, str) for name in kwargs)
    ):
        raise TypeError(
            f"{owner}: kwargs must be a dictionary of the model's keyword arguments, got "
            f"{shown(kwargs)}."
        )
    if not _binds(model, args, kwargs or {}):
        names = ", ".join(kwargs or {}) or "none"
        raise TypeError(
            f"{owner}: model takes {inspect.signature(model)}, got {len(args)} argument(s) in "
            f"args and the keywords {names} in kwargs; give what it takes."
        )


# What all fits share.


def check_budget(owner: str, max_steps: int | None, max_seconds: float | None) -> None:
    """Raises unless each bound is positive or None."""
    check_count(owner, "max_steps", max_steps, optional=True)
    check_positive(owner, "max_seconds", max_seconds, optional=True)


def check_patience(owner: str, patience: float | None) -> None:
    """Raises unless ``patience`` is a number of steps, a share of the budget, or None."""
    if is_count(patience):
        check_count(owner, "patience", patience)  # type: ignore[arg-type]
    else:
        wanted = "a number of steps (an integer >= 1), a share of the budget (up to 1), or None"
        check_number(owner, "patience", patience, wanted, above=0, at_most=1, optional=True)


def check_running(
    owner: str,
    seed: int | None,
    progress: bool,
    checkpoint: str | os.PathLike[str] | None,
    checkpoint_every: int,
    clock: Callable[[], float],
) -> None:
    """Raises unless a fit can run so: its seed, its bar, its checkpoint and its clock."""
    if seed is not None:
        check_seed(owner, seed)
    check_flag(owner, "progress", progress)
    check_path(owner, "checkpoint", checkpoint, optional=True)
    check_count(owner, "checkpoint_every", checkpoint_every)
    check_clock(owner, clock)


# Tensors.


def check_floating(owner: str, name: str, value: Tensor) -> None:
    """Raises unless ``value`` is a floating tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{owner}: {name} must be a torch.Tensor, got {type(value).__name__}; "
            f"call torch.as_tensor({name}) first."
        )
    if not value.is_floating_point():
        raise TypeError(
            f"{owner}: {name} must be a floating tensor, got {value.dtype}; "
            f"call {name}.to(torch.get_default_dtype()) first."
        )


def check_tensor(
    owner: str,
    name: str,
    value: Any,
    shape: Sequence[int | None],
    *,
    finite: bool = True,
    optional: bool = False,
) -> None:
    """Raises unless ``value`` is a floating tensor of a shape, where None stands for any size."""
    if optional and value is None:
        return
    check_floating(owner, name, value)
    fits = value.dim() == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, value.shape, strict=True)
    )
    if not fits:
        sizes = ["any" if size is None else str(size) for size in shape]
        wanted = f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
        raise ValueError(
            f"{owner}: {name} must have the shape {wanted}, got {name}.shape = "
            f"{tuple(value.shape)}."
        )
    if finite:
        check_finite(owner, name, value)


def check_table(owner: str, name: str, rows: Tensor, width: int | None = None) -> None:
    """Raises unless ``rows`` is a floating tensor of two dimensions."""
    check_floating(owner, name, rows)
    if rows.dim() != 2:
        do = f"; write {name}[:, None] for one column" if rows.dim() == 1 else ""
        raise ValueError(
            f"{owner}: {name} must be rows of shape (N, {width or 'D'}), got "
            f"{tuple(rows.shape)}{do}."
        )


def check_rows(owner: str, name: str, rows: Tensor, width: int | None = None) -> None:
    """Raises unless ``rows (N, D)`` is a finite table with at least one row."""
    check_table(owner, name, rows, width)
    check_tensor(owner, name, rows, (None, width))
    check_count(owner, f"the number of rows of {name}", len(rows))
    check_count(owner, f"the number of columns of {name}", rows.shape[1])


def check_events(owner: str, name: str, rows: Tensor, event_shape: Size) -> None:
    """Raises unless ``rows`` is a floating tensor of events, ``(N, *event_shape)``."""
    if len(event_shape) == 1:
        check_table(owner, name, rows, event_shape[0])
    check_event_shape(owner, name, rows, event_shape, len(event_shape))
    if rows.dim() != len(event_shape) + 1:
        sizes = ", ".join(map(str, event_shape))
        raise ValueError(
            f"{owner}: {name} must be rows of shape (N, {sizes}), got {tuple(rows.shape)}."
        )


def check_event_rows(owner: str, name: str, rows: Tensor, event_shape: Size) -> None:
    """Raises unless ``rows (N, *event_shape)`` are finite events, at least one."""
    check_events(owner, name, rows, event_shape)
    check_finite(owner, name, rows)
    check_count(owner, f"the number of rows of {name}", len(rows))


def check_finite(owner: str, name: str, value: Tensor) -> None:
    """Raises if ``value`` has NaN or inf."""
    if not bool(value.isfinite().all()):
        count = int((~value.isfinite()).sum())
        raise ValueError(
            f"{owner}: {name} must be finite, got NaN or inf in {count} of {value.numel()} entries."
        )


def size_of(owner: str, name: str, shape: Sequence[int]) -> Size:
    """The shape as a ``torch.Size``; raises unless it is a tuple of integers >= 0."""
    # torch has checked its own; under a tracer sizes are tensors
    if type(shape) is not Size and torch._C._get_tracing_state() is None:
        check_counts(owner, name, shape, at_least=0, empty=True)
    return Size(shape)


def event_shape_of(
    owner: str, input_dim: int | None, event_shape: int | Sequence[int] | None
) -> Size:
    """The shape of an event: of a vector of a size, or of any; raises unless one is given."""
    if input_dim is None:
        if event_shape is None:
            raise ValueError(
                f"{owner}: input_dim must be an integer >= 1, got None; or give event_shape."
            )
        return shape_of(owner, "event_shape", event_shape)
    check_count(owner, "input_dim", input_dim)
    if event_shape is not None:
        raise ValueError(
            f"{owner}: got input_dim = {input_dim} and event_shape = {shown(event_shape)}; "
            "input_dim is the size of a vector, event_shape the shape of any event. Give one of "
            "them."
        )
    return Size((input_dim,))


def shape_of(owner: str, name: str, value: int | Sequence[int], at_least: int = 1) -> Size:
    """A size or a shape as a shape; raises unless it is made of integers that are large enough."""
    if type(value) is Size and min(value, default=at_least) >= at_least:
        return value  # of integers, as torch has checked
    if is_count(value):
        check_count(owner, name, cast(int, value), at_least)
        return Size((cast(int, value),))
    check_counts(owner, name, value, at_least=at_least, empty=True)
    return Size(cast("Sequence[int]", value))


def input_dim_of(event_shape: Size | None) -> int | None:
    """The size of an event that is a vector; None of any other."""
    return event_shape[0] if event_shape is not None and len(event_shape) == 1 else None


def check_event(
    owner: str, name: str, value: Tensor, input_dim: int | None, event_dim: int
) -> None:
    """Raises unless ``value`` is a floating tensor whose event is what ``owner`` maps."""
    check_event_shape(owner, name, value, None if input_dim is None else (input_dim,), event_dim)


def check_event_shape(
    owner: str, name: str, value: Tensor, event_shape: tuple[int, ...] | None, event_dim: int
) -> None:
    """Raises unless ``value`` is a floating tensor ``(..., *event_shape)``; None is any shape."""
    check_floating(owner, name, value)
    if len(event_shape or ()) == event_dim == 1 and value.shape[-1:] == event_shape:
        return  # as is the rule
    if value.dim() < event_dim:
        last = "the last one is" if event_dim == 1 else f"the last {event_dim} are"
        raise ValueError(
            f"{owner}: {name} needs at least {event_dim} dimension(s), got {name}.shape = "
            f"{tuple(value.shape)}; {last} the event."
        )
    if event_shape is None or value.shape[value.dim() - len(event_shape) :] == event_shape:
        return
    if len(event_shape) == 1 and value.dim():
        raise ValueError(
            f"{owner}: {name} has last dimension {value.shape[-1]}, but input_dim is "
            f"{event_shape[0]} ({name}.shape = {tuple(value.shape)})."
        )
    raise ValueError(
        f"{owner}: {name} must have a shape that ends in event_shape = {tuple(event_shape)}, got "
        f"{name}.shape = {tuple(value.shape)}."
    )


def check_context(owner: str, context: Tensor | None, context_dim: int) -> None:
    """Raises unless ``context`` is there exactly when it is wanted, and as wide as wanted."""
    if context is None:
        if context_dim > 0:
            raise ValueError(
                f"{owner}: context is missing; it was built with context_dim = {context_dim}, so "
                f"pass context of shape (..., {context_dim}) or call .condition(context) first."
            )
        return
    if not isinstance(context, Tensor):
        raise TypeError(f"{owner}: context must be a torch.Tensor, got {type(context).__name__}.")
    if context_dim == 0:
        raise ValueError(
            f"{owner}: got a context of shape {tuple(context.shape)}, but it takes none "
            "(context_dim = 0); build it with context_dim > 0 or leave the context out."
        )
    if not context.is_floating_point():
        raise TypeError(
            f"{owner}: context must be a floating tensor, got {context.dtype}; "
            "one-hot encode categories or call .to(torch.get_default_dtype())."
        )
    if context.dim() < 1 or context.shape[-1] != context_dim:
        raise ValueError(
            f"{owner}: context has shape {tuple(context.shape)}, but its last dimension must be "
            f"context_dim = {context_dim}."
        )


def check_embedded(owner: str, c: object, context_dim: int) -> None:
    """Raises unless an embedding has made floating vectors of the width that is wanted."""
    if isinstance(c, Tensor) and c.is_floating_point() and c.shape[-1:] == (context_dim,):
        return
    raise ValueError(
        f"{owner}: embed must make a floating tensor of shape (..., {context_dim}) of the context "
        f"(context_dim = {context_dim}), got {shown(c)}. Change its last layer, or the context_dim "
        "that the transform is built with."
    )


def floating_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype that a module computes in: that of its first floating parameter or buffer, if any.

    It is asked for at every call, so it stops at the first one.
    """
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None and tensor.is_floating_point():
                return tensor.dtype
    for child in module._modules.values():
        if child is not None and (dtype := floating_dtype(child)) is not None:
            return dtype
    return None


def check_dtype(owner: str, name: str, value: Tensor, dtype: torch.dtype | None) -> None:
    """Raises unless ``value`` has the dtype that a module computes in; None stands for any.

    Torch would raise from the inside, or go on in one of the two, by the kind of the module. Under
    ``torch.autocast`` mixing is what the user asked for.
    """
    if dtype is None or value.dtype is dtype or torch.is_autocast_enabled(value.device.type):
        return
    raise TypeError(
        f"{owner}: {name} has dtype {value.dtype}, wanted {dtype}, the dtype of its parameters "
        f"and buffers. Call {name}.to({dtype}), or .to({value.dtype}) on the module."
    )


def joint_batch_shape(
    owner: str, name: str, value: Tensor, context: Tensor | None, event_dim: int
) -> torch.Size:
    """The batch shape of ``value`` broadcast with that of ``context``."""
    batch_shape = value.shape[: value.dim() - event_dim]
    if context is None:
        return batch_shape
    try:
        return torch.broadcast_shapes(batch_shape, context.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{owner}: the batch shape {tuple(batch_shape)} of {name} does not broadcast with the "
            f"batch shape {tuple(context.shape[:-1])} of context."
        ) from None


def order_of(owner: str, name: str, order: Any, input_dim: int | None = None) -> Tensor:
    """The order as a tensor of integers; raises unless it has each coordinate once."""
    values = order.tolist() if isinstance(order, (Tensor, np.ndarray)) else order
    if not is_sequence(values) or not all(is_count(value) for value in values):
        raise TypeError(f"{owner}: {name} must be a list of integers, got {shown(order)}.")
    size = len(values) if input_dim is None else input_dim
    if sorted(values) != list(range(max(size, 1))):
        raise ValueError(
            f"{owner}: {name} must have each of 0 to {max(size, 1) - 1} once, got {shown(order)}."
        )
    return torch.as_tensor(order, dtype=torch.long)


def check_ends(owner: str, name: str, ends: Any) -> None:
    """Raises unless ``ends`` are two finite numbers, the lower one first."""
    if not isinstance(ends, (tuple, list)) or len(ends) != 2:
        raise TypeError(f"{owner}: {name} must be two numbers (low, high), got {shown(ends)}.")
    for end in ends:
        check_number(owner, f"each end of {name}", end)
    if not ends[0] < ends[1]:
        raise ValueError(f"{owner}: {name} must be (low, high), got {shown(ends)}.")


def numbers_of(owner: str, name: str, value: float | Tensor, event_shape: Size) -> Tensor:
    """A number or an event as an event of its own; raises unless it is finite and fits."""
    if isinstance(value, Tensor):
        check_floating(owner, name, value)
        if value.shape not in ((), (1,), event_shape):
            raise ValueError(
                f"{owner}: {name} must be a number or have the shape {tuple(event_shape)}, got "
                f"{name}.shape = {tuple(value.shape)}."
            )
        check_finite(owner, name, value)
    else:
        check_number(owner, name, value)
    dtype = None if isinstance(value, Tensor) else torch.get_default_dtype()
    return torch.as_tensor(value, dtype=dtype).expand(event_shape).clone()


def check_draws(owner: str, name: str, draws: Mapping[str, Tensor]) -> None:
    """Raises unless ``draws`` has finite draws ``(S, *shape)`` of at least one site."""
    if not isinstance(draws, Mapping) or not all(isinstance(site, str) for site in draws):
        raise TypeError(
            f"{owner}: {name} must be a dictionary with the draws of each site, got {shown(draws)}."
        )
    if not draws:
        raise ValueError(f"{owner}: {name} must have draws of at least one site, got none.")
    for site, values in draws.items():
        what = f"{name}[{site!r}]"
        check_floating(owner, what, values)
        if not values.dim() or not values.numel():
            raise ValueError(
                f"{owner}: {what} must be draws of shape (S, ...), got {tuple(values.shape)}."
            )
        check_finite(owner, what, values)


def check_has(owner: str, name: str, value: object, attributes: Iterable[str], wanted: str) -> None:
    """Raises unless ``value`` has some attributes; a class is not what it makes."""
    if isinstance(value, type) or not all(hasattr(value, attribute) for attribute in attributes):
        raise TypeError(f"{owner}: {name} must be {wanted}, got {shown(value)}.")


def check_log_weights(owner: str, name: str, value: Tensor, count: int | None = None) -> None:
    """Raises unless ``value (S,)`` is finite or -inf, and not -inf throughout."""
    check_tensor(owner, name, value, (count,), finite=False)
    if bool((value.isnan() | (value == math.inf)).any()) or not bool(value.isfinite().any()):
        raise ValueError(
            f"{owner}: {name} must be finite or -inf, and some finite, got "
            f"{int((~value.isfinite()).sum())} of {len(value)} that are NaN, inf or -inf."
        )


def check_probabilities(owner: str, name: str, values: Any) -> None:
    """Raises unless ``values`` is a number from 0 to 1, or a list of such."""
    wanted = f"{owner}: {name} must be numbers from 0 to 1, got {shown(values)}."
    if isinstance(values, bool) or (isinstance(values, Tensor) and values.is_complex()):
        raise TypeError(wanted)
    try:
        given = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(wanted) from None
    if given.dim() > 1 or not given.numel() or not bool(((given >= 0) & (given <= 1)).all()):
        raise ValueError(wanted)
