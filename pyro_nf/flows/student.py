"""Student's t as a base distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import nn

from pyro_nf._checks import check_positive, size_of
from pyro_nf.flows.base import Base


class StudentT(Base):
    r"""Independent standard Student t, :math:`x_i \sim t_{\nu_i}`, with learnable :math:`\nu_i`.

    Its tails are heavy, so that rows far out cost a logarithm and not a square.

    *Tails of Lipschitz Triangular Flows* (Jaini, Kobyzev, Yu, Brubaker, 2020).

    Args:
        event_shape: Shape of the event; an integer is the size of a vector.
        df: Where the degrees of freedom :math:`\nu` start.
        input_dim: Size of a vector, instead of ``event_shape``.

    Raises:
        ValueError: If ``df`` is not positive.

    Example:
        >>> StudentT(2, df=3.0)().variance.tolist()
        [3.0, 3.0]
    """

    def __init__(
        self,
        event_shape: int | Sequence[int] | None = None,
        df: float = 5.0,
        *,
        input_dim: int | None = None,
    ) -> None:
        super().__init__(event_shape, input_dim=input_dim)
        check_positive("StudentT", "df", df)
        self.log_df = nn.Parameter(torch.full(self.event_shape, math.log(df)))

    def forward(self, batch_shape: Sequence[int] = ()) -> dist.TorchDistribution:
        zero = torch.zeros_like(self.log_df)
        student = dist.StudentT(self.log_df.exp(), zero, zero + 1, validate_args=False)
        return student.expand(
            size_of("StudentT", "batch_shape", batch_shape) + zero.shape
        ).to_event(zero.dim())
