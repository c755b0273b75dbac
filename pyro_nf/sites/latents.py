"""The latent sites in a run of a model, and the values that they have at first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_nf.ops.devices import device_of
from pyro_nf.sites.supports import Supported, bijection, is_flat, is_pushed

Model = Callable[..., Any]
InitLocFn = Callable[..., Tensor]
Message = Any  # Pyro's message: a dict whose keys depend on the kind of the site


def init_anywhere(
    init_loc_fn: InitLocFn, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> InitLocFn:
    """`init_loc_fn`, with the image of 0 for the sites that it cannot take (flat priors, mixtures).

    Args:
        init_loc_fn: one of Pyro's `init_to_*` functions.
        dtype: of the flat priors, which have no parameters to tell it. Default: torch's default.
        device: of the flat priors. Default: torch's default.

    Returns:
        An `init_loc_fn` that takes `ImproperUniform` sites too.
    """

    def init(site: Message) -> Tensor:
        fn = site["fn"]
        try:
            # Pyro's functions go by the support that a distribution reports.
            asked = {**site, "fn": Supported(fn)} if is_pushed(fn) else site
            return init_loc_fn(asked)
        except NotImplementedError:
            flat, transform = is_flat(fn), bijection(site["name"], fn)
        shape = transform.inverse_shape(fn.shape())
        if flat:
            return transform(torch.zeros(shape, dtype=dtype, device=device))
        return transform(fn.sample().new_zeros(shape))

    return init


def refuse_subsampled_latents(trace: poutine.Trace) -> None:
    """Raise if a latent lies in a subsampled plate.

    Args:
        trace: one run of the model.

    Raises:
        ValueError: naming the site and the plate.
    """
    for name, site in trace.iter_stochastic_nodes():
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"latent site {name!r} lies in plate {frame.name!r}, which takes a subsample "
                    f"of {frame.size} of {frame.full_size} rows: its coordinates would stand for "
                    f"other rows in every step. Use the whole plate, or move the latent out of it."
                )


def trace_prototype(
    model: Model,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    init_loc_fn: InitLocFn = init_to_median,
) -> poutine.Trace:
    """One run of the model with every latent at its initial value.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        init_loc_fn: one of Pyro's `init_to_*`; flat priors start at the image of 0.

    Raises:
        ValueError: a latent lies in a subsampled plate: its coordinates would stand for other
            rows in every run.
    """

    def run(dtype: torch.dtype) -> poutine.Trace:
        started = InitMessenger(init_anywhere(init_loc_fn, dtype, device))(model)
        with poutine.block():
            return poutine.trace(started).get_trace(*args, **(kwargs or {}))

    default, device = torch.get_default_dtype(), device_of(model, args, kwargs)
    try:
        trace = run(default)
    except RuntimeError as error:
        # Flat priors have no dtype of their own: theirs is that of the data they meet.
        if "dtype" not in str(error):
            raise
        trace = run(torch.float32 if default == torch.float64 else torch.float64)
    refuse_subsampled_latents(trace)
    return trace


def latent_nodes(trace: poutine.Trace) -> dict[str, Any]:
    """The nodes of a run that were drawn, subsamples aside."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and not node["is_observed"]
        if not isinstance(node["fn"], _Subsample)
    }
