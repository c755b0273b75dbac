"""The settings of a fit: replaceable, printed, and part of a checkpoint's marks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nf import AutoFlow, fit_svi, flows, infer
from pyro_nf.infer import PosteriorRecipe
from pyro_nf.model.joint import LogJoint
from pyro_nf.model.metered import Metered
from pyro_nf.train.budget import Budget
from pyro_nf.vi.stages import Step, choose_check_particles, choose_particles, posterior_stages


def model() -> None:
    tau = pyro.sample("tau", dist.Gamma(torch.tensor(2.0), 1.0))
    pyro.sample("x", dist.Normal(torch.tensor(0.0), tau))


def fit(**options):
    """Of a guide that has its start."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = AutoFlow(model, lambda d: flows.iaf(d, count_layers=1, hidden_dims=(4,))).setup()
    return fit_svi(model, guide, progress=False, **{"max_steps": 3} | options)


def test_a_recipe_is_printed_with_the_fit_and_can_be_read_back() -> None:
    recipe = PosteriorRecipe(num_particles=6, average=0.5, betas=(0.8, 0.9))
    result = fit(recipe=recipe)
    assert result.recipe == recipe
    assert repr(recipe) in repr(result)
    assert eval(repr(recipe)) == recipe
    assert hash(PosteriorRecipe(betas=[0.8, 0.9])) == hash(PosteriorRecipe(betas=(0.8, 0.9)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.average = 0.9


def test_the_particles_that_were_chosen_are_in_the_recipe() -> None:
    assert fit(max_steps=2).recipe == PosteriorRecipe(num_particles=256)
    assert fit(max_steps=2, recipe=PosteriorRecipe(many_particles=64)).recipe.num_particles == 64
    given = PosteriorRecipe(num_particles=8)
    assert fit(max_steps=2, recipe=given, num_particles=4).recipe.num_particles == 4
    assert fit(max_steps=2, recipe=given).history.losses == (
        fit(max_steps=2, num_particles=8).history.losses
    )


def test_a_fit_without_a_budget_takes_the_steps_of_its_recipe() -> None:
    result = fit(max_steps=None, recipe=PosteriorRecipe(max_steps=3, num_particles=4))
    assert (result.history.steps, result.history.stopped) == (3, "max_steps")


def test_rates_shares_and_moments_are_those_of_the_recipe() -> None:
    recipe = PosteriorRecipe(
        affine_share=0.5, affine_rates=(4e-2, 1e-2), shape_share=0.5, betas=(0.5, 0.6)
    )
    guide = AutoFlow(model).setup()
    guide.start_at(infer.laplace_start(LogJoint(model), max_seconds=None))
    first, second = posterior_stages(guide.flow, LogJoint(model), rate=0.01, recipe=recipe)
    assert (first.share, second.share) == (0.5, 0.5)
    assert first.optimizer.param_groups[0]["lr"] == 4e-2
    assert first.schedule(10**6, 1.0) == pytest.approx(0.25)
    assert {g["lr"] for g in second.optimizer.param_groups} == {0.01, 0.005}
    assert {g["betas"] for s in (first, second) for g in s.optimizer.param_groups} == {(0.5, 0.6)}


def test_sizes_are_those_of_the_recipe() -> None:
    joint = LogJoint(model)
    recipe = PosteriorRecipe(few_particles=8, many_particles=16, least_particles=2)
    assert choose_particles(joint, None, recipe) == 16
    assert recipe.rate(100, 16) == 0.01 and recipe.rate(100, 8) == 0.005
    assert PosteriorRecipe(rate_times_steps=0.7).rate(100, 256) == pytest.approx(0.007)
    few = PosteriorRecipe(num_check_particles=12)
    assert choose_check_particles(Metered(joint, Budget()), few) == 12


def test_how_far_draws_are_moved_is_that_of_the_recipe() -> None:
    flow, seen = flows.iaf(2, count_layers=1), []

    class Spy(infer.ELBO):
        def __call__(self, q, joint, x, weights=None):
            seen.append(x)
            return super().__call__(q, joint, x, weights)

    recipe = PosteriorRecipe(even=1e9, far_share=0.5, far=3.0)
    step = Step(flow, LogJoint(model), Spy(), 8, tails=True, recipe=recipe)
    torch.manual_seed(0), step()
    torch.manual_seed(0), step()
    factor = torch.ones(8, 1)
    factor[:4] = 1 + 3 / 2**0.5
    torch.testing.assert_close(seen[1], factor * seen[0])


def test_another_recipe_is_another_fit_but_for_its_budget(tmp_path: Path) -> None:
    options = {"checkpoint": tmp_path / "fit", "num_particles": 4}
    fit(**options)
    fit(**options, recipe=PosteriorRecipe(max_steps=7, grace=2.0))
    with pytest.raises(ValueError, match=r"recipe was \{\}, now \{'affine_share': 0.5\}"):
        fit(**options, recipe=PosteriorRecipe(affine_share=0.5))


def test_the_old_name_of_a_start_says_the_new_one() -> None:
    with pytest.warns(DeprecationWarning, match="is now GaussianStart"):
        old = infer.Start
    assert old is infer.GaussianStart
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        infer.nothing  # noqa: B018
