"""A verdict that is right where k-hat alone is not."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.infer.autoguide.initialization import init_to_value

from pyro_nf.infer.diagnosis import Probe, check_sites, judge
from pyro_nf.infer.fit import fit_svi
from pyro_nf.infer.guide import AutoFlow
from pyro_nf.infer.joint import LogJoint
from pyro_nf.infer.posterior import Posterior
from pyro_nf.infer.weights import Weights, smooth


def correlated() -> None:
    covariance = torch.tensor([[1.0, 0.6], [0.6, 1.0]])
    pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))


def two_modes() -> None:
    """A fifth of the mass lies eight standard deviations away."""
    parts = dist.Normal(torch.tensor([-4.0, 4.0]), 1.0)
    weights = dist.Categorical(torch.tensor([0.8, 0.2]))
    pyro.sample("z", dist.MixtureSameFamily(weights, parts))


def guide_at(model, loc: torch.Tensor, scale: float) -> AutoFlow:
    """A guide that was never trained, with a Gaussian of its own."""
    start = init_to_value(values={"z": loc})
    return AutoFlow(model, init_loc_fn=start, init_scale=scale).setup()


def test_a_good_fit_is_good() -> None:
    fit = fit_svi(correlated, max_steps=200, progress=False)
    diagnosis = fit.posterior(2000).diagnose()
    assert diagnosis.verdict == "good"
    assert diagnosis.missed_mass < 0.01
    assert diagnosis.log_evidence == pytest.approx(0.0, abs=0.01)
    assert "good" in str(diagnosis)


def test_a_missed_mode_is_found_though_khat_is_small() -> None:
    posterior = Posterior.from_guide(guide_at(two_modes, torch.tensor(-4.0), 1.05), num_draws=2000)
    assert posterior.khat < 0.5
    assert posterior.ess > 0.95 * 2000
    diagnosis = posterior.diagnose()
    assert diagnosis.verdict == "do not trust"
    assert diagnosis.missed_mass == pytest.approx(0.2, abs=0.05)
    assert diagnosis.count_maxima >= 2
    assert diagnosis.probed_log_evidence == pytest.approx(0.0, abs=0.05)


def test_a_far_off_narrow_guide_is_not_trusted() -> None:
    guide = guide_at(correlated, torch.tensor([6.0, -6.0]), 0.001)
    posterior = Posterior.from_guide(guide, num_draws=2000)
    diagnosis = posterior.diagnose()
    assert diagnosis.verdict == "do not trust"
    assert diagnosis.missed_mass > 0.9


def test_a_guide_without_correlation_wants_its_weights() -> None:
    guide = AutoDiagonalNormal(correlated, init_scale=1.0)
    guide()
    diagnosis = Posterior.from_guide(guide, num_draws=4000).diagnose()
    assert diagnosis.verdict == "use the weights"
    assert "resample" in diagnosis.advice


def test_another_fit_with_other_evidence_is_reported() -> None:
    posterior = Posterior.from_guide(guide_at(correlated, torch.zeros(2), 0.8), num_draws=1000)
    other = replace(posterior, log_p=posterior.log_p + 1.0)
    diagnosis = posterior.diagnose([other])
    assert diagnosis.verdict == "do not trust"
    assert any("another fit" in reason for reason in diagnosis.reasons)


def test_draws_without_density_are_reported() -> None:
    log_weights = torch.zeros(1000)
    log_weights[:100] = -math.inf
    diagnosis = judge(smooth(log_weights), Probe(0.0, 0.0, 0.0, 1), [], [])
    assert diagnosis.verdict == "do not trust"
    assert "10%" in diagnosis.reasons[0]


def test_numbers_that_are_not_finite_are_not_good() -> None:
    weights = Weights(torch.zeros(100), torch.full((100,), math.nan), khat=0.1)
    assert judge(weights, Probe(0.0, 0.0, 0.0, 1), [], []).verdict == "do not trust"


def test_sites_are_named_the_worst_first() -> None:
    joint = LogJoint(correlated)
    z = torch.randn(2000, 2)
    log_weights = -0.5 * (z[:, 1] - 0.5).square() + 0.5 * z[:, 1].square()
    worst, other = check_sites(joint, z, smooth(log_weights))
    assert worst.name == "z[1]"
    assert worst.shift == pytest.approx(0.5, abs=0.1)
    assert abs(other.shift) < 0.1


def test_resampled_draws_have_nothing_to_diagnose() -> None:
    posterior = Posterior.from_guide(guide_at(correlated, torch.zeros(2), 0.8), num_draws=500)
    with pytest.raises(RuntimeError, match="no weights"):
        posterior.resample().diagnose()


def test_a_density_that_is_an_estimate_is_not_good() -> None:
    even = smooth(0.01 * torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    assert judge(even, Probe(0.0, 0.0, 0.0, 1), [], []).verdict == "good"
    diagnosis = judge(even, Probe(0.0, 0.0, 0.0, 1), [], [], is_random=True)
    assert diagnosis.verdict == "do not trust"
    assert "subsample" in diagnosis.reasons[0] and "all rows" in diagnosis.advice


def test_a_subsampled_model_is_reported() -> None:
    y = torch.randn(100, generator=torch.Generator().manual_seed(0))

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 100, subsample_size=10) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    guide = AutoDiagonalNormal(model)
    guide()
    assert "subsample" in Posterior.from_guide(guide, num_draws=100).diagnose().reasons[0]


def test_one_draw_is_refused() -> None:
    posterior = Posterior.from_guide(guide_at(correlated, torch.zeros(2), 0.8), num_draws=1)
    with pytest.raises(ValueError, match="one draw"):
        posterior.diagnose()
