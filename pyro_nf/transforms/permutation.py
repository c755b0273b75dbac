"""Permutations of the coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_nf._checks import check_count, check_seed, order_of
from pyro_nf.transforms.base import FlowTransform


class Permutation(FlowTransform):
    r"""A fixed order of the coordinates, :math:`y_i = x_{\pi(i)}`; both directions fast, exact.

    The order is a buffer: it travels with ``state_dict`` and ``.to(device)``. A random order is a
    function of its seed alone, so that the same call builds the same transform in every process.

    Args:
        permutation: The order :math:`\pi`, each of 0 to D - 1 once.

    Raises:
        ValueError: If it is not a permutation.

    Example:
        >>> import torch
        >>> Permutation.reverse(3)(torch.tensor([1.0, 2.0, 3.0])).tolist()
        [3.0, 2.0, 1.0]
    """

    permutation: Tensor
    inverse_permutation: Tensor

    def __init__(self, permutation: Sequence[int] | Tensor) -> None:
        order = order_of("Permutation", "permutation", permutation)
        super().__init__(len(order))
        self.register_buffer("permutation", order)
        self.register_buffer("inverse_permutation", order.argsort())

    @classmethod
    def reverse(cls, input_dim: int) -> Permutation:
        """The last coordinate first."""
        check_count("Permutation.reverse", "input_dim", input_dim)
        return cls(range(input_dim - 1, -1, -1))

    @classmethod
    def random(cls, input_dim: int, seed: int = 0) -> Permutation:
        """A random order with a seed of its own; the global generator is left alone."""
        check_count("Permutation.random", "input_dim", input_dim)
        check_seed("Permutation.random", seed)
        return cls(torch.randperm(input_dim, generator=torch.Generator().manual_seed(seed)))

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.permutation), x.new_zeros(x.shape[:-1])

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return y.index_select(-1, self.inverse_permutation), y.new_zeros(y.shape[:-1])
