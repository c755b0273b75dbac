"""The table that people look at first."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_nf.ops.devices import in_double
from pyro_nf.ops.entries import entries

QUANTILES = (0.05, 0.5, 0.95)
# Draws of a chain with which halves can be compared.
_SHORTEST = 4


@dataclass(frozen=True)
class Row:
    """One entry of one site.

    Attributes:
        name: The site, with the index of the entry if the site is no scalar.
        mean: Mean of the draws.
        sd: Standard deviation; NaN if it is of one draw, or one draw has all the weight.
        q5: The 5 % quantile.
        median: The 50 % quantile.
        q95: The 95 % quantile.
        rhat: R-hat, if the draws are of several chains, or None.
        ess: Bulk effective sample size of the chains, or None.
    """

    name: str
    mean: float
    sd: float
    q5: float
    median: float
    q95: float
    rhat: float | None = None
    ess: float | None = None


@dataclass(frozen=True)
class Summary:
    """A table with a row for each entry; printing it shows the table, "-" where there is no number.

    Attributes:
        rows: The rows, in the order of the sites.

    Example:
        >>> import torch
        >>> print(summarize({"x": torch.tensor([1.0, 2.0, 3.0])}))
                     mean         sd         5%        50%        95%
        x               2          1        1.1          2        2.9
    """

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        width = max([8, *(len(row.name) for row in self.rows)])
        titles = ["mean", "sd", "5%", "50%", "95%"]
        chains = any(row.rhat is not None for row in self.rows)
        titles += ["R-hat", "ESS"] if chains else []
        head = " " * width + "".join(f"{t:>11}" for t in titles)
        lines = [
            f"{r.name:<{width}}"
            + "".join(_cell(v, ".4g") for v in (r.mean, r.sd, r.q5, r.median, r.q95))
            + (_cell(r.rhat, ".3f") + _cell(r.ess, ".0f") if chains else "")
            for r in self.rows
        ]
        return "\n".join([head, *lines])

    def __repr__(self) -> str:
        return str(self)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {[row.name for row in self.rows]}")


def _cell(value: float | None, form: str) -> str:
    return f"{'-':>11}" if value is None or math.isnan(value) else f"{value:>11{form}}"


def summarize(
    samples: Mapping[str, Tensor], weights: Tensor | None = None, chains: int = 1
) -> Summary:
    """Summarises draws, weighted or not.

    Args:
        samples: Draws of each site, ``(S, *shape)``.
        weights: Weights that sum to 1, ``(S,)``; equal by default.
        chains: How many Markov chains the draws are, one after the other.
    """
    rows = []
    for label, draws in entries(samples):
        values = in_double(draws)
        mixing = rhat_and_ess(values, chains) if chains > 1 else (None, None)
        rows.append(Row(label, *_moments(values, weights), *mixing))
    return Summary(tuple(rows))


def _moments(values: Tensor, weights: Tensor | None) -> tuple[float, ...]:
    count = len(values)
    if weights is None:
        mean, sd = values.mean(), values.std() if count > 1 else values.new_tensor(math.nan)
        quantiles = values.quantile(values.new_tensor(QUANTILES))
    else:
        w = weights.to(values)
        mean = (w * values).sum()
        # For equal weights 1 - sum w^2 is 1 - 1/S, and this the usual unbiased variance.
        left = 1 - w.square().sum()
        left = torch.where(left > 1e-9, left, torch.nan)
        sd = ((w * (values - mean).square()).sum() / left).sqrt()
        ordered, order = values.sort()
        cumulative = w[order].cumsum(0) - 0.5 * w[order]
        at = torch.searchsorted(cumulative, values.new_tensor(QUANTILES)).clamp_max(count - 1)
        quantiles = ordered[at]
    return (mean.item(), sd.item(), *quantiles.tolist())


def rhat_and_ess(draws: Tensor, chains: int) -> tuple[float, float]:
    """Rank-normalised R-hat and bulk effective sample size of one number.

    *Rank-Normalization, Folding, and Localization: An Improved R-hat for Assessing Convergence of
    MCMC* (Vehtari, Gelman, Simpson, Carpenter, Bürkner, 2021).

    Args:
        draws: Chain after chain, ``(S,)``.
        chains: How many chains; at least 2.

    Returns:
        Both; NaN for a chain that never moved, or is too short to be cut in two.

    Example:
        >>> import torch
        >>> rhat, ess = rhat_and_ess(torch.randn(4000), chains=4)
        >>> rhat < 1.01 and ess > 2000
        True
    """
    values: np.ndarray[Any, Any] = draws.detach().cpu().double().numpy().reshape(chains, -1)
    if values.shape[1] < _SHORTEST or (np.ptp(values, axis=1) == 0).any():
        return math.nan, math.nan
    if importlib.util.find_spec("arviz_stats") is not None:  # arviz 1.x, or beside 0.x
        from arviz_stats.base.array import array_stats

        axes = {"chain_axis": 0, "draw_axis": 1}
        return float(array_stats.rhat(values, **axes)), float(array_stats.ess(values, **axes))
    import arviz

    return float(arviz.rhat(values)), float(arviz.ess(values))
