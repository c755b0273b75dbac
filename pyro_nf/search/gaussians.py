"""Gaussians near a posterior: their scales from its curvature, and how good they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_nf.model.joint import LogJoint
from pyro_nf.model.metered import Metered
from pyro_nf.ops.devices import in_double

# Above this many dimensions no D x D matrix is made: the candidates have diagonal scales.
MAX_FULL_DIM = 300
# An axis along which the density hardly falls is given these scales, to be chosen by ELBO.
MAX_SCALES = (10.0, 1000.0)
# Probes of a diagonal of second derivatives.
COUNT_PROBES = 32


def hessian_rows(dim: int) -> int:
    """Rows of the batch by which the curvature at a point of so many coordinates is found."""
    return dim if dim <= MAX_FULL_DIM else COUNT_PROBES


def sample_gaussian(loc: Tensor, scale: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """z (..., D) = m + L eps and log q(z) (...,); L is a matrix (D, D) or its diagonal (D,)."""
    if scale.dim() == 1:
        z, ladj = loc + scale * eps, scale.log().sum()
    else:
        z, ladj = loc + eps @ scale.mT, scale.diagonal().log().sum()
    log_normal = -0.5 * (eps**2).sum(-1) - 0.5 * loc.shape[-1] * math.log(2 * math.pi)
    return z, log_normal - ladj


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


def diagonal_precision(joint: LogJoint, z: Tensor, generator: torch.Generator) -> Tensor:
    """|diag H| by Hutchinson's probes v * (H v), without a D x D matrix."""
    probes = torch.randint(0, 2, (COUNT_PROBES, len(z)), generator=generator).to(z) * 2 - 1
    batch = z.expand(COUNT_PROBES, -1).clone().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(joint._evaluate(batch).sum(), batch, create_graph=True)
        (product,) = torch.autograd.grad((grad * probes).sum(), batch)
    diagonal = (product * probes).mean(0)
    if not bool(torch.isfinite(diagonal).all()):
        raise ValueError("the Hessian is not finite.")
    return diagonal.abs()


def gaussian_elbos(
    joint: LogJoint | Metered, candidates: list[tuple[Tensor, Tensor]], eps: Tensor
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
