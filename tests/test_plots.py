"""The pictures show what they are given, and say what is missing."""

import builtins
import io
import math
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

from pyro_nf import plots, transforms
from pyro_nf.flows.base import DiagonalNormal
from pyro_nf.flows.flow import Flow
from pyro_nf.flows.recipes import maf, realnvp
from pyro_nf.posterior.weights import smooth
from pyro_nf.train.stages import History


def drawn(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=40)
    return buffer.getvalue()


def image_of(figure: Figure) -> torch.Tensor:
    return torch.as_tensor(figure.axes[-1].images[0].get_array())


def test_density_of_two_coordinates_is_the_density() -> None:
    flow = Flow(transforms.ActNorm(2)).double()
    with torch.no_grad():
        flow.transform.log_scale.copy_(torch.tensor([0.0, math.log(2.0)]))
    bounds = ((-1.0, 1.0), (-4.0, 4.0))
    figure = plots.plot_density(flow, bounds=bounds, num_samples=10, resolution=5)
    image = image_of(figure)  # rows are the second coordinate
    y = torch.tensor([1.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(image[1, 4], flow().log_prob(y).exp().detach())
    assert drawn(figure)


def test_data_samples_and_density_stand_side_by_side() -> None:
    figure = plots.plot_density(realnvp(2), torch.randn(100, 2), num_samples=20, resolution=9)
    assert [axes.get_title() for axes in figure.axes] == ["Data", "Samples", "Density"]
    assert len({axes.get_xlim() for axes in figure.axes}) == 1


def test_density_follows_the_context() -> None:
    torch.manual_seed(1)
    flow = maf(2, context_dim=1)
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.3)
    first, second = (
        image_of(plots.plot_density(flow, context=torch.tensor([c]), bounds=[(-3.0, 3.0)] * 2))
        for c in (-2.0, 2.0)
    )
    assert not torch.allclose(first, second)


def test_density_outside_of_the_support_is_zero() -> None:
    flow = Flow(transforms.Softsign(), DiagonalNormal(1, scale=3.0))
    figure = plots.plot_density(flow, bounds=[(-1.5, 1.5)], resolution=31, num_samples=50)
    line = figure.axes[0].lines[0]
    y, density = torch.as_tensor(line.get_xdata()), torch.as_tensor(line.get_ydata())
    assert bool((density[y.abs() > 1.01] == 0).all())
    assert density[y.abs() < 0.9].min() > 0.1
    assert drawn(figure)


def test_samples_leave_the_global_generator_alone() -> None:
    flow, state = realnvp(2), torch.get_rng_state()
    plots.plot_density(flow, num_samples=5, resolution=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_density_of_three_coordinates_is_refused() -> None:
    with pytest.raises(ValueError, match=r"input_dim 3, wanted 1 or 2; .* pair_plot"):
        plots.plot_density(realnvp(3))


def test_pair_plot_takes_the_first_six_entries() -> None:
    samples = {"a": torch.randn(50), "b": torch.randn(50, 2, 2), "c": torch.randn(50, 3)}
    figure = plots.pair_plot(samples)
    bottom = [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]
    assert bottom == ["a", "b[0,0]", "b[0,1]", "b[1,0]", "b[1,1]", "c[0]"]
    assert len(figure.axes) == 21  # the lower triangle with its diagonal
    assert drawn(figure)


def test_pair_plot_puts_each_entry_on_its_axis() -> None:
    x = torch.arange(10.0)
    figure = plots.pair_plot({"x": x, "y": -x})
    below = next(axes for axes in figure.axes if axes.get_ylabel() == "y")
    points = torch.as_tensor(below.collections[0].get_offsets())
    torch.testing.assert_close(points.float(), torch.stack((x, -x), -1))


def test_pair_plot_with_others() -> None:
    samples = {"x": torch.randn(50), "y": torch.randn(50)}
    figure = plots.pair_plot(samples, {k: v[:20] + 1 for k, v in samples.items()}, label="NUTS")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["NUTS"]
    assert drawn(figure)


def test_pair_plot_with_others_far_away() -> None:
    samples = {"x": torch.randn(50), "y": torch.randn(50)}
    assert drawn(plots.pair_plot(samples, {k: v + 1e6 for k, v in samples.items()}))


def test_pair_plot_of_one_constant_entry() -> None:
    assert drawn(plots.pair_plot({"x": torch.ones(5)}))


@pytest.mark.parametrize("samples", [{}, {"x": torch.zeros(0)}, {"x": torch.zeros(5, 0)}])
def test_pair_plot_of_nothing_is_refused(samples: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="draws"):
        plots.pair_plot(samples)


def test_loss_curve_shows_all_finite_losses() -> None:
    losses = [10.0, math.nan, *(2.0 + 1 / i for i in range(1, 200))]
    history = History(losses, checked_steps=[0, 100], checked_values=[3.0, 2.1], best_step=100)
    figure = plots.loss_curve(history, ylabel="-ELBO")
    (axes,) = figure.axes
    steps, shown = axes.lines[0].get_data()
    assert len(shown) == 200 and list(steps[:2]) == [1, 3]
    assert axes.get_ylabel() == "-ELBO"
    assert axes.get_ylim()[1] < 10  # the first loss does not hide the others
    assert drawn(figure)


def test_loss_curve_without_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="no step with a finite loss"):
        plots.loss_curve(History(losses=[math.nan]))


def test_weights_are_in_units_of_their_mean() -> None:
    weights = smooth(torch.randn(200).mul(0.5).add(-30.0))
    figure = plots.weights_plot(weights)
    smoothed = torch.as_tensor(figure.axes[0].lines[-1].get_ydata())
    assert smoothed.mean().item() == pytest.approx(1.0)
    assert f"{weights.ess:.0f} of 200" in figure.axes[0].get_title()
    assert drawn(figure)


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for plot in (
        lambda: plots.plot_density(realnvp(2)),
        lambda: plots.pair_plot({"x": torch.randn(9)}),
        lambda: plots.loss_curve(History(losses=[1.0])),
        lambda: plots.weights_plot(
            SimpleNamespace(raw=torch.zeros(3), smoothed=torch.zeros(3), khat=0.0, ess=3.0)
        ),
    ):
        with pytest.raises(ImportError, match=r"pip install 'pyro-nf\[plots\]'"):
            plot()
