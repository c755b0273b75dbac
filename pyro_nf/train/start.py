"""Where a density fit starts: what is set from the data before the first gradient step."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from pyro_nf.flows.base import DiagonalNormal
from pyro_nf.flows.flow import Flow
from pyro_nf.flows.student import StudentT

FARTHEST_NORMAL_ROW = 10.0
"""A table with an entry farther from its column's mean, in standard deviations, has heavy tails."""


class Start(ABC):
    """Sets parts of a flow from data; `fit_density` tries some and lets validation choose."""

    name: str

    @abstractmethod
    def __call__(self, flow: Flow, y: Tensor, context: Tensor | None) -> None:
        """Change the flow in place.

        Args:
            flow: The flow.
            y: Training rows, shape ``(N, D)``.
            context: Their contexts, shape ``(N, C)``, or None.
        """


class AsGiven(Start):
    """Leaves the flow as it is: for a flow that was trained before.

    Example:
        >>> AsGiven().name
        'as given'
    """

    name = "as given"

    def __call__(self, flow: Flow, y: Tensor, context: Tensor | None) -> None:
        """Do nothing."""


class Standardised(Start):
    """Linear and ActNorm layers take the means and scales of the columns.

    Marginals stay marginals, which suits tables whose columns are strange each by itself.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.recipes import nsf
        >>> flow = nsf(2)
        >>> Standardised()(flow, 5 + torch.randn(100, 2), None)
        >>> bool(((flow().sample((1000,)).mean(0) - 5).abs() < 0.5).all())
        True
    """

    name = "standardised"

    def __call__(self, flow: Flow, y: Tensor, context: Tensor | None) -> None:
        """Set the layers from the data side to the base side."""
        flow.transform.start_from_data(y, context, whiten=False)


class Whitened(Start):
    """Linear layers remove the correlations too, with a covariance shrunk towards its diagonal.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.recipes import nsf
        >>> flow = nsf(2)
        >>> Whitened()(flow, torch.randn(100, 1) * torch.ones(2) + 0.1 * torch.randn(100, 2), None)
        >>> bool(flow().sample((1000,)).T.corrcoef()[0, 1] > 0.9)
        True
    """

    name = "whitened"

    def __call__(self, flow: Flow, y: Tensor, context: Tensor | None) -> None:
        """Set the layers from the data side to the base side."""
        flow.transform.start_from_data(y, context, whiten=True)


def start_tails(flow: Flow, y: Tensor) -> None:
    """Give the flow a Student t base if the data have heavy tails and its base is a fixed normal.

    Under a normal base a single row at 100 standard deviations costs 5,000 nats.

    Args:
        flow: The flow.
        y: Training rows, shape ``(N, D)``.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.recipes import nsf
        >>> flow = nsf(1)
        >>> start_tails(flow, torch.distributions.Cauchy(0.0, 1.0).sample((500, 1)))
        >>> type(flow.base).__name__
        'StudentT'
    """
    sd = y.std(0, correction=0)
    far = ((y - y.mean(0)).abs() > FARTHEST_NORMAL_ROW * sd) & (sd > 0)
    if bool(far.any()) and type(flow.base) is DiagonalNormal:
        flow.base = StudentT(flow.base.input_dim).to(y)
