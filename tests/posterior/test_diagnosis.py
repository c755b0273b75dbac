"""A verdict that is right where k-hat alone is not."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.infer.autoguide.initialization import init_to_value

from pyro_nf.guides.guide import AutoFlow
from pyro_nf.model.joint import LogJoint
from pyro_nf.posterior.diagnosis import Probe, check_sites, judge
from pyro_nf.posterior.posterior import Posterior
from pyro_nf.posterior.weights import Weights, smooth
from pyro_nf.vi.fit import fit_svi


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


SEEN = Probe(0.0, 0.0, 0.0, 1, log_evidence_se=0.01, count_starts=200, count_prior=100)
UNSEEN = [
    replace(SEEN, unfinished="the log joint is too dear for more than 1 steps of a climb"),
    replace(SEEN, blind="the guide has a density only at its own draws", log_evidence=math.nan),
    Probe(math.nan, math.nan, math.nan, 0, blind="only 3 of its 100 points are effective"),
]


def nearly_even(khat: float) -> Weights:
    """Weights of an effective share of 0.99, whatever is said of their tail."""
    raw = 0.1 * torch.randn(2000, generator=torch.Generator().manual_seed(0)).double()
    raw -= raw.logsumexp(0) - math.log(2000)
    return Weights(raw, raw, khat)


@pytest.mark.parametrize("khat", [0.3, -math.inf])
@pytest.mark.parametrize("found", UNSEEN)
def test_5_a_probe_that_did_not_see_everything_never_says_good(khat: float, found: Probe) -> None:
    assert judge(nearly_even(khat), SEEN, [], []).verdict == "good"
    diagnosis = judge(nearly_even(khat), found, [], [])
    assert diagnosis.verdict == "one piece as far as was seen"
    assert (found.unfinished or found.blind) in diagnosis.reasons[-1]


def test_5_even_weights_overrule_khat_only_if_the_probe_vouches_for_them() -> None:
    large = nearly_even(0.83)
    assert judge(large, SEEN, [], []).verdict == "good"
    disagreeing = [replace(SEEN, log_evidence=x) for x in (0.3, -0.3)]
    missing = replace(SEEN, missed_mass=0.2, log_evidence=0.25)
    for found in (*UNSEEN, *disagreeing, missing):
        diagnosis = judge(large, found, [], [])
        assert diagnosis.verdict == "do not trust"
        assert any("k-hat is 0.83" in reason for reason in diagnosis.reasons)


def test_5_few_starts_are_not_good() -> None:
    """A basin of a tenth of the prior may escape 30 draws of it; one of 5 % does not escape 60."""
    few, enough = (replace(SEEN, count_starts=2 * n, count_prior=n) for n in (30, 60))
    assert judge(nearly_even(0.2), enough, [], []).verdict == "good"
    diagnosis = judge(nearly_even(0.2), few, [], [])
    assert diagnosis.verdict == "one piece as far as was seen"
    assert "more than 0.1 of the prior" in diagnosis.reasons[-1]
    assert judge(nearly_even(0.83), few, [], []).verdict == "do not trust"


def test_5_more_evidence_elsewhere_is_not_good() -> None:
    diagnosis = judge(nearly_even(0.2), replace(SEEN, log_evidence=0.3), [], [])
    assert diagnosis.verdict == "do not trust"
    assert "0.30 nats larger" in diagnosis.reasons[0]


def test_5_khat_of_equal_weights_is_no_number() -> None:
    text = str(judge(smooth(torch.zeros(1000)), SEEN, [], []))
    assert "k-hat                none: the weights are equal" in text
    assert "inf" not in text and "nan" not in text


def test_5_what_could_not_be_found_out_is_not_printed() -> None:
    text = str(judge(nearly_even(0.2), UNSEEN[2], [], []))
    assert "nan" not in text
    assert "missed mass" not in text and "probed" not in text


def far_blobs() -> None:
    """Two pieces 120 sds apart by a logaddexp, whose curvature by two backward passes is NaN."""
    z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 30.0))
    apart = [dist.Normal(loc, 0.5).log_prob(z) for loc in (-30.0, 30.0)]
    pyro.factor("data", torch.logaddexp(*apart) - math.log(2))


def test_5_a_far_piece_without_curvature_is_seen_and_the_verdict_repeats() -> None:
    guide = guide_at(far_blobs, torch.tensor(-30.0, dtype=torch.float64), 0.5)
    posterior = Posterior.from_guide(guide, num_draws=2000)
    assert posterior.ess > 0.9 * 2000
    diagnosis = posterior.diagnose()
    assert diagnosis.verdict == "do not trust"
    assert diagnosis.missed_mass == pytest.approx(0.5, abs=0.05)
    assert diagnosis.count_maxima == 2
    assert str(diagnosis) == str(posterior.diagnose())
    assert "from draws of the prior" in str(diagnosis)


def test_5_seconds_that_cut_the_search_short_are_no_reason_for_good() -> None:
    guide = guide_at(correlated, torch.zeros(2), 1.0)
    with torch.no_grad():
        guide.coordinates.scale.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    posterior = Posterior.from_guide(guide, num_draws=2000)
    assert posterior.diagnose().verdict == "good"
    short = posterior.diagnose(max_seconds=1e-9)
    assert short.verdict == "one piece as far as was seen"
    assert "seconds" in short.reasons[-1]
    with pytest.raises(ValueError, match="max_seconds"):
        posterior.diagnose(max_seconds=-1.0)


def test_5_a_guide_that_was_trained_on_is_not_diagnosed_by_old_draws() -> None:
    guide = guide_at(correlated, torch.zeros(2), 0.9)
    posterior = Posterior.from_guide(guide, num_draws=200)
    with torch.no_grad():
        guide.coordinates.loc.fill_(2.0)
    with pytest.raises(RuntimeError, match="changed by"):
        posterior.diagnose()


def test_some_draws_without_density_want_the_weights() -> None:
    weights = nearly_even(0.2)
    raw = torch.cat([weights.raw, torch.full((40,), -math.inf)])
    diagnosis = judge(Weights(raw, raw, 0.2), SEEN, [], [])
    assert diagnosis.verdict == "use the weights"
    assert "2.0% of the draws have no finite density" in diagnosis.reasons[0]
    assert diagnosis.elbo == pytest.approx(float(weights.raw.mean()))


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


@pytest.mark.parametrize(("khat", "verdict"), [(0.95, "good"), (1.1, "do not trust")])
def test_5_weights_without_a_mean_are_not_overruled(khat: float, verdict: str) -> None:
    raw = 0.01 * torch.randn(2000, generator=torch.Generator().manual_seed(0)).double()
    weights = Weights(raw, raw, khat=khat)
    seen = replace(SEEN, log_evidence=weights.log_evidence)
    assert judge(weights, seen, [], []).verdict == verdict
