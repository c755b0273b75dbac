"""Conditioners that a user gives to a scheme: the contract, its checks, and the call."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Size, Tensor, nn

from pyro_nf._checks import check_callable, floating_dtype, shown

#: Makes the network of a scheme. It is called as
#: ``conditioner(in_shape, out_shape, num_params, context_dim)`` and returns a Module, which is
#: called as ``net(x, context)``:
#:
#: - ``x (N, *in_shape)`` is what the scheme lets it see, ``context (N, context_dim)`` the context,
#:   or None where ``context_dim`` is 0;
#: - it returns ``(N, *out_shape, num_params)``, each row from its own ``x`` and context alone.
#:
#: Parameters of zero are the identity, so a network whose last layer is zero is a good start.
Conditioner = Callable[[Size, Size, int, int], nn.Module]

_WANTED = (
    "a function (in_shape, out_shape, num_params, context_dim) that makes a Module, such as "
    "pyro_nf.nn.MLP or pyro_nf.nn.ConvNet"
)
# Rows that are tried to see whether a network is autoregressive.
_MOST_PROBES = 128


def network_of(
    owner: str,
    conditioner: Conditioner,
    in_shape: Size,
    out_shape: Size,
    num_params: int,
    context_dim: int,
) -> nn.Module:
    """The network that a conditioner makes, after a trial with two rows.

    Args:
        owner: Who asks, for the messages.
        conditioner: What the user gave.
        in_shape: Shape of what the network sees.
        out_shape: Shape of the entries that get parameters.
        num_params: How many parameters each of them gets.
        context_dim: Width of the context, 0 for none.

    Raises:
        TypeError: If it is no such function, or makes no Module.
        ValueError: If the network does not run, or makes tensors of another shape.
    """
    if isinstance(conditioner, nn.Module):
        made = type(conditioner).__name__
        raise TypeError(f"{owner}: conditioner must be {_WANTED}, got the Module {made} itself.")
    check_callable(owner, "conditioner", conditioner, _WANTED, count=4)
    asked = (
        f"in_shape = {tuple(in_shape)}, out_shape = {tuple(out_shape)}, num_params = {num_params} "
        f"and context_dim = {context_dim}"
    )
    try:
        net = conditioner(in_shape, out_shape, num_params, context_dim)
    except Exception as error:
        raise ValueError(
            f"{owner}: conditioner made no network for {asked}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(net, nn.Module):
        raise TypeError(f"{owner}: conditioner must be {_WANTED}; it made {shown(net)}.")
    x, context = _rows(net, 2, in_shape, context_dim)
    modes = {module: module.training for module in net.modules()}
    try:
        with torch.no_grad():
            params = net.eval()(x, context)
    except Exception as error:
        raise ValueError(
            f"{owner}: the network {type(net).__name__} of conditioner does not run as "
            f"net(x, context), with {asked}: {type(error).__name__}: {error}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    wanted = (2, *out_shape, num_params)
    if not isinstance(params, Tensor) or params.shape != wanted:
        raise ValueError(
            f"{owner}: the network {type(net).__name__} of conditioner must return a tensor of "
            f"shape (N, *out_shape, num_params), which is {wanted} for two rows, got "
            f"{shown(params)}; it was asked for with {asked}."
        )
    return net


def check_autoregressive(owner: str, net: nn.Module, event_shape: Size, context_dim: int) -> None:
    """Raises unless the parameters of each entry depend on the entries before it alone.

    A copy with random weights sees an event, and others that differ from entry ``k`` on: then the
    parameters of the entries up to ``k`` must be the same.

    Args:
        owner: Who asks, for the message.
        net: The network, of events of this shape.
        event_shape: Shape of the event, whose entries are in the order of their indices.
        context_dim: Width of the context, 0 for none.

    Raises:
        ValueError: If some depend on others.
    """
    generator = torch.Generator().manual_seed(0)
    net = copy.deepcopy(net).double().eval()
    count = event_shape.numel()
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise.to(parameter) / fan_in**0.5)
        k = torch.arange(count).split(-(-count // _MOST_PROBES))
        from_k = torch.tensor([int(part[-1]) for part in k] + [count]).unsqueeze(-1)
        two, context = _rows(net, 2, Size((count,)), context_dim)
        changed = torch.arange(count) >= from_k
        x = torch.where(changed.to(two.device), two[1], two[0]).reshape(-1, *event_shape)
        context = None if context is None else context[:1].expand(len(x), -1)
        params = net(x, context).reshape(len(x), count, -1)
    error = (params - params[-1]).abs() / params[-1].abs().clamp_min(1.0)
    moved = (error.amax(-1) > 1e-9).cpu() & (torch.arange(count) <= from_k)
    if bool(moved.any()):
        row, entry = moved.nonzero()[0].tolist()
        raise ValueError(
            f"{owner}: the network {type(net).__name__} of conditioner is not autoregressive: the "
            f"parameters of entry {entry} of an event of shape {tuple(event_shape)} change with "
            f"entries from {int(from_k[row])} on. They may see the entries before {entry} alone, "
            "in the order of a flattened event; mask the others."
        )


def _rows(
    net: nn.Module, count: int, in_shape: Size, context_dim: int
) -> tuple[Tensor, Tensor | None]:
    """Random rows and contexts as a network takes them; the global generators are left alone."""
    generator = torch.Generator().manual_seed(1)
    like = torch.empty(
        0,
        dtype=floating_dtype(net) or torch.get_default_dtype(),
        device=next(net.parameters(), torch.empty(0)).device,
    )
    x = torch.randn(count, *in_shape, generator=generator).to(like)
    context = torch.randn(count, context_dim, generator=generator).to(like)
    return x, context if context_dim else None


def in_one_batch(
    net: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    event_dim: int,
    context: Tensor | None,
) -> Tensor:
    """Calls a network that knows one batch dimension with any batch shape.

    Args:
        net: Takes ``(N, *in_shape)`` and ``(N, context_dim)`` or None, returns ``(N, ...)``.
        x: Shape ``(..., *in_shape)``.
        event_dim: The length of ``in_shape``.
        context: Shape ``(..., context_dim)``, whose batch broadcasts against that of ``x``.

    Returns:
        Shape ``(..., ...)``: the batch shape of both, and what the network returns of a row.

    Example:
        >>> import torch
        >>> net = lambda x, context: x.flatten(1) + context
        >>> in_one_batch(net, torch.zeros(5, 1, 2, 2), 2, torch.zeros(3, 4)).shape
        torch.Size([5, 3, 4])
    """
    batch_shape, in_shape = x.shape[: x.dim() - event_dim], x.shape[x.dim() - event_dim :]
    if context is not None:
        width = context.shape[-1:]
        batch_shape = torch.broadcast_shapes(batch_shape, context.shape[:-1])
        context = context.expand(batch_shape + width).reshape(batch_shape.numel(), *width)
    rows = x.expand(batch_shape + in_shape).reshape(batch_shape.numel(), *in_shape)
    made = net(rows, context)
    return made.reshape(batch_shape + made.shape[1:])
