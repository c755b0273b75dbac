"""Guides whose log density is a bound or an estimate: what is sound works, the rest is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor

from pyro_nf import AutoFlow, Posterior, fit_svi
from pyro_nf.flows.flow import Flow
from pyro_nf.model.joint import LogJoint
from pyro_nf.posterior.refine import pulled_back
from pyro_nf.testing import check_guide, randomize
from pyro_nf.transforms.affine import LowerAffine
from pyro_nf.transforms.autoregressive import affine_autoregressive
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.kinds import kind_of
from pyro_nf.transforms.stochastic_chain import StochasticChain, chained
from pyro_nf.vi.gradients import Reparameterised, StickTheLanding, gradient_for
from pyro_nf.vi.objectives import ELBO, ImportanceWeightedELBO
from tests.stochastic_layers import Augment, Die, Metropolis, Noise, TracedLinear

SCALES = torch.tensor([0.5, 1.0, 2.0])
Y = torch.tensor([0.4, -1.0, 2.5])
# y_i ~ N(z_i, s_i), z ~ N(0, 1)
EVIDENCE = dist.Normal(0.0, (1 + SCALES**2).sqrt()).log_prob(Y).sum().item()


def model() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, SCALES).to_event(1), obs=Y)


def of_kind(kind: str) -> Callable[[int], FlowTransform | StochasticChain]:
    """A flow that makes three coordinates."""
    layers = {
        "bound": lambda d: [Noise(d), LowerAffine(d)],
        "estimate": lambda d: [affine_autoregressive(d, hidden_dims=(8,)), TracedLinear(d)],
        "exact": lambda d: [Augment(d - 1, 1), affine_autoregressive(d, hidden_dims=(8,))],
    }[kind]
    return lambda d: chained(layers(d))


def guide(kind: str) -> AutoFlow:
    pyro.clear_param_store()
    torch.manual_seed(0)
    return AutoFlow(model, of_kind(kind)).setup()


@pytest.mark.parametrize("kind", ["bound", "estimate", "exact"])
def test_plain_svi_trains_by_what_is_sound(kind: str) -> None:
    g = guide(kind)
    assert g.get_posterior().log_prob_kind == kind
    assert (kind == "exact") or kind in repr(g)
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(model, g, pyro.optim.Adam({"lr": 0.02}), elbo)
    for _ in range(120):
        svi.step()
    many = Trace_ELBO(num_particles=4000, vectorize_particles=True)
    assert EVIDENCE - 0.25 < -many.loss(model, g) < EVIDENCE + 0.05


@pytest.mark.parametrize("kind", ["bound", "estimate", "exact"])
def test_fit_svi_takes_the_gradient_that_there_is(kind: str) -> None:
    pyro.clear_param_store()
    torch.manual_seed(0)
    fit = fit_svi(model, AutoFlow(model, of_kind(kind)), max_steps=120, progress=False)
    assert (f"log_prob of the guide: {kind}" in fit.choice) == (kind != "exact")
    losses = fit.history.losses[-20:]
    assert abs(sum(losses) / len(losses) + EVIDENCE) < 0.2
    if kind != "exact":
        with pytest.raises(TypeError, match=f"log_prob_kind = '{kind}'"):
            fit.posterior(10)
        return
    posterior = fit.posterior(2000)  # nothing is drawn on the way back, so weights are weights
    assert abs(posterior.log_evidence - EVIDENCE) < 0.05
    assert posterior.refine("psis").z.shape == (2000, 3)
    with pytest.raises(TypeError, match=r"single transform.*use 'psis'"):
        posterior.refine("neutra")


@pytest.mark.parametrize("kind", ["bound", "estimate"])
def test_weights_are_refused_in_words(kind: str) -> None:
    g = guide(kind)
    with pytest.raises(TypeError, match=f"{kind}.*no importance weights.*rsample_and_log_prob"):
        Posterior.from_guide(g)
    q = g.get_posterior()
    with pytest.raises(TypeError, match=f"log_prob_kind = '{kind}'"):
        Posterior.from_distribution(q, LogJoint(model))
    z, log_w = q.rsample_and_log_prob((5,))
    assert (z.shape, log_w.shape) == ((5, 3), (5,))
    with pytest.raises(TypeError, match="q must"):
        pulled_back(LogJoint(model), q)


@pytest.mark.parametrize("kind", ["bound", "estimate", "exact"])
def test_neutra_is_refused_in_words(kind: str) -> None:
    g = guide(kind)
    word = "draw or lose" if kind == "exact" else kind
    refused = rf"AutoFlow.get_transform: wanted an invertible flow.*{word}.*plain NUTS"
    with pytest.raises(ValueError, match=refused):
        g.get_transform()
    with pytest.raises(ValueError, match=refused):
        NeuTraReparam(g).reparam(model)()


def test_the_path_weights_of_a_guide_are_weights_of_paths() -> None:
    """E [p(y, z) / w] is the evidence, where w is the weight of the path of z."""
    g = guide("bound")
    with torch.no_grad():
        torch.manual_seed(0)
        z, log_w = randomize(g, 0.1).get_posterior().rsample_and_log_prob((20_000,))
        each = (LogJoint(model).log_prob(z) - log_w - EVIDENCE).exp()
    error = each.std() / len(each) ** 0.5
    assert error < 0.1
    assert abs(each.mean() - 1) < 4 * error


@pytest.mark.parametrize("kind", ["bound", "estimate"])
def test_guide_laws(kind: str) -> None:
    check_guide(lambda: AutoFlow(model, of_kind(kind)), model, draws=2)


# Objectives.


def flow_of(kind: str, scale: float = 0.3) -> Flow:
    torch.manual_seed(0)
    return randomize(Flow(of_kind(kind)(3)), scale)


def mean_loss(objective: ELBO | ImportanceWeightedELBO, flow: Flow) -> tuple[float, float]:
    joint = LogJoint(model)
    torch.manual_seed(1)
    losses = []
    for _ in range(40):
        x = flow.base().sample((256,))
        losses.append(objective(flow, joint, x).loss.detach())
    each = torch.stack(losses)
    return each.mean().item(), (each.std() / len(each) ** 0.5).item()


def test_objectives_refuse_what_is_not_sound() -> None:
    joint, x = LogJoint(model), torch.randn(16, 3)
    with pytest.raises(TypeError, match=r"push_score.*ELBO\(Reparameterised\(\)\)"):
        ELBO(StickTheLanding())(flow_of("bound"), joint, x)
    with pytest.raises(TypeError, match=r"ImportanceWeightedELBO.*estimate.*take ELBO"):
        ImportanceWeightedELBO()(flow_of("estimate"), joint, x)
    with pytest.raises(NotImplementedError, match="has_rsample = False"):
        Reparameterised().paths(Flow(Metropolis(torch.zeros(5)), Die(5)), joint, torch.zeros(4, 1))
    with pytest.raises(TypeError, match=r"StickTheLanding: .*ELBO\(Reparameterised\(\)\)"):
        ELBO(StickTheLanding())(flow_of("bound")(), joint, 16)


def test_the_default_gradient_is_that_of_the_path_where_there_is_a_density() -> None:
    gradients = {kind: type(gradient_for(flow_of(kind))) for kind in ("bound", "estimate", "exact")}
    assert gradients == {
        "bound": Reparameterised,
        "estimate": StickTheLanding,
        "exact": StickTheLanding,
    }


def test_the_path_gradient_of_layers_whose_inverse_draws_nothing() -> None:
    """Its mean is that of the plain gradient."""
    flow, joint = flow_of("exact").double(), LogJoint(model)
    parameters, gaps = list(flow.parameters()), []
    torch.manual_seed(0)
    for _ in range(40):
        x = flow.base().sample((64,))
        grads = []
        for gradient in (Reparameterised(), StickTheLanding()):
            torch.manual_seed(len(gaps))
            loss = ELBO(gradient)(flow, joint, x).loss
            grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        gaps.append(grads[0] - grads[1])
    gap = torch.stack(gaps)
    assert bool((gap.mean(0).abs() <= 5 * gap.std(0) / math.sqrt(len(gap)) + 1e-9).all())
    assert bool((gap.std(0) > 0).any())


def test_more_paths_make_the_bound_tighter_but_never_more_than_the_evidence() -> None:
    flow = flow_of("bound", 0.1)
    one, error = mean_loss(ELBO(Reparameterised()), flow)
    many, many_error = mean_loss(ImportanceWeightedELBO(64, Reparameterised()), flow)
    assert -one < -many < EVIDENCE + 4 * many_error
    assert EVIDENCE + one > 0.1
    assert error < 0.1


@pytest.mark.parametrize("gradient", [Reparameterised(), StickTheLanding()])
def test_an_estimated_ladj_leaves_the_elbo_and_its_gradient_as_they_are(gradient) -> None:
    class Exact(TracedLinear):
        """The same map with the trace itself."""

        ladj_kind = "exact"

        def _trace(self, like: Tensor, s: Tensor) -> Tensor:
            return self.A.trace() + s.sum(-1)

    estimated, exact = (randomize(Flow(t(3)), 0.5).double() for t in (TracedLinear, Exact))
    assert torch.equal(estimated.transform.A, exact.transform.A)
    joint = LogJoint(model)
    values: dict[str, list[Tensor]] = {"estimated": [], "exact": []}
    torch.manual_seed(0)
    for _ in range(100):
        x = estimated.base().sample((128,))
        for name, flow in (("estimated", estimated), ("exact", exact)):
            estimate = ELBO(gradient)(flow, joint, x)
            (grad,) = torch.autograd.grad(estimate.loss, flow.transform.A)
            values[name].append(torch.cat([grad.flatten(), estimate.elbo.reshape(1)]))
    gap = torch.stack(values["estimated"]) - torch.stack(values["exact"])
    allowed = 5 * gap.std(0) / math.sqrt(len(gap)) + 1e-9
    assert bool((gap.mean(0).abs() <= allowed).all())
    assert bool((gap.std(0) > 0).any())


WRAPPED: dict[str, Callable[[dist.TorchDistribution], dist.TorchDistribution]] = {
    "masked": lambda q: q.mask(True),
    "independent": lambda q: dist.Independent(q, 0),
    "mapped by torch": lambda q: dist.TransformedDistribution(
        q, [dist.transforms.AffineTransform(0.0, 1.0, event_dim=1)]
    ),
    "mapped": lambda q: dist.TransformedDistribution(q, [LowerAffine(3)]),
    "mixed": lambda q: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), q.expand([2])),
}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("kind", ["bound", "estimate"])
def test_what_is_around_a_bound_is_one(kind: str, wrap: str) -> None:
    q = WRAPPED[wrap](guide(kind).get_posterior())
    assert kind_of(q) == kind
    with pytest.raises(TypeError, match="must have an exact log_prob"):
        Posterior.from_distribution(q, LogJoint(model), num_draws=5)
    exact = WRAPPED[wrap](dist.Normal(torch.zeros(3), 1.0).to_event(1))
    assert kind_of(exact) == "exact"


def test_a_map_with_an_estimate_makes_an_estimate() -> None:
    normal = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    assert kind_of(dist.TransformedDistribution(normal, [TracedLinear(3)])) == "estimate"
