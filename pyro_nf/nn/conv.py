"""A conditioner of images: a small residual convolutional network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor, nn

from pyro_nf._checks import check_context, check_count, check_event_shape, made_by, shape_of
from pyro_nf.nn.conditioner import in_one_batch

_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ConvNet(nn.Module):
    r"""A residual convolutional network from images to parameters of each pixel.

    .. math::
        h_0 = K_0 * x + V c, \qquad
        h_{l+1} = h_l + K_l' * \sigma(K_l * \sigma(h_l)), \qquad
        \theta = K * \sigma(h_L)

    Images are ``(C, H, W)``, sequences ``(C, T)``, volumes ``(C, A, B, E)``; what gets parameters
    has the same extent and any number of channels. The last layer starts at zero, so that every
    transform that it conditions starts at the identity. It is a conditioner: a
    :class:`~pyro_nf.transforms.Coupling` takes ``conditioner=ConvNet``, or
    ``partial(ConvNet, hidden_channels=64)``.

    *Deep Residual Learning for Image Recognition* (He, Zhang, Ren, Sun, 2016).

    Args:
        in_shape: Shape of ``x``, channels first.
        out_shape: Shape of the pixels that get parameters, channels first.
        num_params: How many parameters each of them gets.
        context_dim: Width of the context, which is added to all pixels; 0 for none.
        hidden_channels: Channels of the hidden layers.
        count_blocks: The number of residual blocks, :math:`L`.
        kernel_size: Width of the kernels, odd.
        activation: Makes :math:`\sigma`.

    Raises:
        ValueError: If a size makes no sense, or the extents differ.

    Example:
        >>> import torch
        >>> net = ConvNet((2, 8, 8), (1, 8, 8), 5, context_dim=4)
        >>> net(torch.zeros(7, 2, 8, 8), torch.zeros(4)).shape
        torch.Size([7, 1, 8, 8, 5])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        num_params: int,
        context_dim: int = 0,
        *,
        hidden_channels: int = 32,
        count_blocks: int = 2,
        kernel_size: int = 3,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.in_shape = shape_of("ConvNet", "in_shape", in_shape)
        out_shape = shape_of("ConvNet", "out_shape", out_shape)
        check_count("ConvNet", "num_params", num_params)
        check_count("ConvNet", "context_dim", context_dim, at_least=0)
        check_count("ConvNet", "hidden_channels", hidden_channels)
        check_count("ConvNet", "count_blocks", count_blocks, at_least=0)
        check_count("ConvNet", "kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(
                f"ConvNet: kernel_size must be odd, so that images keep their extent, got "
                f"{kernel_size}."
            )
        if len(self.in_shape) - 1 not in _CONVOLUTIONS or self.in_shape[1:] != out_shape[1:]:
            raise ValueError(
                "ConvNet: in_shape and out_shape must be channels and the same extent, as "
                f"(2, 8, 8) and (1, 8, 8), got {tuple(self.in_shape)} and {tuple(out_shape)}. For "
                "other events take another conditioner, as MLP."
            )
        self.context_dim = context_dim
        self.pixel_shape = (out_shape[0], num_params)
        convolution = _CONVOLUTIONS[len(self.in_shape) - 1]

        def layer(channels: int, out_channels: int, width: int = kernel_size) -> nn.Module:
            return convolution(channels, out_channels, width, padding=width // 2)

        self.first = layer(self.in_shape[0], hidden_channels)
        self.context = nn.Linear(context_dim, hidden_channels, bias=False) if context_dim else None
        self.blocks = nn.ModuleList(
            nn.Sequential(
                made_by("ConvNet", activation),
                layer(hidden_channels, hidden_channels),
                made_by("ConvNet", activation),
                layer(hidden_channels, hidden_channels),
            )
            for _ in range(count_blocks)
        )
        self.activation = made_by("ConvNet", activation)
        self.last = layer(hidden_channels, out_shape[0] * num_params, 1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_event_shape("ConvNet", "x", x, self.in_shape, len(self.in_shape))
        check_context("ConvNet", context, self.context_dim)
        return in_one_batch(self._params, x, len(self.in_shape), context)

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The parameters ``(N, *out_shape, num_params)`` of one batch of images."""
        h = cast(Tensor, self.first(x))
        if self.context is not None:
            c = self.context(context)
            h = h + c.reshape(*c.shape, *(1,) * (h.dim() - 2))
        for block in self.blocks:
            h = h + block(h)
        theta = cast(Tensor, self.last(self.activation(h)))
        return theta.unflatten(1, self.pixel_shape).movedim(2, -1)
