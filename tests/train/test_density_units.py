"""fit_density in any units: of columns, of contexts, of the base that a start brings."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor

from pyro_nf.flows.flow import Flow
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.flows.recipes import gaussian, nsf, realnvp
from pyro_nf.train.density.fit import fit_density
from pyro_nf.train.density.start import AsGiven, Whitened
from pyro_nf.train.density.table import units_of, warn_of_repeated_values
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.chain import Chain
from pyro_nf.transforms.elementwise import Exp, Sigmoid, Tanh
from pyro_nf.transforms.linear import LULinear


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def curved(count: int = 1000) -> Tensor:
    u = draws(count, 1)
    return torch.cat([u, u.square() + 0.3 * draws(count, 1, seed=1)], 1)


def small(context_dim: int = 0) -> Flow:
    torch.manual_seed(0)
    return realnvp(2, context_dim, count_layers=2, hidden_dims=(16,))


def fit(flow: Flow, x: Tensor, **options: object):
    return fit_density(flow, x, **{"max_steps": 60, "progress": False, "check_every": 20} | options)


@pytest.mark.parametrize(
    ("loc", "scale"), [(0.0, 1.0), (2015.0, 5.0), (300.0, 0.01), (10.0, 1.0), (0.0, 0.01)]
)
def test_2_contexts_of_any_unit_are_learned(loc, scale):
    u = draws(2000, 1).double()
    y = torch.cat([u, -u], 1) + 0.1 * draws(2000, 2, seed=1)
    flow = small(1).double()
    result = fit(
        flow,
        y,
        context=loc + scale * u,
        max_steps=300,
        learning_rate=1e-2,
        baselines=False,
        starts=(Whitened(),),
    )
    exact = math.log(2 * math.pi * math.e) + 2 * math.log(0.1)  # -1.767
    assert result.validation < exact + 0.2


def test_2_contexts_get_the_checks_of_rows():
    x, c = draws(40, 2), draws(40, 1).double()
    for context, message in (
        (c / 0, r"column 0 of context is not finite"),
        (1.7e9 + 10 * c, r"column 0 of context is .*float32.*flow.double"),
        (1e-45 * c, r"column 0 of context is .*too small"),
        (torch.ones(40, 1), "column 0 of context is constant"),
        (torch.where(torch.arange(40)[:, None] == 7, 1e30, c), r"row 7 of context .* column 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(small(1), x, context=context)
    with pytest.raises(TypeError, match="floating"):
        fit(small(1), x, context=torch.ones(40, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="the contexts of validation"):
        fit(small(1), x, context=c.float(), validation=(x[:3], torch.full((3, 1), 1e30)))


@pytest.mark.parametrize(
    "scale", [(1e-4, 1e-4), (1e-10, 1e-20), (1e-30, 1e30), (1e30, 1e30), (2e-30, 3e-30)]
)
def test_3_a_fit_does_not_depend_on_units(scale):
    s = torch.tensor(scale)
    plain, scaled = fit(small(), curved()), fit(small(), curved() * s)
    assert scaled.start == plain.start
    shift = s.double().log().sum().item()
    assert scaled.validation - shift == pytest.approx(plain.validation, abs=0.02)
    spread = scaled.flow().sample((4000,)).div(s).std(0)
    torch.testing.assert_close(spread, curved().std(0), rtol=0.15, atol=0)


@pytest.mark.parametrize("value", [1e10, 1e19, -1e30])
def test_3_a_row_that_spoils_the_scale_is_named(value):
    x = draws(200, 2)
    x[7, 1] = value
    with pytest.raises(ValueError, match=r"row 7 of x .* column 1"):
        fit(small(), x)
    with pytest.raises(ValueError, match=r"row 7 of validation .* column 1"):
        fit(small(), draws(200, 2), validation=x)
    with pytest.raises(ValueError, match=r"row 7 of x .* column 1"):
        fit(small().double(), 1e-30 * x.double())


def test_3_units_are_mean_and_sd_unless_rows_are_far():
    x = (5 + 3 * draws(500, 2)).double()
    units = units_of(x)
    torch.testing.assert_close(units.loc, x.mean(0))
    torch.testing.assert_close(units.scale, x.std(0, correction=0))
    x[0, 0] = 1e6
    assert units_of(x).scale[0] < 20


def test_3_units_travel_with_the_flow(tmp_path):
    x, c = 50 + 1e-3 * curved(300), 2015 + draws(300, 1)
    flow = fit(small(1), x, context=c, max_steps=20).flow
    density = flow(c).log_prob(x)
    loaded = small(1)
    loaded.load_state_dict(flow.state_dict())
    flow.save(tmp_path / "flow")
    for other in (loaded, copy.deepcopy(flow), Flow.load(tmp_path / "flow")):
        torch.testing.assert_close(other(c).log_prob(x), density, rtol=0, atol=0)
    filled = Flow.load(tmp_path / "flow", into=small(1))
    torch.testing.assert_close(filled(c).log_prob(x), density, rtol=0, atol=0)
    double = copy.deepcopy(flow).double()(c.double())
    torch.testing.assert_close(double.log_prob(x.double()).float(), density, rtol=1e-2, atol=1e-2)
    y, score = x[:5], None
    d = flow(c[:5])
    base, _ = d.transform.inverse_and_ladj(y)
    score = flow.base.log_prob_and_score(base)[1]
    leaf = y.clone().requires_grad_()
    (exact,) = torch.autograd.grad(d.log_prob(leaf).sum(), leaf)
    torch.testing.assert_close(d.transform.push_score(base, score)[2], exact, rtol=1e-2, atol=1.0)
    unfitted = small(1)
    flow.load_state_dict(unfitted.state_dict())  # and a state without units takes them away
    assert flow.units is None
    assert flow.context_units is None


def test_3_flows_onto_an_interval_are_left_alone():
    x = draws(300, 2).sigmoid()
    flow = Flow(Chain([LULinear(2), Sigmoid()]))
    assert math.isfinite(fit(flow, x, max_steps=20).validation)
    assert flow.units is None


def test_3_as_given_keeps_the_units():
    flow = fit(small(), 50 + curved(300), baselines=False).flow
    loc = flow.units.loc.clone()
    fit(flow, 51 + curved(300), starts=(AsGiven(),), max_steps=5, baselines=False)
    assert torch.equal(flow.units.loc, loc)


def clusters(count: int = 600) -> Tensor:
    return 0.2 * draws(count, 2) + 5 * torch.arange(count)[:, None].remainder(2)


def test_1_the_flow_trains_on_from_the_mixture(tmp_path):
    x = torch.cat([clusters(), clusters()[:, :1].square() + draws(600, 1, seed=2)], 1)
    x = torch.stack([x[:, 0], x[:, 2] + (3 * x[:, 0]).sin()], 1)  # curved within each cluster
    flow = small()
    result = fit(flow, x, max_steps=200)
    assert result.start == "Gaussian mixture" in result.starts
    assert isinstance(flow.base, GaussianMixture)
    assert result.validation <= result.starts["Gaussian mixture"]
    assert result.starts["Gaussian mixture"] <= result.baselines["Gaussian mixture"]
    assert "start 'Gaussian mixture'" in str(result)
    assert result.history.best_step > 0
    weights = [p for name, p in flow.transform.named_parameters() if "weight" in name]
    assert any(bool((w != v).any()) for w, v in zip(weights, weights_of(small()), strict=True))
    assert flow().sample((7,)).shape == (7, 2)
    with pytest.raises(NotImplementedError, match=r"carry no gradient.*sample\(\).*starts="):
        flow().rsample()
    flow.save(tmp_path / "flow")
    into = Flow.load(tmp_path / "flow", into=small())
    torch.testing.assert_close(into().log_prob(x), flow().log_prob(x), rtol=0, atol=0)


def weights_of(flow: Flow) -> list[Tensor]:
    return [p for name, p in flow.transform.named_parameters() if "weight" in name]


def test_1_losers_leave_no_trace_and_users_decide():
    flow = small()
    base = flow.base
    result = fit(flow, clusters(), starts=(Whitened(),))
    assert (flow.base, list(result.starts)) == (base, ["whitened"])
    assert set(result.baselines) == {"Gaussian mixture", "Gaussian copula"}
    mine = GaussianMixture(2, 2)
    flow = Flow(small().transform, mine)
    assert "Gaussian mixture" not in fit(flow, clusters()).starts
    assert flow.base is mine
    flow = gaussian(2)
    base = flow.base
    fit(flow, draws(500, 2))  # one cluster: the mixture is tried, and loses
    assert flow.base is base


@pytest.mark.parametrize(
    "column",
    [
        (draws(1000) > 0).float(),
        draws(1000) * (torch.arange(1000) % 2),
        (3 * draws(1000)).round(),
        (10 * draws(1000)).round() / 10,
        draws(1000).exp() * (torch.arange(1000) % 20 > 0),
    ],
    ids=["two-valued", "half zeros", "integers", "rounded", "zero-inflated"],
)
def test_20_repeated_values_are_named_once(column):
    x = torch.stack([draws(1000, seed=1), column], -1)
    with pytest.warns(UserWarning, match=r"column 1 .* of x repeats values.*noise") as caught:
        fit(small(), x, max_steps=3, baselines=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_20_continuous_columns_are_not_named():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1_000_000, 1, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for table in (x, x + 1000, draws(2000, 2), 1e4 + draws(1000, 2), draws(2, 2)):
            warn_of_repeated_values(table)


@pytest.mark.parametrize(
    ("end", "bad"),
    [(Sigmoid(), 0.0), (Sigmoid(), 1.0), (Sigmoid(), -0.2), (Tanh(), 1.0), (Exp(), 0.0)],
    ids=["0", "1", "below", "tanh", "exp"],
)
def test_10_a_row_at_an_end_of_the_codomain_is_named(end: FlowTransform, bad: float) -> None:
    flow = Flow(Chain([LULinear(2), end]))
    x = draws(60, 2).sigmoid()
    marred = x.clone()
    marred[7, 1] = bad
    with pytest.raises(ValueError, match=r"row 7 of x is .* in column 1.*1 such row"):
        fit(flow, marred)
    for validation in (marred, (marred, None)):
        with pytest.raises(ValueError, match=r"row 7 of validation is .* in column 1"):
            fit(flow, x, validation=validation)
    assert math.isfinite(fit(flow, x, max_steps=2).validation)


def test_20_repeated_rows_are_counted():
    x = draws(300, 2).repeat(5, 1)
    with pytest.warns(UserWarning, match="only 300 of 1500 rows of x are distinct") as caught:
        fit(small(), x, max_steps=3, baselines=False)
    assert (len(caught), caught[0].filename) == (1, __file__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(small(), x, max_steps=3, baselines=False, validation=draws(100, 2, seed=1))


@pytest.mark.parametrize("kind", ["copy", "sum", "shares"])
def test_20_columns_that_depend_are_named(kind):
    x = draws(500, 3)
    if kind == "shares":
        x = x.softmax(-1)
    else:
        x[:, 2] = x[:, 0] if kind == "copy" else x[:, 0] - 2 * x[:, 1]
    which = "0, 2" if kind == "copy" else "0, 1, 2"
    with pytest.warns(UserWarning, match=f"columns {which} of x are linear functions") as caught:
        fit(nsf(3, count_layers=1), x, max_steps=3, baselines=False)
    assert (len(caught), caught[0].filename) == (1, __file__)
    nearly = draws(500, 3)
    nearly[:, 2] = nearly[:, 0] + 1e-3 * draws(500, 3, seed=5)[:, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(nsf(3, count_layers=1), nearly, max_steps=3, baselines=False)
