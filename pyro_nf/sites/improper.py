r"""What neither the prior nor the data hold.

A latent whose prior is masked, as the missing rows of `obs_mask` or padded rows are, has no density
there. Where nothing else depends on such an entry it is no unknown of the posterior: it is left out
(`kept_entries`). A direction along which the log joint is a straight line has no posterior at all,
since :math:`e^{cu}` has no integral over the line; this is an error (`refuse_flat_directions`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor

from pyro_nf.ops.devices import in_double
from pyro_nf.sites.latents import Model, latent_nodes
from pyro_nf.sites.layout import Layout
from pyro_nf.sites.substitute import SafeLinalg, fast_pyro
from pyro_nf.sites.supports import bijection, is_flat

# Spreads of the points around the initial one at which the log joint is looked at.
_SPREADS = (0.3, 1.0, 3.0)
_COUNT_POINTS = 8
# More coordinates without a prior than this are looked at one by one, not in combination.
_MAX_DIRECTIONS = 200
# How far a straight line is followed: along a coordinate, and along a combination of several, in
# which large numbers that cancel leave their rounding.
_FAR, _FAR_COMBINED = (1e1, 1e3, 1e6, 1e9), (1e1, 1e2)


class ImproperPosterior(ValueError):
    """A posterior that has no integral."""


def masked_priors(trace: poutine.Trace) -> dict[str, Tensor]:
    """Of the latents whose prior is masked somewhere, the batch entries where it counts.

    Args:
        trace: one run of the model.
    """
    found = {}
    for name, node in latent_nodes(trace).items():
        shape = node["value"].shape[: node["value"].dim() - node["fn"].event_dim]
        counts = _counts(node["fn"], shape)
        if node["mask"] is not None:
            counts = counts & torch.as_tensor(node["mask"], device=counts.device)
        if not bool(counts.all()):
            found[name] = counts
    return found


def stand_ins(trace: poutine.Trace) -> dict[str, Tensor]:
    """For observed sites with NaN at masked entries only: a value, for one entry, that may stand.

    What is masked counts for nothing, but the gradient of a density at NaN is NaN, and NaN times 0
    is NaN.

    Args:
        trace: one run of the model.

    Returns:
        The value of an entry that counts, of the shape of an event.
    """
    found = {}
    nodes: dict[str, Any] = dict(trace.nodes)
    for name, node in nodes.items():
        value = node.get("value")
        if node["type"] != "sample" or not node["is_observed"] or not isinstance(value, Tensor):
            continue
        missing = value.isnan()
        if not bool(missing.any()):
            continue
        shape = value.shape[: value.dim() - node["fn"].event_dim]
        counts = _counts(node["fn"], shape)
        if node["mask"] is not None:
            counts = counts & torch.as_tensor(node["mask"]).cpu()
        counts = counts.expand(shape).to(value.device)
        incomplete = missing.reshape(*shape, -1).any(-1)
        if not bool((incomplete & counts).any()) and bool(counts.any()):
            found[name] = value[counts][0]
    return found


def _counts(fn: Any, shape: torch.Size) -> Tensor:
    """Where a distribution has a density: its own mask, of the shape of its batch."""
    if isinstance(fn, torch.distributions.Independent):
        inner = torch.Size([*shape, *fn.event_shape[: fn.reinterpreted_batch_ndims]])
        mine = _counts(fn.base_dist, inner)
        return mine.reshape(*shape, -1).any(-1) if fn.reinterpreted_batch_ndims else mine
    counts = torch.ones(shape, dtype=torch.bool)
    if isinstance(fn, MaskedDistribution):
        counts = (counts & torch.as_tensor(fn._mask).cpu()) & _counts(fn.base_dist, shape)
    elif isinstance(fn, ExpandedDistribution):
        counts = counts & _counts(fn.base_dist, fn.base_dist.batch_shape)
    return counts


def kept_entries(
    model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any], trace: poutine.Trace
) -> dict[str, Tensor]:
    """Of latents with a masked prior, the entries that the prior or anything else depends on.

    Args:
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        trace: one run of it.

    Returns:
        A mask of the shape of its batch for each site that has entries to leave out.
    """
    latents = {
        name: node
        for name, node in latent_nodes(trace).items()
        if not node["fn"].has_enumerate_support
    }
    # A flat prior that nothing holds cannot be drawn from either: it stays, to be refused.
    counts = {
        name: mask
        for name, mask in masked_priors(trace).items()
        if name in latents and not is_flat(latents[name]["fn"])
    }
    if not counts:
        return {}
    nodes = {name: latents[name] for name in counts}
    start = {name: node["value"].detach() for name, node in latents.items()}

    def total(values: Mapping[str, Tensor]) -> Tensor:
        torch.manual_seed(0)
        with fast_pyro(), SafeLinalg(), poutine.block():
            run = poutine.trace(poutine.condition(model, start | dict(values)))
            return torch.as_tensor(run.get_trace(*args, **kwargs).log_prob_sum())

    transforms = {name: bijection(name, node["fn"]) for name, node in nodes.items()}

    def moved(spread: float, name: str, where: Tensor | None = None) -> Tensor:
        """The value of a site at another place, or of those entries alone."""
        value, event_dim = nodes[name]["value"], nodes[name]["fn"].event_dim
        u = transforms[name].inv(value)
        there = transforms[name](u + spread * torch.randn_like(u))
        if where is None:
            return there.detach()
        return torch.where(where.reshape(where.shape + (1,) * event_dim), there, value).detach()

    touched = {name: mask.clone() for name, mask in counts.items()}
    with torch.random.fork_rng(devices=[]):
        for i, spread in enumerate((0.0, 0.1, 0.5)):
            torch.manual_seed(i)
            values = {name: moved(spread, name).requires_grad_() for name in nodes}
            with torch.enable_grad():
                log_p = total(values)
                grads = (
                    torch.autograd.grad(log_p, list(values.values()), allow_unused=True)
                    if log_p.requires_grad
                    else [None] * len(values)
                )
            for name, grad in zip(values, grads, strict=True):
                if grad is not None:
                    depends = (grad != 0).reshape(*touched[name].shape, -1).any(-1)
                    touched[name] = touched[name] | depends
        # A gradient does not see what is chosen by comparison or by index.
        with torch.no_grad():
            here = total({})
            for name in nodes:
                torch.manual_seed(1)
                there = total({name: moved(3.0, name, ~touched[name])})
                if not torch.equal(here, there):
                    touched[name] = torch.ones_like(touched[name])
    return {name: mask for name, mask in touched.items() if not bool(mask.all())}


def suspects(trace: poutine.Trace) -> list[str]:
    """The latents that have no prior density, or not everywhere."""
    masked = masked_priors(trace)
    nodes = latent_nodes(trace)
    return [name for name in nodes if name in masked or is_flat(nodes[name]["fn"])]


def refuse_flat_directions(
    value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]],
    init_loc: Tensor,
    layout: Layout,
    suspected: Collection[str],
) -> None:
    """Raises if the log joint is a straight line in some direction.

    Single coordinates are looked at in all sites, combinations in those that are suspected.

    Args:
        value_and_grad: the log joint (S,) and its gradient (S, D) of points (S, D).
        init_loc: where to look around, (D,).
        layout: the sites that the coordinates belong to.
        suspected: sites without a prior density.

    Raises:
        ImproperPosterior: naming the site and its entries.
    """
    labels, owners = layout.labels, layout.owners
    loose = torch.tensor([name in suspected for name in owners], device=init_loc.device)
    count_loose = int(loose.sum())
    together = 0 < count_loose <= _MAX_DIRECTIONS
    count = max(_COUNT_POINTS, count_loose + 4 if together else 0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, len(init_loc), generator=generator, dtype=init_loc.dtype)
    width = init_loc.new_tensor(_SPREADS)[torch.arange(count, device=init_loc.device) % 3]
    points = init_loc + width.unsqueeze(-1) * noise.to(init_loc)
    value, grad = value_and_grad(points)
    ok = value.isfinite() & grad.isfinite().all(-1)
    if int(ok.sum()) < 3:
        return
    start, grad = points[ok][0], grad[ok]
    eps = torch.finfo(grad.dtype).eps

    def is_straight(direction: Tensor, distances: Sequence[float]) -> bool:
        """Whether the log joint is a line from the start, however far one goes."""
        steps = start.new_tensor([t for far in distances for t in (-far, far)])
        there, _ = value_and_grad(start + steps.unsqueeze(-1) * direction)
        here, slope = value_and_grad(start.unsqueeze(0))
        rise = steps * (slope[0] @ direction)
        error = (there - here - rise).abs()
        return bool((error <= 1e3 * eps * (1 + here.abs() + rise.abs())).all())

    change = (grad - grad[0]).abs().amax(0)
    is_line = torch.where(loose, change <= 100 * eps * grad.abs().amax(0), (grad == 0).all(0))
    axes = torch.eye(len(init_loc), dtype=grad.dtype, device=grad.device)
    flat = [i for i in is_line.nonzero().reshape(-1).tolist() if is_straight(axes[i], _FAR)]
    if flat:
        raise ImproperPosterior(
            f"the posterior is improper: neither a prior nor the data hold "
            f"{', '.join(labels[i] for i in flat[:10])}{' ...' if len(flat) > 10 else ''} of site "
            f"{', '.join(repr(name) for name in dict.fromkeys(owners[i] for i in flat))}. Give it "
            "a proper prior, such as a wide Normal, or take it out of the model."
        )
    loose = loose & ~is_line  # of a coordinate that rounding hides nothing can be said
    if not together or not bool(loose.any()):
        return
    columns = (grad - grad[0])[:, loose]
    size = columns.norm(dim=0).clamp_min(torch.finfo(grad.dtype).tiny)
    _, S, Vh = torch.linalg.svd(in_double(columns / size), full_matrices=False)
    for direction in Vh[1e3 * eps * S[0] >= S].to(grad) / size:
        full = torch.zeros_like(init_loc)
        full[loose] = direction / direction.norm()
        if is_straight(full, _FAR_COMBINED):
            parts = [
                i for i in full.abs().argsort(descending=True).tolist() if full[i].abs() > 1e-3
            ]
            raise ImproperPosterior(
                "the posterior is improper: neither a prior nor the data hold the combination "
                + " ".join(f"{float(full[i]):+.3g} {labels[i]}" for i in parts[:10])
                + f" of the sites {sorted({owners[i] for i in parts})}. Give one of them a proper "
                "prior, such as a wide Normal."
            )
