"""A mixture of Gaussians as a base distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn

from pyro_nf._checks import check_count, check_tensor, size_of
from pyro_nf.flows.base import Base

LOG_2PI = math.log(2 * math.pi)


class GaussianMixture(Base):
    r"""A mixture of Gaussians with full covariances, all of it learnable.

    .. math:: p(x) = \sum_k \pi_k \, N(x; m_k, (U_k U_k^T)^{-1}), \qquad
        \log N = \sum_i \log U_{k,ii} - \tfrac{1}{2} \|(x - m_k) U_k\|^2 - \tfrac{D}{2} \log 2 \pi

    :math:`U_k` is upper triangular with a positive diagonal. At zero parameters every component is
    the standard normal. A base with several components lets a flow have separate clusters, which a
    smooth map of one normal cannot. It samples, but the draws carry no gradient.

    Args:
        input_dim: Size of the event, D.
        count_components: The number of components, K.

    Raises:
        ValueError: If a size makes no sense.

    Example:
        >>> GaussianMixture(2, count_components=3)().log_prob(torch.zeros(2)).item()  # -log(2 pi)
        -1.83787...
    """

    def __init__(self, input_dim: int, count_components: int) -> None:
        check_count("GaussianMixture", "input_dim", input_dim)
        super().__init__(input_dim)
        check_count("GaussianMixture", "count_components", count_components)
        k, d = count_components, input_dim
        self.logits = nn.Parameter(torch.zeros(k))
        self.means = nn.Parameter(torch.zeros(k, d))
        self.log_diagonals = nn.Parameter(torch.zeros(k, d))
        self.triangles = nn.Parameter(torch.zeros(k, d, d))

    def sizes(self) -> dict[str, Any]:
        return {**super().sizes(), "count_components": self.count_components}

    @property
    def count_components(self) -> int:
        """The number of components, K."""
        return len(self.logits)

    @classmethod
    def from_moments(cls, log_weights: Tensor, means: Tensor, factors: Tensor) -> GaussianMixture:
        """The mixture with these weights, means and factors.

        Args:
            log_weights: Shape ``(K,)``; normalised here.
            means: Shape ``(K, D)``.
            factors: The upper-triangular :math:`U_k` with positive diagonals, shape ``(K, D, D)``.
        """
        check_tensor("GaussianMixture", "means", means, (None, None))
        k, d = means.shape
        check_tensor("GaussianMixture", "log_weights", log_weights, (k,))
        check_tensor("GaussianMixture", "factors", factors, (k, d, d))
        if not bool((factors.diagonal(dim1=-2, dim2=-1) > 0).all()):
            raise ValueError(
                "GaussianMixture: factors must have positive diagonals, got "
                f"{float(factors.diagonal(dim1=-2, dim2=-1).min())} on one; factors are upper "
                "triangular, U with U U^T the precision."
            )
        mixture = cls(means.shape[1], len(means)).to(means)
        with torch.no_grad():
            mixture.logits.copy_(log_weights)
            mixture.means.copy_(means)
            mixture.log_diagonals.copy_(factors.diagonal(dim1=-2, dim2=-1).log())
            mixture.triangles.copy_(factors.triu(1))
        return mixture

    def forward(self, batch_shape: Sequence[int] = ()) -> dist.TorchDistribution:
        factors = self.triangles.triu(1) + self.log_diagonals.exp().diag_embed()
        return GaussianMixtureDistribution(
            self.logits.log_softmax(-1),
            self.means,
            factors,
            self.log_diagonals.sum(-1),
            size_of("GaussianMixture", "batch_shape", batch_shape),
        )


class GaussianMixtureDistribution(dist.TorchDistribution):
    """What :class:`GaussianMixture` makes.

    Args:
        log_weights: Shape ``(K,)``, normalised.
        means: Shape ``(K, D)``.
        factors: Upper-triangular factors of the precisions, shape ``(K, D, D)``.
        log_dets: The logarithms of their determinants, shape ``(K,)``.
        batch_shape: Any; all elements have the same law.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.real_vector

    def __init__(
        self,
        log_weights: Tensor,
        means: Tensor,
        factors: Tensor,
        log_dets: Tensor,
        batch_shape: Sequence[int] = (),
    ) -> None:
        self.log_weights, self.means, self.factors = log_weights, means, factors
        self.log_dets = log_dets
        super().__init__(Size(batch_shape), means.shape[-1:], validate_args=False)

    def expand(
        self, batch_shape: Sequence[int], _instance: Any = None
    ) -> GaussianMixtureDistribution:
        """The same law for each element of another batch shape."""
        return GaussianMixtureDistribution(
            self.log_weights, self.means, self.factors, self.log_dets, Size(batch_shape)
        )

    def joint_log_prob(self, x: Tensor) -> Tensor:
        """Log p(k, x) of every component, ``(..., D) -> (..., K)``."""
        m, u, d = self.means, self.factors, self.means.shape[-1]
        # one matrix product for all components: (x - m_k) U_k = x U_k - m_k U_k
        shift = (m.unsqueeze(-2) @ u).flatten()
        z = (x @ u.movedim(0, 1).reshape(d, -1) - shift).unflatten(-1, (-1, d))
        return self.log_weights + self.log_dets - 0.5 * z.square().sum(-1) - 0.5 * d * LOG_2PI

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, ``(..., D) -> (...)``."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return self.joint_log_prob(value).logsumexp(-1).expand(shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Raises: a draw's component changes in jumps, so that no gradient goes through it.

        Raises:
            NotImplementedError: Always; the message says what to do.
        """
        raise NotImplementedError(
            "GaussianMixture: draws of a mixture carry no gradient, so rsample is not there. Use "
            "sample(), or a base with gradients: fit_density(..., starts=(Standardised(), "
            "Whitened())) keeps the one that the flow has."
        )

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, without gradients."""
        with torch.no_grad():
            shape = Size(sample_shape) + self.batch_shape
            k = torch.multinomial(self.log_weights.exp(), max(shape.numel(), 1), replacement=True)
            k = k[: shape.numel()]
            z = torch.randn_like(self.means[k]).unsqueeze(-2)
            # (x - m) U = z, a triangular solve from the right
            x = torch.linalg.solve_triangular(self.factors[k], z, upper=True, left=False)
            return (self.means[k] + x.squeeze(-2)).reshape(shape + self.event_shape)
