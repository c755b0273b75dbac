"""Discrete latents summed out, for all particles at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_nf.sites.latents import Message, Model

_PARTICLES = "_particles"
Term = Any  # a tensor, with the names of its dimensions in `_pyro_dims`


class Enumeration:
    r"""Runs a model with all values of its discrete latents, and sums over them.

    .. math:: \log p(z) = \log \sum_c \prod_s p(x_s \mid x_{<s}, c)

    Particles stand in a plate to the left of the model's own, and the values of each discrete site
    in a dimension to the left of that, as in `TraceEnum_ELBO` with `vectorize_particles=True`.
    The sum is exact, and the plates of the model are used to take it in parts.

    *Tensor Variable Elimination for Plated Factor Graphs* (Obermeyer, Bingham, Jankowiak, Chiu,
    Pradhan, Rush, Goodman, 2019).

    Args:
        model: a Pyro model.
        names: of the discrete sites.
        max_plate_nesting: how many batch dimensions the model has.
    """

    def __init__(self, model: Model, names: Collection[str], max_plate_nesting: int) -> None:
        def in_parallel(site: Any) -> Any:
            return {"enumerate": "parallel"} if site["name"] in names else {}

        self.names, self.max_plate_nesting = tuple(names), max_plate_nesting
        self._model = poutine.infer_config(model, in_parallel)

    def log_prob(
        self, given: Messenger, args: tuple[Any, ...], kwargs: dict[str, Any], particles: int | None
    ) -> Tensor:
        """log p of each particle (S,), or of the only one ().

        Args:
            given: gives the other latents their values.
            args: of the model.
            kwargs: of the model.
            particles: S; None if there is no dimension of particles.
        """
        depth = self.max_plate_nesting
        if particles is None:
            model = _Enumerate(-1 - depth)(self._model)
            with given:
                trace = poutine.trace(model).get_trace(*args, **kwargs)
        else:
            model = _Enumerate(-2 - depth)(self._model)
            plate = pyro.plate(_PARTICLES, particles, dim=-1 - depth)
            with given, plate:
                trace = poutine.trace(model).get_trace(*args, **kwargs)
        return _summed(trace, particles)


class _Enumerate(EnumMessenger):
    """Pyro's enumeration, which goes under `torch.func.vmap` too: it looks at shapes only."""

    def _pyro_post_sample(self, msg: Message) -> None:
        value = msg["value"]
        if isinstance(value, Tensor):
            msg = {**msg, "value": torch.empty(value.shape, device="meta")}
        super()._pyro_post_sample(msg)


def _summed(trace: poutine.Trace, particles: int | None) -> Tensor:
    """The log densities of a run, summed over everything but the particles."""
    trace.compute_log_prob()
    trace.pack_tensors()
    symbols = trace.plate_to_symbol
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    nodes: dict[str, Any] = dict(trace.nodes)
    for node in nodes.values():
        if node["type"] == "sample" and not isinstance(node["fn"], _Subsample):
            plates = (f.name for f in node["cond_indep_stack"] if f.vectorized)
            ordinal = frozenset(symbols[name] for name in plates)
            factors.setdefault(ordinal, []).append(node["packed"]["log_prob"])
    sum_dims = set(trace.symbol_to_dim) - set(symbols.values())
    target = frozenset() if particles is None else frozenset([symbols[_PARTICLES]])
    ring = _Elimination(dim_to_size=dict.fromkeys(target, particles))
    return contract_to_tensor(factors, sum_dims, target_ordinal=target, ring=ring)


class _Elimination(LogRing):
    """Sums of products in logarithms, one dimension after the other.

    The dimension that meets the fewest others goes first: a chain is eaten from its ends. Where all
    terms are impossible the gradient is 0, not NaN.
    """

    def sumproduct(self, terms: Iterable[Term], dims: Iterable[str]) -> Term:
        """The sum over `dims` of the product of `terms`."""
        terms, pending = list(terms), sorted(dims)
        meets = {d: [t for t in terms if d in t._pyro_dims] for d in pending}
        width = {d: len(_union(meets[d])) for d in pending}
        while pending:
            dim = min(pending, key=width.__getitem__)
            pending.remove(dim)
            product = _product(meets.pop(dim))
            at = product._pyro_dims.index(dim)
            term: Term = _logsumexp(product, at)
            term._pyro_dims = product._pyro_dims.replace(dim, "")
            gone = {id(t) for t in terms if dim in t._pyro_dims}
            terms = [*(t for t in terms if id(t) not in gone), term]
            for other in pending:
                if other in product._pyro_dims:
                    meets[other] = [t for t in meets[other] if id(t) not in gone] + [term]
                    width[other] = len(_union(meets[other]))
        return _product(terms)


def _union(terms: list[Term]) -> str:
    """The dimensions of any of some terms."""
    return "".join(sorted(set().union(*(t._pyro_dims for t in terms))))


def _product(terms: list[Term]) -> Term:
    """Terms multiplied, which is the sum of their logarithms, in the union of their dimensions."""
    if len(terms) == 1:
        return terms[0]
    dims = _union(terms)
    total: Any = None
    for term in terms:
        mine = term._pyro_dims
        order = sorted(range(len(mine)), key=mine.__getitem__)
        if order != list(range(len(mine))):
            term = term.permute(order)
        if len(mine) < len(dims):
            sizes = iter(term.shape)
            term = term.reshape([next(sizes) if d in mine else 1 for d in dims])
        total = term if total is None else total + term
    total._pyro_dims = dims
    return total


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """As torch's, whose gradient is NaN where all is impossible."""
    is_possible = x.detach().amax(dim) > -torch.inf
    total = torch.where(is_possible.unsqueeze(dim), x, 0.0).logsumexp(dim)
    return torch.where(is_possible, total, -torch.inf)
