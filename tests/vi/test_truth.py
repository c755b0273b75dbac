"""Fits with the defaults come close to posteriors that are known exactly."""

import pytest

from pyro_nf.posterior.posterior import Posterior
from pyro_nf.vi.fit import fit_svi
from tests.reference_models import Target, funnel, gaussian, two_modes

COUNT_DRAWS = 10_000


def fitted(target: Target, max_steps: int) -> Posterior:
    fit = fit_svi(target.model, max_steps=max_steps, progress=False)
    return fit.posterior(COUNT_DRAWS)


def assert_evidence(posterior: Posterior, target: Target) -> None:
    error = abs(posterior.log_evidence - target.log_evidence)
    assert error < 3 * posterior.log_evidence_se


@pytest.mark.slow
def test_the_neck_of_the_funnel_is_reached() -> None:
    target = funnel(10)
    posterior = fitted(target, max_steps=1500)
    assert posterior.samples["v"].std() > 2.5
    assert_evidence(posterior, target)


@pytest.mark.slow
def test_both_modes_get_their_masses() -> None:
    target = two_modes(2)
    posterior = fitted(target, max_steps=300)
    right = (posterior.samples["x"].sum(-1) > 0).double().mean()
    assert abs(right - 0.7) < 0.03
    assert target.log_evidence - posterior.elbo < 0.05
    assert_evidence(posterior, target)


@pytest.mark.slow
def test_a_stretched_gaussian_is_found() -> None:
    target = gaussian(50, condition=1e4)
    posterior = fitted(target, max_steps=200)
    assert target.log_evidence - posterior.elbo < 0.05
    assert_evidence(posterior, target)
