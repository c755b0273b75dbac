"""Gaussians and Student-ts near a posterior: scales from its curvature, and how good they are."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_nf.model.density import LogDensity
from pyro_nf.model.metered import Metered
from pyro_nf.ops.devices import in_double
from pyro_nf.transforms.linear import shrunk_covariance

# Above this many dimensions no D x D matrix is made: the candidates have diagonal scales.
MAX_FULL_DIM = 300
# An axis along which the density hardly falls is given these scales, to be chosen by ELBO.
MAX_SCALES = (10.0, 1000.0)
# Probes of a diagonal of second derivatives.
NUM_PROBES = 32
# Step of a difference of gradients, in sds of its coordinate.
_DIFFERENCE = 0.25
# Degrees of freedom of the Student-ts.
_DEGREES = 5.0


def hessian_rows(dim: int) -> int:
    """Rows of the batch by which the curvature at a point of so many coordinates is found."""
    return dim if dim <= MAX_FULL_DIM else NUM_PROBES


def sample_gaussian(loc: Tensor, scale: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """z (..., D) = m + L eps and log q(z) (...,); L is a matrix (D, D) or its diagonal (D,)."""
    if scale.dim() == 1:
        z, ladj = loc + scale * eps, scale.log().sum()
    else:
        z, ladj = loc + eps @ scale.mT, scale.diagonal().log().sum()
    log_normal = -0.5 * (eps**2).sum(-1) - 0.5 * loc.shape[-1] * math.log(2 * math.pi)
    return z, log_normal - ladj


def mean_and_root(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and lower root of the covariance of draws (N, D), shrunk towards its diagonal."""
    covariance = shrunk_covariance(in_double(z))
    jitter = 1e-10 * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
    return z.mean(0), torch.linalg.cholesky(covariance + jitter).to(z)


def laplace_scale(hessian: Tensor, max_scale: float = MAX_SCALES[-1]) -> Tensor:
    r"""Lower-triangular L_0 with :math:`L_0 L_0^\top = |-H|^{-1}`.

    The absolute value is that of the eigenvalues: at a point that is no maximum, the directions in
    which the density rises get the scale of their curvature. In flat directions it is bounded.

    Args:
        hessian: H of the log density (D, D).
        max_scale: the bound.

    Raises:
        ValueError: H is not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("laplace_scale: the Hessian is not finite.")
    precision, axes = torch.linalg.eigh(-in_double(hessian))
    # Rounding hides eigenvalues that are this much smaller than the largest.
    floor = torch.finfo(hessian.dtype).eps * precision.abs().max()
    variance = 1 / precision.abs().clamp_min(floor).clamp_min(max_scale**-2)
    # A Gaussian's square root A of any shape has the triangular root R^T with A^T = Q R.
    root = axes * variance.sqrt()
    R = torch.linalg.qr(root.mT)[1]
    lower = (R * R.diagonal().sign().unsqueeze(-1)).mT
    return lower.to(hessian)


def diagonal_precision(joint: LogDensity, z: Tensor, generator: torch.Generator) -> Tensor:
    """|diag H| by Hutchinson's probes v * (H v), without a D x D matrix."""
    probes = torch.randint(0, 2, (NUM_PROBES, len(z)), generator=generator).to(z) * 2 - 1
    batch = z.expand(NUM_PROBES, -1).clone().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(joint.evaluate(batch).sum(), batch, create_graph=True)
        (product,) = torch.autograd.grad((grad * probes).sum(), batch)
    diagonal = (product * probes).mean(0)
    if not bool(torch.isfinite(diagonal).all()):
        raise ValueError("the Hessian is not finite.")
    return diagonal.abs()


def curvature_scale(joint: LogDensity, z: Tensor) -> Tensor | None:
    """L of Laplace's approximation at one point ``(D,)``; None where there is no curvature.

    The second derivative by backward passes is NaN where ``logsumexp`` meets pieces that are far
    apart, although the gradient is right. There it comes from differences of gradients.

    Args:
        joint: The log joint density.
        z: The point.
    """
    if len(z) > MAX_FULL_DIM:
        try:
            return diagonal_precision(joint, z, torch.Generator().manual_seed(0)).rsqrt()
        except (ValueError, RuntimeError):
            return None
    for hessian in _hessians(joint, z):
        if bool(hessian.isfinite().all()):
            try:
                return laplace_scale(hessian)
            except (ValueError, RuntimeError):
                continue
    return None


