"""Every message about shapes, context and dtype: what, wanted, got, do."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor, nn


def check_dims(owner: str, input_dim: int | None, context_dim: int) -> None:
    """Raises unless the dimensions that a transform was built with make sense."""
    if input_dim is not None and (not is_count(input_dim) or input_dim < 1):
        raise ValueError(f"{owner}: input_dim must be a positive integer, got {input_dim!r}.")
    check_count(owner, "context_dim", context_dim, at_least=0)


def check_count(owner: str, name: str, value: int, at_least: int = 1) -> None:
    """Raises unless ``value`` is an integer that is large enough."""
    if not is_count(value) or value < at_least:
        raise ValueError(f"{owner}: {name} must be an integer >= {at_least}, got {value!r}.")


def is_count(value: object) -> bool:
    """Whether a value is an integer, of numpy's for example, but no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number, of numpy's for example, but no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_positive(owner: str, name: str, value: float) -> None:
    """Raises unless ``value`` is a positive finite number."""
    if not is_number(value) or not 0 < value < float("inf"):
        raise ValueError(f"{owner}: {name} must be a positive number, got {value!r}.")


def check_event(
    owner: str, name: str, value: Tensor, input_dim: int | None, event_dim: int
) -> None:
    """Raises unless ``value`` is a floating tensor whose event is what ``owner`` maps."""
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
    if value.dim() < event_dim:
        raise ValueError(
            f"{owner}: {name} needs at least {event_dim} dimension(s), got {name}.shape = "
            f"{tuple(value.shape)}; the last one is the event."
        )
    if input_dim is not None and value.shape[-1] != input_dim:
        raise ValueError(
            f"{owner}: {name} has last dimension {value.shape[-1]}, but input_dim is {input_dim} "
            f"({name}.shape = {tuple(value.shape)})."
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
