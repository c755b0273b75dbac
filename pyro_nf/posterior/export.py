"""Draws in the form that arviz works with."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

Groups = dict[str, dict[str, np.ndarray[Any, Any]]]


def inference_data(
    samples: Mapping[str, Tensor],
    stats: Mapping[str, Tensor],
    *,
    observed: Mapping[str, Tensor] | None = None,
    log_likelihood: Mapping[str, Tensor] | None = None,
    attributes: Mapping[str, float | str] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    chains: int = 1,
) -> Any:
    """An ``InferenceData`` with arviz 0.x, a ``DataTree`` with arviz 1.x.

    Args:
        samples: Draws of each site, ``(S, *shape)``, chain after chain.
        stats: Numbers for each draw, ``(S,)``.
        observed: Observed values of each site.
        log_likelihood: Of each observation for each draw, ``(S, *shape)``.
        attributes: Numbers and remarks for all draws together; with the statistics if there are
            some, else with the draws.
        coords: Labels of dimensions.
        dims: Names of the dimensions of each site.
        chains: How many chains the draws are.

    Example:
        >>> import torch
        >>> data = inference_data({"x": torch.zeros(10, 3)}, {"lp": torch.zeros(10)})
        >>> data.posterior["x"].shape
        (1, 10, 3)
    """

    def by_chain(draws: Tensor) -> np.ndarray[Any, Any]:
        values: np.ndarray[Any, Any] = draws.detach().cpu().numpy()
        return values.reshape(chains, -1, *values.shape[1:])

    groups: Groups = {
        "posterior": {name: by_chain(draws) for name, draws in samples.items()},
    }
    if stats:
        groups["sample_stats"] = {name: by_chain(draws) for name, draws in stats.items()}
    if log_likelihood:
        groups["log_likelihood"] = {name: by_chain(v) for name, v in log_likelihood.items()}
    if observed:
        groups["observed_data"] = {name: v.detach().cpu().numpy() for name, v in observed.items()}
    new = int(importlib.metadata.version("arviz").split(".")[0]) >= 1
    data = (_from_dict_1 if new else _from_dict_0)(groups, coords, dims)
    (data.sample_stats if stats else data.posterior).attrs.update(attributes or {})
    return data


def _from_dict_0(groups: Groups, coords: Any, dims: Any) -> Any:
    import arviz

    return arviz.from_dict(**groups, coords=coords, dims=dims)  # type: ignore[arg-type]


def _from_dict_1(groups: Groups, coords: Any, dims: Any) -> Any:
    from arviz_base import from_dict

    return from_dict(groups, coords=coords, dims=dims)
