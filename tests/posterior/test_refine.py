"""Chains that use the flow give exact draws."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_nf.guides.guide import AutoFlow
from pyro_nf.posterior.posterior import Posterior
from pyro_nf.posterior.summary import rhat_and_ess


def skewed() -> None:
    """A gamma site beside a normal one that depends on it."""
    scale = pyro.sample("scale", dist.Gamma(3.0, 1.0))
    pyro.sample("x", dist.Normal(0.3 * scale, 1.0))


@pytest.fixture
def posterior() -> Posterior:
    """Of a guide that is somewhat off."""
    return Posterior.from_guide(AutoFlow(skewed, init_scale=0.8), num_draws=1000)


@pytest.mark.parametrize(
    ("method", "num_draws"),
    [("independence", 600), ("neutra", 60)],
    ids=["independence", "neutra"],
)
def test_chains_find_the_moments(posterior: Posterior, method, num_draws: int) -> None:
    before = torch.random.get_rng_state()
    refined = posterior.refine(
        method, num_chains=4, num_draws=num_draws, warmup=50, seed=3, progress=False
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert refined.samples["scale"].shape == (4 * num_draws,)
    row = refined.summary()["scale"]
    assert row.rhat < 1.1
    noise = 3**0.5 / row.ess**0.5
    assert row.mean == pytest.approx(3.0, abs=4 * noise)
    assert row.sd == pytest.approx(3**0.5, rel=0.3)
    torch.testing.assert_close(refined.log_p, posterior.joint.log_prob(refined.z))


def test_the_seed_decides(posterior: Posterior) -> None:
    options = {"num_chains": 2, "num_draws": 10, "warmup": 5, "progress": False}
    first, second, other = (
        posterior.refine("independence", seed=seed, **options).z for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_psis_corrects_the_mean(posterior: Posterior) -> None:
    plain = posterior.summary()["scale"].mean
    assert abs(posterior.refine("psis").summary()["scale"].mean - 3.0) < abs(plain - 3.0)


def test_refined_draws_go_to_arviz_as_chains(posterior: Posterior) -> None:
    refined = posterior.refine("independence", num_chains=3, num_draws=20, warmup=5, progress=False)
    data = refined.to_arviz()
    assert data.posterior["scale"].shape == (3, 20)
    with pytest.raises(RuntimeError, match="no weights"):
        _ = refined.khat


def test_wrong_requests_are_named(posterior: Posterior) -> None:
    with pytest.raises(ValueError, match="'magic'"):
        posterior.refine("magic")
    with pytest.raises(ValueError, match="num_chains"):
        posterior.refine("independence", num_chains=0)
    normal = Posterior.from_guide(AutoNormal(skewed), num_draws=100)
    with pytest.raises(TypeError, match="AutoFlow"):
        normal.refine("neutra")


def test_rhat_of_chains_that_disagree() -> None:
    chains = torch.randn(4, 200)
    assert rhat_and_ess(chains.flatten(), 4)[0] < 1.02
    chains[0] += 3
    assert rhat_and_ess(chains.flatten(), 4)[0] > 1.2


class Interrupted:
    """The skewed model, which raises KeyboardInterrupt after so many runs."""

    runs, raise_at = 0, -1

    def __call__(self) -> None:
        self.runs += 1
        if self.runs == self.raise_at:
            raise KeyboardInterrupt
        skewed()


def refined(method, raise_after: int = -1, **options) -> tuple[Posterior, int]:
    """The refined posterior, and how often the model ran for it."""
    model = Interrupted()
    posterior = Posterior.from_guide(AutoFlow(model, init_scale=0.8), num_draws=100)
    before = model.runs
    model.raise_at = before + raise_after if raise_after > 0 else -1
    result = posterior.refine(method, num_chains=3, seed=3, progress=False, **options)
    return result, model.runs - before


@pytest.mark.parametrize("runs", [25, 40, 61])
def test_15_an_interrupted_refinement_keeps_its_draws(runs: int) -> None:
    options = {"num_draws": 50, "warmup": 10}
    kept, whole = (refined("independence", n, **options)[0] for n in (runs, -1))
    count = len(kept.z) // 3
    assert 0 < count < 50
    first = whole.z.reshape(3, 50, -1)[:, :count]  # the same draws as of chains that went on
    torch.testing.assert_close(kept.z.reshape(3, count, -1), first)
    assert kept.samples["scale"].shape == (3 * count,)
    assert "scale" in str(kept.summary())


def test_15_an_interrupted_refinement_keeps_its_complete_chains() -> None:
    options = {"num_draws": 12, "warmup": 3}
    whole, runs = refined("neutra", **options)
    kept, _ = refined("neutra", runs - 8, **options)  # in the last of three chains
    torch.testing.assert_close(kept.z, whole.z[:24])
    assert "scale" in str(kept.summary())


@pytest.mark.parametrize("method", ["independence", "neutra"])
def test_15_a_refinement_without_draws_says_that_it_was_interrupted(method) -> None:
    with pytest.raises(KeyboardInterrupt):
        refined(method, 8, num_draws=50, warmup=20)
