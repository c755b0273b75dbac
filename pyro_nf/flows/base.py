"""Base distributions as Modules, so that they move with ``.to`` and may learn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_nf._checks import check_dims


class Base(nn.Module, ABC):
    """Makes the base distribution of a flow, with event shape ``(input_dim,)``.

    Args:
        input_dim: Size of the event.

    Raises:
        ValueError: If the dimension makes no sense.
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        check_dims(type(self).__name__, input_dim, 0)
        self.input_dim = input_dim

    def sizes(self) -> dict[str, int]:
        """The arguments of the constructor that decide the shapes of parameters and buffers."""
        return {"input_dim": self.input_dim}

    @abstractmethod
    def forward(self, batch_shape: Sequence[int] = ()) -> dist.TorchDistribution:
        """Returns a fresh distribution with this batch shape."""


class _Normal(dist.Normal):
    """Draws by ``randn``: under vmap each example may have noise of its own.

    Torch's own Normal fills an empty tensor in place, which vmap cannot do for each example.
    """

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.scale * noise


class DiagonalNormal(Base):
    r"""Independent normals, :math:`x_i \sim N(\mu_i, \sigma_i)`; standard normals by default.

    Args:
        input_dim: Size of the event.
        loc: Means, a number or shape ``(input_dim,)``.
        scale: Standard deviations, a number or shape ``(input_dim,)``, positive.

    Raises:
        ValueError: If a scale is not positive.

    Example:
        >>> DiagonalNormal(2, scale=3.0)().stddev.tolist()
        [3.0, 3.0]
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self, input_dim: int, loc: float | Tensor = 0.0, scale: float | Tensor = 1.0
    ) -> None:
        super().__init__(input_dim)
        loc, scale = torch.as_tensor(loc), torch.as_tensor(scale)
        if not bool((scale > 0).all()):
            raise ValueError(f"DiagonalNormal: scale must be positive, got {scale.tolist()}.")
        self.register_buffer("loc", loc.expand(input_dim).clone())
        self.register_buffer("scale", scale.expand(input_dim).clone())

    def forward(self, batch_shape: Sequence[int] = ()) -> dist.TorchDistribution:
        normal = _Normal(self.loc, self.scale, validate_args=False)
        return normal.expand(torch.Size(batch_shape) + self.loc.shape).to_event(1)
