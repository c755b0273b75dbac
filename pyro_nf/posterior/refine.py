r"""From a good guide to exact draws: Markov chains that use the flow.

With :math:`z = T(x)` the posterior pulled back to the flow's base has the density
:math:`\log \pi(x) = \log p(T(x)) + \log|\det J_T(x)|`, nearly that of standard normals if the guide
is good.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor
from tqdm import tqdm

from pyro_nf._checks import check_count, check_kind
from pyro_nf.flows.distribution import FlowDistribution
from pyro_nf.model.density import LogDensity
from pyro_nf.transforms.kinds import check_exact

# The acceptance rate at which MALA is most efficient (Roberts and Rosenthal, 1998), and the rate at
# which its log step size follows it during warm-up.
_MALA_RATE, _ADAPT = 0.574, 0.05


@dataclass(frozen=True)
class Chains:
    """Draws of Markov chains.

    Attributes:
        z: Unconstrained coordinates, chain after chain, ``(chains * draws, D)``.
        chains: How many chains.
        count_gradients: Gradients of the log joint density that it took, over all chains.
        acceptance: Mean acceptance rate.
    """

    z: Tensor
    chains: int
    count_gradients: int
    acceptance: float


def pulled_back(
    joint: LogDensity, q: FlowDistribution
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    r"""The posterior in the flow's base coordinates, :math:`x \mapsto (\log \pi(x), T(x))`.

    Args:
        joint: The log joint density.
        q: The guide's distribution.

    Raises:
        TypeError: If its log-determinants are estimated, or it is made of layers that draw.
    """
    check_kind("pulled_back", "q", q, FlowDistribution)
    check_exact("pulled_back", "q", q, "take a flow of exact transforms, or plain NUTS")

    def log_prob(x: Tensor) -> tuple[Tensor, Tensor]:
        z, ladj = q.transform.forward_and_ladj(x)
        return joint.log_prob(z) + ladj, z

    return log_prob


def neutra(
    joint: LogDensity,
    q: FlowDistribution,
    x: Tensor,
    *,
    num_draws: int = 500,
    warmup: int = 200,
    progress: bool = True,
) -> Chains:
    """NUTS in the flow's base coordinates, one chain from each start.

    *NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport* (Hoffman,
    Sountsov, Dillon, Langmore, Tran, Vasudevan, 2019).

    Ctrl-C ends it with the chains that are complete; if none is, it is raised.

    Args:
        joint: The log joint density.
        q: The guide's distribution.
        x: Starts in base coordinates, one a chain, ``(C, D)``.
        num_draws: Draws a chain.
        warmup: Steps to find the step size and the mass, whose draws are dropped.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a count is not positive.
    """
    check_count("neutra", "num_draws", num_draws)
    density, calls = pulled_back(joint, q), 0
    chains, acceptance = [], []

    def potential(params: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return -density(params["x"].unsqueeze(0))[0].squeeze(0)

    try:
        for start in tqdm(x, disable=not progress, unit="chain"):
            kernel = NUTS(potential_fn=potential, max_tree_depth=8)
            mcmc = MCMC(
                kernel,
                num_draws,
                warmup_steps=warmup,
                initial_params={"x": start},
                disable_progbar=True,
            )
            mcmc.run()
            chains.append(mcmc.get_samples()["x"])
            acceptance.append(float(kernel._mean_accept_prob))
    except KeyboardInterrupt:
        if not chains:
            raise
    with torch.no_grad():
        z = q.transform.forward_and_ladj(torch.cat(chains))[0]
    return Chains(z, len(chains), calls, sum(acceptance) / len(acceptance))


def independence(
    joint: LogDensity,
    q: FlowDistribution,
    x: Tensor,
    *,
    num_draws: int = 500,
    warmup: int = 200,
    progress: bool = True,
) -> Chains:
    r"""Independence Metropolis-Hastings mixed with local steps, all chains in one batch.

    Each step proposes a fresh draw of the guide, accepted with probability
    :math:`\min(1, w(x') / w(x))`, and then makes a Langevin step in base coordinates (MALA). The
    first moves between separated modes that the guide covers, the second moves where its weights
    are poor.

    Ctrl-C ends it with the draws so far; during the warm-up, when there are none, it is raised.

    *Adaptive Monte Carlo augmented with normalizing flows* (Gabrié, Rotskoff, Vanden-Eijnden,
    2022).

    Args:
        joint: The log joint density.
        q: The guide's distribution.
        x: Starts in base coordinates, one a chain, ``(C, D)``.
        num_draws: Draws a chain.
        warmup: Steps to find the step size, whose draws are dropped.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a count is not positive.
    """
    check_count("independence", "num_draws", num_draws)
    density, base = pulled_back(joint, q), q.base_dist
    chains, dim = x.shape
    log_step = math.log(0.5 * dim ** (-1 / 6))
    value, grad, z = _value_and_grad(density, x)
    kept, accepted = [], []
    try:
        for i in tqdm(range(warmup + num_draws), disable=not progress, unit="step"):
            fresh = base.sample((chains,))
            fresh_value, fresh_grad, fresh_z = _value_and_grad(density, fresh)
            log_ratio = (fresh_value - base.log_prob(fresh)) - (value - base.log_prob(x))
            x, value, grad, z, _ = _accept(
                log_ratio, (x, value, grad, z), (fresh, fresh_value, fresh_grad, fresh_z)
            )
            step = math.exp(log_step)
            noise = torch.randn_like(x)
            near = x + 0.5 * step**2 * grad + step * noise
            near_value, near_grad, near_z = _value_and_grad(density, near)
            back = (x - near - 0.5 * step**2 * near_grad) / step
            log_ratio = near_value - value + 0.5 * (noise.square() - back.square()).sum(-1)
            x, value, grad, z, rate = _accept(
                log_ratio, (x, value, grad, z), (near, near_value, near_grad, near_z)
            )
            if i < warmup:
                log_step += _ADAPT * (rate - _MALA_RATE)
            else:
                kept.append(z)
                accepted.append(rate)
    except KeyboardInterrupt:
        if not accepted:
            raise
    draws = torch.stack(kept[: len(accepted)], 1).reshape(-1, dim)
    gradients = chains * 2 * (warmup + len(accepted))
    return Chains(draws, chains, gradients, sum(accepted) / len(accepted))


def _value_and_grad(
    density: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        value, z = density(leaf)
        finite = torch.where(value.isfinite(), value, 0.0)
        (grad,) = torch.autograd.grad(finite.sum(), leaf)
    return value.detach(), grad.nan_to_num(0.0, 0.0, 0.0), z.detach()


def _accept(
    log_ratio: Tensor, old: tuple[Tensor, ...], new: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Metropolis' choice for each chain, and the share that moved; NaN counts as a refusal."""
    chance = log_ratio.nan_to_num(-math.inf).exp().clamp_max(1.0)
    yes = torch.rand_like(chance) < chance
    x, value, grad, z = (
        torch.where(yes.unsqueeze(-1) if b.dim() > 1 else yes, b, a)
        for a, b in zip(old, new, strict=True)
    )
    return x, value, grad, z, float(chance.mean())
