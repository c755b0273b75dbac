"""Points to climb from: draws of the prior, and balls around what is known."""

from __future__ import annotations

import contextlib
import math
import time

import torch
from torch import Tensor

from pyro_nf.model.density import LogDensity
from pyro_nf.model.metered import Metered
from pyro_nf.search.effort import FEWEST_STARTS, nominal_cost
from pyro_nf.search.gaussians import StudentT
from pyro_nf.train.budget import Budget, Clock, OutOfTime

# The cost of all draws of the prior where each takes a run of the model, in nominal seconds.
_PRIOR_COST = 0.5
# Scales of the random starts around the initial point, in unconstrained units.
_SPREADS = (0.3, 1.0, 3.0)
# Shares of the time that draws of the prior and the density of all random points may take.
_PRIOR_SHARE, _POINTS_SHARE = 0.1, 0.2


def prior_draws(joint: LogDensity, count: int, budget: Budget | None = None) -> Tensor:
    """Coordinates of draws of the prior, by one run of the model if it runs on a batch.

    Else they come one by one, as many as the cost of a run allows. Flat priors have no draws: there
    the coordinates are 0.

    Args:
        joint: The log joint density.
        count: How many draws are wanted.
        budget: A bound of seconds, asked between single draws, if there is one.

    Returns:
        Finite draws ``(N, D)``; fewer than asked for, or none, where the model cannot give them.
    """
    draws: Tensor | None = None
    with contextlib.suppress(Exception):  # a model that fails in this way is asked in another
        draws = joint.prior_draws(count)
    if draws is None:
        affordable = max(FEWEST_STARTS // 4, int(_PRIOR_COST / sum(nominal_cost(joint))))
        singles = []
        for seed in torch.randint(2**31, (min(count, affordable),)).tolist():
            if budget is not None and budget.is_spent():
                break
            # With some draws of the prior the model cannot run.
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                singles.append(joint.prior_draw(seed))
        draws = torch.stack(singles) if singles else joint.init_loc.new_zeros(0, joint.latent_dim)
    return draws[draws.isfinite().all(-1)].clamp(-1e6, 1e6)


def prior_reference(joint: LogDensity, prior: Tensor) -> StudentT:
    """Where the prior lies: the median of its draws and half the way between 16 % and 84 %.

    Args:
        joint: The log joint density; without draws its initial point and a scale of 1 are taken.
        prior: Draws of the prior, ``(N, D)``.
    """
    one = torch.ones_like(joint.init_loc)
    if len(prior) < 2:
        return StudentT(joint.init_loc, one)
    low, middle, high = prior.quantile(prior.new_tensor([0.16, 0.5, 0.84]), 0)
    return StudentT(middle, torch.where(high > low, 0.5 * (high - low), one))


def starts(
    joint: LogDensity, prior: Tensor, reference: StudentT, known: Tensor, count: int
) -> Tensor:
    """Points from which to climb: of the prior, around what is known, and in balls of all sizes.

    Args:
        joint: The log joint density.
        prior: Draws of the prior, ``(N, D)``.
        reference: Where the prior lies.
        known: Draws of what is known already, ``(S, D)``.
        count: How many points.

    Returns:
        ``(count, D)``.
    """
    middle, spread = reference.loc, reference.scale
    noise = torch.randn(count, len(middle)).to(middle)
    # Flat priors have no draws; they are stood in for by those of a normal.
    flat = (prior == 0).all(0)
    draws = torch.where(flat, noise[: len(prior)], prior)
    around, balls = noise[len(draws) :].tensor_split([count // 8])
    widths = middle.new_tensor([0.0, 1.0, 2.0, 4.0])[torch.arange(len(around)) % 4].unsqueeze(-1)
    sd = known.std(0) if len(known) > 1 else torch.ones_like(middle)
    around = known[torch.randint(len(known), (len(around),))] + widths * sd * around
    # Radii are uniform in their logarithm, from a twentieth of the prior's spread to twice of it.
    radii = (math.log(0.05) + math.log(40.0) * torch.rand(len(balls), 1)).exp().to(middle)
    centres = torch.stack([middle, torch.zeros_like(middle), joint.init_loc])
    balls = centres[torch.arange(len(balls)) % len(centres)] + radii * spread * balls
    balls[-1:] = joint.init_loc
    return torch.cat([draws, around, balls])


def random_starts(
    joint: LogDensity,
    init: Tensor,
    count: int,
    generator: torch.Generator,
    max_seconds: float | None = 0.2,
    clock: Clock = time.perf_counter,
) -> tuple[Tensor, Tensor]:
    """Points from the prior, around the initial point and around 0, with their log density.

    Args:
        joint: the log joint; one that is metered has its own time, of which a part is taken.
        init: (D,).
        count: how many; fewer if there is no time for all.
        generator: of the random numbers.
        max_seconds: for the draws of the prior, each of which is a run of the model.
        clock: what the seconds are counted with.

    Returns:
        z (count, D) and log p (count,).

    Raises:
        OutOfTime: if there is not even time for the density of a few points.
    """
    noise = torch.randn(count, len(init), generator=generator, dtype=init.dtype).to(init.device)
    index = torch.arange(count, device=init.device)
    width = init.new_tensor(_SPREADS)[index % len(_SPREADS)].unsqueeze(-1)
    around_init = (index // len(_SPREADS) % 2 == 0).unsqueeze(-1)
    z = torch.where(around_init, init, 0.0) + width * noise
    if isinstance(joint, Metered):
        count = joint.afford("value", count, _POINTS_SHARE)
        prior = joint.part(_PRIOR_SHARE)
    else:
        prior = Metered(joint, Budget(max_seconds=max_seconds, clock=clock))
    z, noise = z[:count], noise[:count]
    with contextlib.suppress(OutOfTime):
        for i in range(0, count, 2):
            try:
                draw = prior.prior_draw(int(torch.randint(2**31, (), generator=generator)))
            except (ValueError, RuntimeError):
                continue  # a draw of the prior with which the model cannot run
            # Heavy-tailed priors draw points where nothing is finite; flat ones draw nothing.
            draw = torch.where(draw == 0, noise[i], draw)
            z[i] = draw.nan_to_num(0.0).clamp(-1e6, 1e6)
    with torch.no_grad():
        log_prob = joint.log_prob(z)
    return z, log_prob
