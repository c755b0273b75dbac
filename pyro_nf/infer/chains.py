"""R-hat and effective sample size of Markov chains, by the arviz that is installed."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
from torch import Tensor

# Draws of a chain with which halves can be compared.
_SHORTEST = 4


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
