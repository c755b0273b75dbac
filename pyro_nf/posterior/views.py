"""What is shown of draws: a table, predictions, pictures, and the form that arviz works with."""

from __future__ import annotations

import importlib.metadata
import math
from abc import ABC
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from pyro_nf._checks import (
    check_arguments,
    check_choice,
    check_count,
    check_entries,
    check_flag,
    check_kind,
    seed_or_fresh,
)
from pyro_nf.posterior.predict import SetFree, observed_values, pointwise_log_likelihood, predict
from pyro_nf.posterior.summary import Summary, summarize
from pyro_nf.posterior.weights import WeightedDraws, khat_in_words
from pyro_nf.train.modes import evaluating
from pyro_nf.train.randomness import own_randomness

if TYPE_CHECKING:
    import matplotlib.figure


class ShownDraws(WeightedDraws, ABC):
    """Draws that show themselves; :class:`~pyro_nf.posterior.posterior.Posterior` is the one."""

    def summary(self, *, weighted: bool = False) -> Summary:
        """Mean, sd, 5 %, 50 % and 95 % quantile of every entry of every site.

        Args:
            weighted: Whether the draws count by their smoothed importance weights; without
                weights all count alike.

        Returns:
            A table that prints itself; ``table.rows`` has the numbers.
        """
        check_flag("Posterior.summary", "weighted", weighted)
        has_weights = weighted and not self.without_weights
        weights = self.weights.normalized if has_weights else None
        return summarize(self.samples, weights, self.chains)

    def predictive(
        self,
        *args: Any,
        num_draws: int | None = None,
        sites: Sequence[str] = (),
        seed: int | None = 0,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Runs the model forward from the draws.

        Args:
            *args: Arguments of the model, for example new inputs and None for what was observed.
                Without any, the model runs with the arguments of the fit and all that was observed
                is drawn anew.
            num_draws: How many draws to use; all by default.
            sites: The sites to return; all that are not latent by default.
            seed: Seed of what is drawn.
            **kwargs: Keyword arguments of the model.

        Returns:
            For each site its draws, ``(S, *shape)``.

        Raises:
            ValueError: If the model has no such site.
        """
        check_count("Posterior.predictive", "num_draws", num_draws, optional=True)
        if num_draws is not None and num_draws > len(self):
            raise ValueError(
                f"Posterior.predictive: num_draws must be at most {len(self)}, all that there are, "
                f"got {num_draws}; take more draws, as by fit.posterior({num_draws})."
            )
        check_entries("Posterior.predictive", "sites", sites, str)
        seed = seed_or_fresh("Posterior.predictive", seed)
        if args or kwargs:
            check_arguments("Posterior.predictive", self.joint.model, args, kwargs)
        model = self.joint.model
        if not args and not kwargs:
            args, kwargs = self.joint.args, self.joint.kwargs
            model = SetFree()(model)
        count = len(self) if num_draws is None else min(num_draws, len(self))
        chosen = {name: draws[:count] for name, draws in self.samples.items()}
        with evaluating(), own_randomness(seed):
            drawn = predict(self.joint, chosen, model, args, kwargs)
        if not sites:
            return drawn
        known = chosen | drawn
        if unknown := set(sites) - set(known):
            raise ValueError(
                f"Posterior.predictive: the model has no site {sorted(unknown)}, only "
                f"{sorted(known)}."
            )
        return {name: known[name] for name in sites}

    def log_likelihood(self) -> dict[str, Tensor]:
        """The log likelihood of every observation for every draw, ``(S, *batch_shape)`` a site."""
        with evaluating():
            return pointwise_log_likelihood(self.joint, self.samples)

    def to_arviz(
        self,
        *,
        coords: Mapping[str, Sequence[Any]] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        log_likelihood: bool = False,
    ) -> Any:
        """The draws as what the installed arviz works with.

        Args:
            coords: Labels of dimensions.
            dims: Names of the dimensions of each site.
            log_likelihood: Whether to compute and store the pointwise log likelihood, which
                ``arviz.loo`` and ``arviz.waic`` need.

        Returns:
            An ``InferenceData`` with arviz 0.x, a ``DataTree`` with arviz 1.x; with the groups
            posterior, sample_stats (lp, and log_weight if there are weights; khat, elbo and
            log_evidence as attributes; without weights the reason as ``without_weights``),
            observed_data and, if asked for, log_likelihood.
        """
        check_kind("Posterior.to_arviz", "coords", coords, Mapping, optional=True)
        check_kind("Posterior.to_arviz", "dims", dims, Mapping, optional=True)
        check_flag("Posterior.to_arviz", "log_likelihood", log_likelihood)
        with evaluating():
            observed = observed_values(self.joint, self.samples)
        likelihood = self.log_likelihood() if log_likelihood else None
        stats, attributes = self._statistics()
        return inference_data(
            self.samples,
            stats,
            observed=observed,
            log_likelihood=likelihood,
            attributes=attributes,
            coords=coords,
            dims=dims,
            chains=self.chains,
        )

    def _statistics(self) -> tuple[dict[str, Tensor], dict[str, float | str]]:
        """Numbers of each draw, and numbers and remarks of all together."""
        # A density that is another one at each look is no property of a draw.
        stats = {} if self.joint.is_random else {"lp": self.log_p}
        if self.without_weights:
            return stats, {"without_weights": self.without_weights}
        stats["log_weight"] = self.weights.smoothed
        is_equal = self.khat == -math.inf
        return stats, {
            "khat": khat_in_words(self.khat) if is_equal else self.khat,
            "elbo": self.elbo,
            "log_evidence": self.log_evidence,
            "importance_ess": self.ess,
        }

    def plot(
        self,
        what: Literal["pairs", "loss", "weights"] = "pairs",
        *,
        sites: Sequence[str] | None = None,
    ) -> matplotlib.figure.Figure:
        """A picture of the draws, of the fit, or of the weights; needs ``pyro-nf[plots]``.

        Args:
            what: "pairs" for every entry against every other, "loss" for the loss of the fit,
                "weights" for the importance weights from the largest to the smallest.
            sites: The sites of "pairs"; the first six entries of all by default.

        Raises:
            ValueError: If there is no such picture.
            RuntimeError: If there is no history, or there are no weights, to draw.
            ImportError: If matplotlib is missing.
        """
        check_choice("Posterior.plot", "what", what, ("pairs", "loss", "weights"))
        if sites is not None:
            check_entries("Posterior.plot", "sites", sites, str)
            if unknown := set(sites) - set(self.samples):
                raise ValueError(
                    f"Posterior.plot: sites must be of {list(self.samples)}, got {sorted(unknown)}."
                )
        from pyro_nf.plots import loss_curve, pair_plot, weights_plot

        if what == "pairs":
            return pair_plot(self.samples if sites is None else {s: self.samples[s] for s in sites})
        if what == "weights":
            return weights_plot(self.weights)
        if self.history is None:
            raise RuntimeError("Posterior.plot: these draws come without the history of a fit.")
        return loss_curve(self.history, ylabel="-ELBO")


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