def _hessians(joint: LogDensity, z: Tensor) -> Iterator[Tensor]:
    with contextlib.suppress(RuntimeError):  # an operation without a second derivative
        yield joint.hessian(z)
    yield difference_hessian(joint, z)


def difference_hessian(joint: LogDensity, z: Tensor) -> Tensor:
    r"""The Hessian at one point from central differences of gradients, ``(D, D)``.

    .. math:: H_{\cdot d} = \frac{g(z + h_d e_d) - g(z - h_d e_d)}{2 h_d}

    Each step :math:`h_d` becomes a quarter of :math:`|H_{dd}|^{-1/2}`, the scale of its coordinate.

    Args:
        joint: The log joint density.
        z: The point ``(D,)``.
    """
    dim = len(z)
    h = 1e-2 * torch.ones_like(z)
    for _ in range(12):
        steps = h.diag_embed()
        _, grad = joint.value_and_grad(torch.cat([z + steps, z - steps]))
        hessian = (grad[:dim] - grad[dim:]) / (2 * h).unsqueeze(-1)
        wanted = _DIFFERENCE * hessian.diagonal().abs().clamp_min(1e-12).rsqrt()
        wanted = wanted.clamp(1e-6, 10.0)
        if bool(((h <= 2 * wanted) & (h >= 0.25 * wanted)).all()):
            break
        h = torch.minimum(torch.maximum(wanted, 0.1 * h), 10 * h)
    return 0.5 * (hessian + hessian.mT)


def gaussian_elbos(
    joint: LogDensity, candidates: list[tuple[Tensor, Tensor]], eps: Tensor
) -> Tensor:
    """ELBO (C,) of each Gaussian (loc, scale), all with the same normal draws eps (S, D).

    If each run of the model is dear, one serves them all.
    """
    pairs = [sample_gaussian(loc, scale, eps) for loc, scale in candidates]
    with torch.no_grad():
        if isinstance(joint, Metered) and joint.prefers_one_batch(len(pairs), len(eps)):
            log_p = joint.log_prob(torch.stack([z for z, _ in pairs]))
        else:
            log_p = torch.stack([joint.log_prob(z) for z, _ in pairs])
    log_q = torch.stack([q for _, q in pairs])
    failed = ~torch.isfinite(log_p)
    # A Gaussian half of whose draws have no density is no start, yet a few failures are no ruin.
    elbo = torch.where(failed, 0.0, log_p - log_q).sum(-1) / (~failed).sum(-1).clamp_min(1)
    return torch.where(failed.to(elbo).mean(-1) < 0.25, elbo, -torch.inf)


@dataclass(frozen=True)
class StudentT:
    """A multivariate Student-t with 5 degrees of freedom.

    Attributes:
        loc: m, ``(D,)``.
        scale: L, lower triangular ``(D, D)``, or its diagonal ``(D,)`` in high dimensions.
    """

    loc: Tensor
    scale: Tensor

    @property
    def log_det(self) -> Tensor:
        """log det L, ``()``."""
        diagonal = self.scale if self.scale.dim() == 1 else self.scale.diagonal()
        return diagonal.abs().log().sum()

    def distance(self, z: Tensor) -> Tensor:
        r"""Squared Mahalanobis distance :math:`|L^{-1}(z - m)|^2` of ``z (S, D)``, ``(S,)``."""
        centred = z - self.loc
        if self.scale.dim() == 1:
            return (centred / self.scale).square().sum(-1)
        white = torch.linalg.solve_triangular(self.scale, centred.mT, upper=False)
        return white.square().sum(0)

    def sample(self, count: int) -> Tensor:
        """Draws, ``(count, D)``."""
        chi2 = torch.distributions.Chi2(torch.full((count, 1), _DEGREES)).sample()
        eps = (torch.randn(count, len(self.loc)) * (_DEGREES / chi2).sqrt()).to(self.loc)
        return self.loc + (self.scale * eps if self.scale.dim() == 1 else eps @ self.scale.mT)

    def log_prob(self, z: Tensor) -> Tensor:
        """The log density at ``z (S, D)``, ``(S,)``."""
        nu, dim = _DEGREES, len(self.loc)
        norm = math.lgamma((nu + dim) / 2) - math.lgamma(nu / 2) - dim / 2 * math.log(nu * math.pi)
        return norm - self.log_det - (nu + dim) / 2 * (self.distance(z) / nu).log1p()
