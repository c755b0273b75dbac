"""Pictures of densities, posteriors and fits; needs the extra ``pyro-nf[plots]``.

Every function returns a :class:`matplotlib.figure.Figure` that belongs to no window:
``figure.savefig("name.png")`` writes it, and a notebook shows it after ``%matplotlib inline``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pyro_nf._checks import (
    check_context,
    check_count,
    check_draws,
    check_ends,
    check_finite,
    check_has,
    check_kind,
    check_log_weights,
    check_seed,
    check_tensor,
    is_sequence,
    shown,
)
from pyro_nf.flows.flow import Flow
from pyro_nf.ops.entries import entries
from pyro_nf.train.randomness import own_randomness

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = ["loss_curve", "pair_plot", "plot_density", "weights_plot"]


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]


MOST_ENTRIES = 6
"""A pair plot with more entries than this cannot be read."""

_ALIKE = 0.25
"""Axes with less than this ratio of lengths have units of their own."""

MOST_POINTS = 4000
"""A cloud of more points than this shows nothing more."""

DPI = 150
INK, BLUE, ORANGE, PALE = "#22303c", "#2b6ca3", "#e0793a", "#a9c6de"
SHADES = ("#ffffff", "#d6e5f1", "#8fbbdb", "#3f83b8", "#174f82", "#0a2540")
STYLE: dict[str, Any] = {
    "axes.edgecolor": "#8795a1",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "figure.facecolor": "white",
    "font.size": 10,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "text.color": INK,
    "xtick.color": "#52606d",
    "xtick.labelsize": 8.5,
    "ytick.color": "#52606d",
    "ytick.labelsize": 8.5,
}


class LossHistory(Protocol):
    """What :func:`loss_curve` draws; :class:`pyro_nf.train.stages.History` is one.

    Attributes:
        losses: The loss of every step, nan where it was skipped.
        checked_steps: The steps after which the metric was taken.
        checked_values: The metric there.
        best_step: The step whose state was kept.
    """

    losses: list[float]
    checked_steps: list[int]
    checked_values: list[float]
    best_step: int


_ATTRIBUTES = ("losses", "checked_steps", "checked_values", "best_step")


class WeightsLike(Protocol):
    """What :func:`weights_plot` draws; :class:`pyro_nf.posterior.weights.Weights` is one."""

    @property
    def raw(self) -> Tensor:
        """Log weights."""

    @property
    def smoothed(self) -> Tensor:
        """Log weights with a smoothed tail."""

    @property
    def khat(self) -> float:
        """The Pareto shape of the tail."""

    @property
    def ess(self) -> float:
        """The effective sample size."""


def plot_density(
    flow: Flow,
    data: Tensor | None = None,
    *,
    context: Tensor | None = None,
    bounds: Sequence[tuple[float, float]] | None = None,
    num_samples: int = 2000,
    resolution: int = 200,
    seed: int = 0,
) -> Figure:
    """The density of a flow of one or two coordinates beside its samples.

    Args:
        flow: A flow with ``input_dim`` 1 or 2.
        data: What the flow was fitted to, ``(N, input_dim)``, drawn beside it.
        context: One context, ``(context_dim,)``, if the flow takes one.
        bounds: The ends of each axis; the range of the data, or of the samples, by default.
        num_samples: How many samples to draw.
        resolution: Grid points along each axis.
        seed: Seed of the samples; the global generator is left as it was.

    Returns:
        In one dimension the density over a histogram; in two the data, samples and density, with
        the same unit on both axes where their ranges are alike, and a colour bar.

    Raises:
        ValueError: If the flow has more than two coordinates.
        ImportError: If matplotlib is missing.

    Example:
        >>> from pyro_nf.flows.recipes import realnvp
        >>> figure = plot_density(realnvp(2), num_samples=50, resolution=20)
        >>> [axes.get_title() for axes in figure.axes]
        ['Samples', 'Density']
    """
    check_kind("plot_density", "flow", flow, Flow)
    check_count("plot_density", "num_samples", num_samples)
    check_count("plot_density", "resolution", resolution, at_least=2)
    check_seed("plot_density", seed)
    if flow.input_dim not in (1, 2):
        size = f"event_shape {tuple(flow.event_shape)}"
        size = size if flow.input_dim is None else f"input_dim {flow.input_dim}"
        raise ValueError(
            f"plot_density: the flow has {size}, wanted 1 or 2; draw its samples with pair_plot."
        )
    check_tensor("plot_density", "data", data, (None, flow.input_dim), optional=True)
    if data is not None and not len(data):
        raise ValueError("plot_density: data must have at least one row, got none.")
    check_context("plot_density", context, flow.context_dim)
    if context is not None:
        check_tensor("plot_density", "context", context, (flow.context_dim,))
    if bounds is not None:
        _check_bounds(bounds, flow.input_dim)
    d = flow(context)
    with own_randomness(seed), torch.no_grad():
        samples = d.sample((num_samples,))
        check_finite("plot_density", "a sample of the flow", samples)
        if bounds is None:
            bounds = _bounds(samples if data is None else data)
        axes = [torch.linspace(low, high, resolution).to(samples) for low, high in bounds]
        grid = torch.stack(torch.meshgrid(*axes, indexing="xy"), -1)
        inside = d.support.check(grid)
        safe = torch.where(inside.unsqueeze(-1), grid, samples[0])
        density = torch.where(inside, d.log_prob(safe).exp(), 0.0).cpu()
    clouds = {"Data": data, "Samples": samples}
    shown = {name: rows.detach().cpu() for name, rows in clouds.items() if rows is not None}
    if flow.input_dim == 1:
        return _density_of_one(shown, axes[0].cpu(), density, bounds[0])
    return _density_of_two(shown, density, bounds)


def _check_bounds(bounds: Sequence[tuple[float, float]], input_dim: int) -> None:
    if not is_sequence(bounds) or len(bounds) != input_dim:
        raise TypeError(
            f"plot_density: bounds must be a list of {input_dim} pair(s) (low, high), got "
            f"{shown(bounds)}."
        )
    for ends in bounds:
        check_ends("plot_density", "every entry of bounds", ends)


def _bounds(rows: Tensor, margin: float = 0.1) -> list[tuple[float, float]]:
    """The range of all but the outermost rows, with a margin."""
    rows = rows.detach()[: 10 * MOST_POINTS].double()
    low, high = rows.quantile(0.002, 0), rows.quantile(0.998, 0)
    spread = margin * (high - low).clamp_min(1e-3 * high.abs().clamp_min(1.0))  # none if constant
    return list(zip((low - spread).tolist(), (high + spread).tolist(), strict=True))


def _density_of_one(
    clouds: Mapping[str, Tensor], y: Tensor, density: Tensor, bounds: tuple[float, float]
) -> Figure:
    with _style():
        figure = _figure(5.6, 3.6)
        axes = figure.add_subplot()
        name, rows = next(iter(clouds.items()))
        axes.hist(rows[:, 0].numpy(), bins=60, range=bounds, density=True, color=PALE, label=name)
        axes.plot(y.numpy(), density.numpy(), color=BLUE, linewidth=2, label="Density")
        axes.set(xlim=bounds, ylim=(0, None), xlabel="$y$", ylabel="$q(y)$")
        axes.legend()
    return figure


def _density_of_two(
    clouds: Mapping[str, Tensor], density: Tensor, bounds: Sequence[tuple[float, float]]
) -> Figure:
    (left, right), (bottom, top) = bounds
    count = len(clouds) + 1
    shape = min(max((top - bottom) / (right - left), 0.5), 1.5)
    with _style():
        figure = _figure(3.6 * count, 3.6 * shape + 0.5)
        first, *others = panels = _row(figure, count)
        for panel, (name, rows) in zip(panels, clouds.items(), strict=False):
            rows = rows[:MOST_POINTS]
            color = ORANGE if name == "Data" else BLUE
            panel.scatter(rows[:, 0], rows[:, 1], 5, color, alpha=_alpha(len(rows)), linewidths=0)
            panel.set_title(name)
        darkest = _darkest(density)
        shades = panels[-1].imshow(
            density.numpy(),
            origin="lower",
            extent=(left, right, bottom, top),
            aspect="auto",
            cmap=_shades(),
            vmin=0.0,
            vmax=float(darkest),
            interpolation="bilinear",
        )
        panels[-1].set_title("Density")
        beside = panels[-1].inset_axes((1.04, 0.0, 0.05, 1.0))  # as high as the panel
        extend = "max" if darkest < density.max() else "neither"
        figure.colorbar(shades, cax=beside, label="$q(y)$", extend=extend)
        for panel in panels:
            panel.set(xlim=(left, right), ylim=(bottom, top), xlabel="$y_1$")
            if _ALIKE < (top - bottom) / (right - left) < 1 / _ALIKE:
                panel.set_aspect("equal")  # a circle is round, unless nothing were left to see
        first.set_ylabel("$y_2$")
        for panel in others:
            panel.tick_params(labelleft=False)
    return figure


def _darkest(density: Tensor) -> Tensor:
    """The density that is drawn darkest: the highest, unless a narrow peak hides all the rest."""
    ordered = density.flatten().sort(descending=True).values
    share = ordered.cumsum(0) / ordered.sum().clamp_min(torch.finfo(ordered.dtype).tiny)
    level = ordered[int((share < _PEAK).sum().clamp_max(len(ordered) - 1))]
    return level if 0 < level < 0.5 * ordered[0] else ordered[0]


_PEAK = 0.1  # the share of all that a peak holds, if it is cut off


def pair_plot(
    samples: Mapping[str, Tensor], other: Mapping[str, Tensor] | None = None, *, label: str = ""
) -> Figure:
    """Every entry against every other, with its own histogram, mean and 5 % to 95 % interval.

    Args:
        samples: Draws of each site, ``(S, *shape)``, shown entry by entry; the first six entries.
        other: Draws of the same sites from elsewhere, for example a Markov chain, to compare with.
        label: What the others are.

    Raises:
        ValueError: If there is nothing to draw.
        ImportError: If matplotlib is missing.

    Example:
        >>> figure = pair_plot({"mu": torch.randn(100), "theta": torch.randn(100, 2)})
        >>> figure.axes[-1].get_xlabel()
        'theta[1]'
    """
    check_draws("pair_plot", "samples", samples)
    if other is not None:
        check_draws("pair_plot", "other", other)
    check_kind("pair_plot", "label", label, str)
    columns = dict(islice(entries(samples), MOST_ENTRIES))
    beside = {} if other is None else {k: v for k, v in entries(other) if k in columns}
    if other is not None and not beside:
        raise ValueError(
            f"pair_plot: other must have a site of samples, got {list(other)}, wanted one of "
            f"{list(samples)}."
        )
    names, size = list(columns), len(columns)
    with _style():
        figure = _figure(*[max(2.1 * size, 4.2)] * 2)
        panels = figure.subplots(size, size, sharex="col", squeeze=False)
        for i, row in enumerate(names):
            for j, column in enumerate(names):
                panel = panels[i][j]
                if j > i:
                    panel.remove()
                elif i == j:
                    _histogram(panel, columns[row], beside.get(row))
                else:
                    for source, color in ((beside, ORANGE), (columns, BLUE)):
                        if row in source and column in source:
                            x, y = source[column][:MOST_POINTS], source[row][:MOST_POINTS]
                            alpha = _alpha(len(x))
                            panel.scatter(x, y, 5, color, alpha=alpha, linewidths=0)
                    panel.set_ylim(*_bounds(columns[row][:, None], 0.08)[0])
                panel.set_xlim(*_bounds(columns[column][:, None], 0.08)[0])
                if i == size - 1:
                    panel.set_xlabel(column)
                if j == 0 and i > 0:
                    panel.set_ylabel(row)
                elif j > 0 and i != j:
                    panel.tick_params(labelleft=False)
        if beside and label:
            line = panels[0][0].plot([], [], color=ORANGE)
            figure.legend(line, [label], loc="upper right")
        figure.align_labels()
    return figure


def _histogram(panel: Axes, column: Tensor, other: Tensor | None) -> None:
    low, high = bounds = _bounds(column[:, None], 0.08)[0]
    panel.hist(column.numpy(), bins=40, range=bounds, density=True, color=PALE)
    if other is not None and bool(((low <= other) & (other <= high)).any()):
        panel.hist(
            other.numpy(), bins=40, range=bounds, density=True, histtype="step", color=ORANGE
        )
    low, high = column.double().quantile(column.new_tensor([0.05, 0.95]).double()).tolist()
    panel.plot([low, high], [0, 0], color=BLUE, linewidth=5, solid_capstyle="butt")
    panel.axvline(column.mean().item(), color=BLUE, linewidth=1.2)
    panel.set_title(f"{column.mean().item():.3g} ± {column.std().item():.2g}", fontsize=9)
    panel.set_ylim(bottom=0)
    panel.yaxis.set_visible(False)
    panel.spines["left"].set_visible(False)


def loss_curve(history: LossHistory, *, ylabel: str = "loss") -> Figure:
    """The loss of every step, its running median, the metric where it was taken, and the best step.

    Args:
        history: The history of a fit.
        ylabel: What the loss is.

    Raises:
        ValueError: If no step has a finite loss.
        ImportError: If matplotlib is missing.

    Example:
        >>> from pyro_nf.train.stages import History
        >>> figure = loss_curve(History(losses=[3.0, 2.0, 1.5]))
        >>> figure.axes[0].get_xlabel()
        'step'
    """
    check_has("loss_curve", "history", history, _ATTRIBUTES, "a history of a fit, as fit.history")
    check_kind("loss_curve", "ylabel", ylabel, str)
    losses = torch.tensor(history.losses, dtype=torch.float64)
    steps = torch.arange(1, len(losses) + 1)
    finite = losses.isfinite()
    if not bool(finite.any()):
        raise ValueError("loss_curve: the history has no step with a finite loss.")
    steps, losses = steps[finite], losses[finite]
    with _style():
        figure = _figure(6.4, 3.6)
        axes = figure.add_subplot()
        axes.plot(steps, losses, color=PALE, linewidth=0.6, label="each step")
        window = max(1, len(losses) // 50)  # long enough to be smooth, short enough to follow
        middle = losses.unfold(0, window, 1).median(-1).values
        axes.plot(steps[window - 1 :], middle, color=BLUE, linewidth=1.8, label="running median")
        if history.checked_steps:
            axes.plot(
                history.checked_steps,
                history.checked_values,
                color=ORANGE,
                marker="o",
                markersize=3,
                linewidth=0.8,
                label="checked",
            )
            axes.axvline(
                history.best_step, color=INK, linewidth=0.8, linestyle=":", label="best step"
            )
        axes.set(xlabel="step", ylabel=ylabel, xlim=(0, max(len(history.losses), 1)))
        # the first steps may be far above all others, and hide them
        low, high = losses.quantile(losses.new_tensor([0.002, 0.97])).tolist()
        margin = max(0.15 * (high - low), 1e-3 * abs(high), 1e-6)
        axes.set_ylim(low - margin, high + margin)
        axes.legend()
    return figure


def weights_plot(weights: WeightsLike) -> Figure:
    """The importance weights from the largest to the smallest, in units of their mean.

    A guide that equals the posterior has a flat line at 1. A line that climbs steeply to the left
    says that few draws stand for most of the posterior.

    Args:
        weights: Weights with their smoothed tail, as ``posterior.weights``.

    Raises:
        ImportError: If matplotlib is missing.

    Example:
        >>> from types import SimpleNamespace
        >>> raw = torch.randn(100)
        >>> figure = weights_plot(SimpleNamespace(raw=raw, smoothed=raw, khat=0.3, ess=40.0))
        >>> figure.axes[0].get_title()
        'k-hat 0.30, effective sample size 40 of 100'
    """
    check_has(
        "weights_plot",
        "weights",
        weights,
        ("raw", "smoothed", "khat", "ess"),
        "importance weights, as posterior.weights",
    )
    check_log_weights("weights_plot", "weights.raw", weights.raw)
    check_log_weights("weights_plot", "weights.smoothed", weights.smoothed, len(weights.raw))
    count = len(weights.raw)
    rank = torch.arange(1, count + 1)
    log_mean = weights.smoothed.logsumexp(0) - math.log(count)
    with _style():
        figure = _figure(5.6, 3.6)
        axes = figure.add_subplot()
        axes.axhline(1.0, color="#8795a1", linewidth=0.8)
        raw, smoothed = (
            (log_w - log_mean).exp().sort(descending=True).values.cpu()
            for log_w in (weights.raw, weights.smoothed)
        )
        axes.loglog(rank, raw, ".", color=PALE, markersize=4, label="weights")
        axes.loglog(rank, smoothed, color=BLUE, linewidth=1.8, label="smoothed")
        lowest = max(1e-3, min(0.5, 0.5 * raw.min().item()))
        axes.set(xlabel="rank", ylabel="weight / mean weight", ylim=(lowest, None))
        # Equal weights have no tail, and so no shape of it.
        khat = f"{weights.khat:.2f}" if weights.khat > -math.inf else "-"
        axes.set_title(f"k-hat {khat}, effective sample size {weights.ess:.0f} of {count}")
        axes.legend(loc="lower left")
    return figure


def _alpha(count: int) -> float:
    """Fewer points are drawn more strongly."""
    return min(0.8, max(0.15, 20 / math.sqrt(max(count, 1)) * 0.6))


def _style() -> Any:
    _need_matplotlib()
    import matplotlib

    return matplotlib.rc_context(STYLE)  # type: ignore[arg-type, unused-ignore]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _row(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])


def _shades() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shades", SHADES)


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "pyro_nf.plots needs matplotlib; install it by pip install 'pyro-nf[plots]'."
        ) from error
