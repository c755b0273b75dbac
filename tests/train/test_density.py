"""fit_density: what it learns, what it chooses, what it refuses, and that it can go on."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor

from pyro_nf.flows.distribution import FlowDistribution
from pyro_nf.flows.flow import Flow
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.flows.recipes import gaussian, maf, nice, nsf, realnvp
from pyro_nf.flows.student import StudentT
from pyro_nf.train.density.baselines import GaussianCopula, fit_gaussian_mixture
from pyro_nf.train.density.fit import fit_density
from pyro_nf.train.density.start import AsGiven, Standardised, Whitened
from pyro_nf.transforms.linear import LULinear


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(dim: int, context_dim: int = 0) -> Flow:
    torch.manual_seed(0)
    return nsf(dim, context_dim, count_layers=2, hidden_dims=(16,), count_bins=4)


def loss(flow: Flow, x: Tensor, context: Tensor | None = None) -> float:
    with torch.no_grad():
        return -flow(context).log_prob(x).mean().item()


def fit(flow: Flow, x: Tensor, **options: object):
    return fit_density(flow, x, **{"max_steps": 60, "progress": False, "check_every": 10} | options)


@pytest.mark.parametrize("recipe", [gaussian, realnvp, maf, nsf])
def test_finds_a_gaussian_far_from_the_origin(recipe):
    factor = torch.tensor([[2.0, 0.0], [1.9, 0.5]])
    x = 100 + draws(2000, 2) @ factor.T
    result = fit(recipe(2), x)
    entropy = math.log(2 * math.pi * math.e) + factor.diagonal().log().sum().item()
    fresh = 100 + draws(4000, 2, seed=1) @ factor.T
    assert loss(result.flow, fresh) < entropy + 0.15
    assert result.history.steps <= 60
    assert "Gaussian mixture" in str(result)


def test_learns_a_context():
    c = draws(2000, 1)
    y = torch.cat([3 * c, -c], 1) + 0.3 * draws(2000, 2, seed=1)
    result = fit(small(2, 1), y, context=c, max_steps=300, batch_size=128, baselines=False)
    entropy = math.log(2 * math.pi * math.e) + 2 * math.log(0.3)
    assert loss(result.flow, y, c) < entropy + 0.3
    assert result.flow(torch.tensor([2.0])).sample((200,)).mean(0)[0].item() == pytest.approx(
        6, abs=1
    )


def test_context_with_baselines_and_given_validation():
    c, y = draws(200, 1), draws(200, 2, seed=1)
    result = fit(small(2, 1), y, context=c, validation=(y[:50], c[:50]))
    assert set(result.baselines) == {"Gaussian mixture", "Gaussian copula"}


def test_separate_clusters_with_spikes_take_the_mixture(tmp_path):
    x = draws(600, 3) * torch.tensor([1.0, 1.0, 1e-3]) + 4 * torch.arange(600)[:, None].remainder(3)
    flow = small(3)
    result = fit(flow, x)
    assert result.start == "Gaussian mixture"
    assert isinstance(flow.base, GaussianMixture)
    assert result.validation == pytest.approx(result.baselines["Gaussian mixture"])
    assert flow().sample((7,)).shape == (7, 3)
    assert not flow().has_rsample
    flow.save(tmp_path / "flow.safetensors")
    assert torch.equal(Flow.load(tmp_path / "flow.safetensors")().log_prob(x), flow().log_prob(x))


def test_heavy_tails_stay_bounded(tmp_path):
    columns, rows = 79, 2000  # wide, small and heavy-tailed
    x = torch.distributions.StudentT(1.5).sample((rows + 500, columns))
    flow = nsf(columns, hidden_dims=(32,), count_layers=2)
    train, test = x[:rows], x[rows:]
    result = fit(flow, train, max_steps=40)
    standard = -torch.distributions.StudentT(1.5).log_prob(test).sum(-1).mean().item()
    assert isinstance(flow.base, (StudentT, GaussianMixture))
    assert math.isfinite(result.validation)
    assert loss(flow, test) < 4 * standard
    flow.save(tmp_path / "flow.safetensors")
    assert torch.equal(
        Flow.load(tmp_path / "flow.safetensors")().log_prob(test), flow().log_prob(test)
    )


def test_starts_are_chosen_by_validation_and_whitening_is_better_for_correlations():
    x = draws(500, 1) + 0.01 * draws(500, 2, seed=1)
    result = fit(small(2), x, baselines=False)
    assert result.start == "whitened"
    assert result.starts["whitened"] < result.starts["standardised"]
    assert fit(small(2), x, starts=(Standardised(),), baselines=False).start == "standardised"


def test_a_trained_flow_goes_on_as_given():
    x = 50 + draws(400, 2)
    flow = fit(small(2), x, baselines=False).flow
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    result = fit(flow, x, starts=(AsGiven(),), learning_rate=1e-12, baselines=False)
    assert result.start == "as given"
    for name, value in flow.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)


def test_overfitting_raises_the_decay_unless_it_is_given():
    x, check, fresh = (
        torch.cat([z, 0.5 * draws(n, 6, seed=i + 3) + z.square()], 1)
        for i, n in enumerate((400, 1000, 1000))
        for z in [draws(n, 6, seed=i)]
    )
    options = {"max_steps": 400, "starts": (Standardised(),), "baselines": False}
    flows = {decay: nsf(12, count_layers=2) for decay in (None, 0.1)}
    overfits = {
        decay: fit(flow, x, validation=check, weight_decay=decay, **options).history.overfits
        for decay, flow in flows.items()
    }
    assert overfits[None]
    assert overfits[0.1] == []
    assert loss(flows[None], fresh) < loss(flows[0.1], fresh) - 0.1


def test_decay_leaves_marginals_alone():
    x = draws(2000, 2).exp()
    options = {"learning_rate": 1e-2, "max_steps": 300, "baselines": False}
    decayed = fit(small(2), x, weight_decay=30.0, **options)
    entropy = 2 * 0.5 * math.log(2 * math.pi * math.e)  # of two lognormal columns
    assert loss(decayed.flow, x) < entropy + 0.15


def test_resumed_is_bitwise_uninterrupted_and_ctrl_c_returns(tmp_path, monkeypatch):
    x = draws(300, 2).exp()
    options = {"max_steps": 100, "starts": (Whitened(),), "baselines": False, "patience": None}
    whole = fit(small(2), x, **options)

    interrupted = small(2)
    plain, calls = Flow.forward, iter(range(10**6))

    def forward(self: Flow, context: Tensor | None = None):
        if next(calls) == 85:  # some 70 steps, and a dozen looks at validation
            raise KeyboardInterrupt
        return plain(self, context)

    with monkeypatch.context() as patch:
        patch.setattr(Flow, "forward", forward)
        stopped = fit(interrupted, x, checkpoint=tmp_path / "fit", checkpoint_every=20, **options)
    assert stopped.history.stopped == "interrupted"
    assert stopped.history.steps < 100
    resumed = fit(small(2), x, checkpoint=tmp_path / "fit", checkpoint_every=20, **options)
    assert resumed.history.losses == whole.history.losses
    for a, b in zip(whole.flow.parameters(), resumed.flow.parameters(), strict=True):
        assert torch.equal(a, b)


def test_global_generator_is_left_alone_and_seeds_decide():
    x = draws(200, 2)
    torch.manual_seed(3)
    expected = torch.randn(3)
    flow = small(2)
    torch.manual_seed(3)
    first = fit(flow, x, max_steps=20)
    assert torch.equal(torch.randn(3), expected)
    second = fit(small(2), x, max_steps=20)
    third = fit(small(2), x, max_steps=20, seed=1)
    assert first.history.losses == second.history.losses != third.history.losses


def test_seconds_include_everything():
    now = iter(range(10**7))
    result = fit(
        small(2),
        draws(300, 2),
        max_steps=None,
        max_seconds=500.0,
        patience=None,
        clock=lambda: float(next(now)),
    )
    assert result.history.stopped == "max_seconds"
    assert 450 < next(now) < 600


def test_compiled_loss(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or f)
    fit(small(2), draws(100, 2), compile=True, max_steps=5)
    assert len(compiled) == 1


def test_double_flow_takes_float_rows():
    result = fit(small(2).double(), draws(200, 2), max_steps=20)
    assert result.flow().sample((2,)).dtype == torch.float64


def with_entry(row: int, column: int, value: float) -> Tensor:
    x = draws(20, 3)
    x[row, column] = value
    return x


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (with_entry(3, 1, math.nan), ValueError, "column 1 of x is not finite .* 1 of 20 rows"),
        (with_entry(0, 2, -math.inf), ValueError, "column 2 of x is not finite"),
        (draws(20, 4), ValueError, "last dimension 4, but input_dim is 3"),
        (draws(3), ValueError, "rows of shape"),
        (draws(4, 5, 3), ValueError, "rows of shape"),
        (draws(0, 3), ValueError, "0 row"),
        (draws(1, 3), ValueError, "1 row"),
        (draws(20, 3) * torch.tensor([1.0, 0.0, 1.0]), ValueError, "column 1 of x is constant"),
        (torch.ones(20, 3, dtype=torch.long), TypeError, "floating"),
        ([[1.0, 2.0, 3.0]], TypeError, r"torch.Tensor, got list"),
    ],
)
def test_bad_data(x, error, message):
    flow = small(3)
    before = [p.detach().clone() for p in flow.parameters()]
    with pytest.raises(error, match=message):
        fit(flow, x)
    assert all(torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True))


def test_bad_context_and_validation():
    x, c = draws(20, 2), draws(20, 1)
    for context, message in (
        (None, "missing"),
        (draws(20, 2), "context_dim = 1"),
        (c[:7], "20 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(small(2, 1), x, context=context)
    with pytest.raises(ValueError, match="takes none"):
        fit(small(2), x, context=c)
    with pytest.raises(ValueError, match="column 0 of context is not finite"):
        fit(small(2, 1), x, context=c / 0)
    for validation in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="a share between 0 and 1"):
            fit(small(2), x, validation=validation)
    for pair in ((x,), (x, None, x)):
        with pytest.raises(ValueError, match=r"a tuple of [13], wanted \(rows, contexts\)"):
            fit(small(2), x, validation=pair)
    with pytest.raises(ValueError, match="column 1 of validation is not finite"):
        fit(small(2), x, validation=x * torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="validation has no rows"):
        fit(small(2), x, validation=x[:0])


def test_two_rows_are_enough():
    assert math.isfinite(fit(small(2), draws(2, 2), max_steps=10).validation)


def test_baselines_of_a_wide_table_take_seconds():
    x = 5 + draws(500, 300) @ (torch.eye(300) + 0.1 * draws(300, 300, seed=1))
    flow = nsf(300, count_layers=1, hidden_dims=(8,))
    before = time.process_time()
    result = fit(flow, x, max_steps=2, starts=(Whitened(),))
    assert time.process_time() - before < 20
    plain = Flow(LULinear(300))
    Whitened()(plain, x, None)
    assert result.baselines["Gaussian mixture"] < loss(plain, x) + 100  # a full Gaussian at least
    assert math.isfinite(result.baselines["Gaussian copula"])


def test_mixture_by_em_finds_its_clusters():
    x = torch.cat([draws(400, 2) * 0.3 + 5, draws(400, 2, seed=1) * torch.tensor([2.0, 0.1]) - 5])
    x = x[torch.randperm(800, generator=torch.Generator().manual_seed(0))]
    mixture = fit_gaussian_mixture(x[:600], x[600:], generator=torch.Generator().manual_seed(0))
    truth = math.log(2) + math.log(2 * math.pi * math.e) + math.log(0.3) + 0.5 * math.log(0.2)
    assert -mixture().log_prob(x[600:]).mean().item() < truth + 0.15
    assert 2 <= mixture.sizes()["count_components"] <= 10
    far = torch.full((1, 2), 300.0)
    assert mixture().log_prob(far).item() > -40  # a square would cost thousands
    torch.manual_seed(0)
    spread = mixture().sample((100_000,)).std(0)
    torch.testing.assert_close(spread, x.std(0), rtol=0.1, atol=0)  # the far reach is seldom drawn


def test_mixture_base_is_a_density_and_samples_from_it():
    torch.manual_seed(0)
    mixture = GaussianMixture(2, 3).double()
    for p in mixture.parameters():
        torch.nn.init.normal_(p, std=0.7)
    distribution = mixture()
    grid = torch.linspace(-14, 14, 400, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    mass = distribution.log_prob(points).exp().sum().item() * (grid[1] - grid[0]).item() ** 2
    assert mass == pytest.approx(1, abs=1e-3)
    x = mixture((4,)).sample((30_000,))
    assert x.shape == (30_000, 4, 2)
    exact = torch.einsum("k,kd->d", distribution.log_weights.exp(), distribution.means)
    torch.testing.assert_close(x.mean((0, 1)), exact, atol=0.05, rtol=0)
    components = [
        torch.distributions.MultivariateNormal(m, precision_matrix=u @ u.T)
        for m, u in zip(distribution.means, distribution.factors, strict=True)
    ]
    joint = torch.stack([c.log_prob(points) for c in components], -1) + distribution.log_weights
    torch.testing.assert_close(distribution.log_prob(points), joint.logsumexp(-1))


def test_copula_is_nearly_exact_for_a_gaussian():
    factor = torch.tensor([[1.0, 0.0], [0.9, 0.4]])
    copula = GaussianCopula(draws(1000, 2) @ factor.T)
    fresh = draws(1000, 2, seed=1) @ factor.T
    entropy = math.log(2 * math.pi * math.e) + factor.diagonal().log().sum().item()
    assert -copula.log_prob(fresh).mean().item() == pytest.approx(entropy, abs=0.12)
    assert copula.log_prob(fresh.reshape(10, 100, 2)).shape == (10, 100)


def test_ctrl_c_in_the_race_ends_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [0], Flow.forward

    def interrupted(self: Flow, context: Tensor | None = None) -> FlowDistribution:
        calls[0] += 1
        if calls[0] == 30:
            raise KeyboardInterrupt
        return forward(self, context)

    monkeypatch.setattr(Flow, "forward", interrupted)
    fit = fit_density(nice(2), torch.randn(200, 2), max_steps=1000, progress=False)
    assert fit.history.stopped == "interrupted"
    assert fit.history.steps < 30


def test_columns_that_lose_their_digits_are_named() -> None:
    x = torch.randn(100, 2).double()
    for column in (1.7e9 + 100 * x[:, 0], 1e300 * x[:, 0]):
        table = torch.stack([x[:, 1], column], -1)
        with pytest.raises(ValueError, match=r"column 1 of x .*float32.*flow.double"):
            fit_density(nice(2), table, max_steps=20, progress=False)
    table = torch.stack([x[:, 1], 1.7e9 + 100 * x[:, 0]], -1)
    fit_density(nice(2).double(), table, max_steps=20, progress=False)


def test_a_list_is_told_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"torch\.as_tensor"):
        fit_density(nice(2), [[0.0, 1.0]], progress=False)  # type: ignore[arg-type]
