"""Where a density fit starts: what is set from the data before the first gradient step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pyro_nf._checks import (
    check_context,
    check_count,
    check_event_rows,
    check_kind,
    check_listed,
    check_rows,
    check_work,
    seed_or_fresh,
)
from pyro_nf.flows.flow import Flow
from pyro_nf.flows.student import StudentT
from pyro_nf.train.budget import Budget
from pyro_nf.train.density.baselines import fit_gaussian_mixture

FARTHEST_NORMAL_ROW = 10.0
"""A table with an entry farther out, in units of its column, has heavy tails."""


class Start(ABC):
    """Sets parts of a flow from data; `fit_density` tries some and lets validation choose."""

    name: str

    @abstractmethod
    def __call__(self, flow: Flow, y: Tensor, context: Tensor | None) -> None:
        """Change the flow in place: its transform, or its base.

        Args:
            flow: The flow.
            y: Training rows as ``flow.transform`` sees them: in units of the columns if the flow
                has units. Shape ``(N, *event_shape)``.
            context: Their contexts likewise, in units and embedded, shape ``(N, C)``, or None.
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
        check_kind("AsGiven", "flow", flow, Flow)
        check_event_rows("AsGiven", "y", y, flow.event_shape)
        check_context("AsGiven", context, flow.context_dim)


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
        check_kind("Standardised", "flow", flow, Flow)
        check_event_rows("Standardised", "y", y, flow.event_shape)
        check_context("Standardised", context, flow.context_dim)
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
        check_kind("Whitened", "flow", flow, Flow)
        check_event_rows("Whitened", "y", y, flow.event_shape)
        check_context("Whitened", context, flow.context_dim)
        flow.transform.start_from_data(y, context, whiten=True)


class StudentTails(Start):
    """Another start, then a Student t base with learnable tails in place of the flow's base.

    Under a normal base a single row at 100 standard deviations costs 5,000 nats.

    *Tails of Lipschitz Triangular Flows* (Jaini, Kobyzev, Yu, Brubaker, 2020).

    Args:
        start: What sets the layers.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.recipes import nsf
        >>> flow, start = nsf(1), StudentTails(Whitened())
        >>> start(flow, torch.distributions.Cauchy(0.0, 1.0).sample((500, 1)), None)
        >>> start.name, type(flow.base).__name__
        ('whitened, Student t', 'StudentT')
    """

    def __init__(self, start: Start) -> None:
        check_kind("StudentTails", "start", start, Start)
        self.start = start
        self.name = f"{start.name}, Student t"

    def __call__(self, flow: Flow, y: Tensor, context: Tensor | None) -> None:
        """Set the layers, then exchange the base."""
        check_kind("StudentTails", "flow", flow, Flow)
        check_event_rows("StudentTails", "y", y, flow.event_shape)
        check_context("StudentTails", context, flow.context_dim)
        self.start(flow, y, context)
        flow.base = StudentT(flow.base.event_shape).to(y)


class MixtureBase(Start):
    """Whitened, then a Gaussian mixture, found by EM on the base side, in place of the flow's base.

    Such a flow can have separate clusters. It samples, but its draws carry no gradient. Only a flow
    of vectors can have that base.

    Args:
        held_out: Rows and contexts that choose the number of components; by default the last tenth
            of the rows.
        budget: Seconds that EM may take.
        most_work: Products that EM may take in all.
        seed: Seed of EM; the global generators are left alone. None for a fresh one.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.recipes import realnvp
        >>> flow = realnvp(1)
        >>> y = 0.1 * torch.randn(100, 2) + torch.tensor([-1.0, 1.0])  # two clusters
        >>> MixtureBase()(flow, y.reshape(200, 1), None)
        >>> type(flow.base).__name__
        'GaussianMixture'
    """

    name = "Gaussian mixture"

    def __init__(
        self,
        held_out: tuple[Tensor, Tensor | None] | None = None,
        budget: Budget | None = None,
        most_work: float = math.inf,
        seed: int | None = 0,
    ) -> None:
        if held_out is not None:
            check_listed("MixtureBase", "held_out", held_out, "rows and their contexts")
            check_count("MixtureBase", "the length of held_out", len(held_out), at_least=2)
            check_rows("MixtureBase", "the first of held_out", held_out[0])
        check_kind("MixtureBase", "budget", budget, Budget, optional=True)
        check_work("MixtureBase", "most_work", most_work)
        self.held_out, self.budget, self.most_work = held_out, budget, most_work
        self.seed = seed_or_fresh("MixtureBase", seed)

    def __call__(self, flow: Flow, y: Tensor, context: Tensor | None) -> None:
        """Whiten, then fit the mixture to what the base side sees."""
        check_kind("MixtureBase", "flow", flow, Flow)
        check_event_rows("MixtureBase", "y", y, flow.event_shape)
        check_context("MixtureBase", context, flow.context_dim)
        if flow.base.input_dim is None:
            raise ValueError(
                "MixtureBase: flow must have a base of vectors, got one with events of shape "
                f"{tuple(flow.base.event_shape)}; start such a flow by Whitened()."
            )
        Whitened()(flow, y, context)
        last = len(y) - max(len(y) // 10, 1)
        held_out = self.held_out
        if held_out is None:
            held_out = y[last:], None if context is None else context[last:]
            y, context = y[:last], None if context is None else context[:last]
        with torch.no_grad():
            x, v = (flow.transform.inverse_and_ladj(*rows)[0] for rows in ((y, context), held_out))
        flow.base = fit_gaussian_mixture(
            x,
            v,
            budget=self.budget,
            most_work=self.most_work,
            generator=torch.Generator().manual_seed(self.seed),
        )


def has_heavy_tails(y: Tensor) -> bool:
    """Whether an entry of standardised rows is farther out than a normal's ever is.

    Args:
        y: Rows in units of their columns, shape ``(N, *event_shape)``.
    """
    return bool((y.abs() > FARTHEST_NORMAL_ROW).any())
