"""A flow: a Module that makes distributions."""

from __future__ import annotations

from torch import Tensor, nn

from pyro_nf._checks import check_context
from pyro_nf.flows.base import Base, DiagonalNormal
from pyro_nf.flows.distribution import FlowDistribution
from pyro_nf.transforms.base import FlowTransform


class Flow(nn.Module):
    r"""A base distribution and a transform: call it to get a fresh Pyro distribution.

    ``flow()`` or, with ``context_dim > 0``, ``flow(context)``: the batch shape follows the context,
    and the base is expanded to it, so that each context has noise of its own.

    Args:
        transform: The map from base to data.
        base: Makes the base distribution; standard normals by default.

    Raises:
        ValueError: If the sizes of the two differ, or neither names one.
        TypeError: If an argument is of another kind.

    Example:
        >>> import torch
        >>> from pyro_nf.transforms.elementwise import Softsign
        >>> flow = Flow(Softsign(), DiagonalNormal(1, scale=3.0))  # two humps near -1 and 1
        >>> y = torch.tensor([[-0.8], [0.0], [0.8]])
        >>> (2 * flow().log_prob(y).exp()).round().tolist()
        [1.0, 0.0, 1.0]
    """

    def __init__(self, transform: FlowTransform, base: Base | None = None) -> None:
        super().__init__()
        if not isinstance(transform, FlowTransform):
            raise TypeError(
                f"Flow: transform must be a FlowTransform, got {type(transform).__name__}."
            )
        if base is None:
            if transform.input_dim is None:
                raise ValueError(
                    f"Flow: {type(transform).__name__} maps events of any size; pass a base, for "
                    "example DiagonalNormal(input_dim)."
                )
            base = DiagonalNormal(transform.input_dim)
        if not isinstance(base, Base):
            raise TypeError(f"Flow: base must be a Base, got {type(base).__name__}.")
        if transform.input_dim not in (None, base.input_dim):
            raise ValueError(
                f"Flow: the transform has input_dim {transform.input_dim}, but the base has "
                f"input_dim {base.input_dim}."
            )
        self.base = base
        self.transform = transform
        self.input_dim: int = base.input_dim
        self.context_dim: int = transform.context_dim

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """Makes the distribution.

        Args:
            context: Shape ``(..., context_dim)``; None if the flow takes none.

        Raises:
            ValueError: If the context is missing, superfluous or of the wrong width.
        """
        check_context(type(self).__name__, context, self.context_dim)
        if context is None:
            return FlowDistribution(self.base(), self.transform, self)
        base_dist = self.base(context.shape[:-1])
        return FlowDistribution(base_dist, self.transform.condition(context), self)
