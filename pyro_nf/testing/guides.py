"""The laws of guides."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from pyro_nf._checks import check_arguments, check_callable, check_count
from pyro_nf.testing.cases import close, randomize, seeded

G = TypeVar("G", bound=Any)  # a guide: AutoFlow, which lives a floor above


def check_guide(
    make_guide: Callable[[], G],
    model: Callable[..., object],
    args: tuple[object, ...] = (),
    *,
    draws: int = 4,
) -> G:
    """Runs the laws of a guide: one set-up makes all parameters, and copies and densities agree.

    Args:
        make_guide: Makes a fresh :class:`~pyro_nf.guides.guide.AutoFlow` for the model.
        model: The model.
        args: The model's arguments.
        draws: How many draws to compare densities of.

    Returns:
        A guide that was set up, with random weights, after one step of SVI.

    Raises:
        AssertionError: If a law is broken.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_nf import AutoFlow
        >>> def model():
        ...     pyro.sample("x", dist.Gamma(2.0, 3.0))
        >>> guide = check_guide(lambda: AutoFlow(model), model)
    """
    import pyro
    from pyro import poutine
    from pyro.infer import SVI, Trace_ELBO
    from pyro.optim.optim import PyroOptim

    check_callable("check_guide", "make_guide", make_guide, "a function of nothing", count=0)
    check_arguments("check_guide", model, args, None)
    check_count("check_guide", "draws", draws)
    store = pyro.get_param_store()
    store.clear()
    guide = make_guide()
    guide.setup(*args)
    assert guide.prototype_trace is not None, "setup made no parameter"
    randomize(guide, 0.1)
    names = [name for name, _ in guide.named_parameters()]
    assert names, "setup made no parameter"

    medians = guide.median()
    for _ in range(draws):
        trace = poutine.trace(guide).get_trace(*args)
        values = {name: trace.nodes[name]["value"].detach() for name in medians}
        for name, value in values.items():
            support = guide.prototype_trace.nodes[name]["fn"].support
            assert bool(support.check(value).all()), f"{name}: a draw outside of the support"
            assert value.isfinite().all(), f"{name}: a draw that is not finite"
        wanted = trace.log_prob_sum().detach()
        with torch.no_grad(), seeded(0):
            got = guide.log_prob(values)
        # a bound or an estimate is another number at each call
        is_exact = getattr(guide.get_posterior(), "log_prob_kind", "exact") == "exact"
        if is_exact:
            close("log_prob of a draw against its trace", got, wanted, 1e-2)

    wide = {name: value.expand(3, *value.shape) for name, value in values.items()}
    with torch.no_grad():
        batch = guide.log_prob(wide)
    assert batch.shape == (3,), f"log_prob of a batch has shape {tuple(batch.shape)}, wanted (3,)"
    if is_exact:
        close("log_prob of a batch", batch, got.expand(3), 1e-4)
    for name, value in medians.items():
        assert value.shape == values[name].shape, f"median of {name}: shape {tuple(value.shape)}"
        assert value.dtype == values[name].dtype, f"median of {name}: dtype {value.dtype}"
    low, high = (guide.quantiles([q]) for q in (0.1, 0.9))
    assert all(bool((low[name] <= high[name]).all()) for name in values), "quantiles not in order"

    saved = {name: value.clone() for name, value in store.items()}
    copied = {"deepcopy": copy.deepcopy(guide), "pickle": pickle.loads(pickle.dumps(guide))}
    store.clear()
    copied["state_dict"] = make_guide()
    copied["state_dict"].setup(*args)
    copied["state_dict"].load_state_dict(guide.state_dict())
    store.clear()
    for name, value in saved.items():
        store[name] = value.clone()
    copied["param store"] = make_guide()
    copied["param store"].setup(*args)
    with torch.no_grad():
        for way, other in copied.items():
            with seeded(0):
                close(f"{way}: log_prob", other.log_prob(values), got, 0.0)

    before = [p.detach().clone() for p in guide.parameters()]
    svi = SVI(model, guide, PyroOptim(torch.optim.Adam, {"lr": 1e-2}), Trace_ELBO())
    for _ in range(2):
        loss = svi.step(*args)
        assert loss == loss and abs(loss) < float("inf"), f"the loss is {loss}"
    assert [name for name, _ in guide.named_parameters()] == names, "a step makes new parameters"
    moved = [not torch.equal(p, old) for p, old in zip(guide.parameters(), before, strict=True)]
    assert any(moved), "a step of SVI changes nothing"
    return guide
