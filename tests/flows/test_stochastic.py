"""Flows with layers that draw or lose something, against enumeration and quadrature."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.distributions import Normal

from pyro_nf.flows.base import Base, DiagonalNormal
from pyro_nf.flows.distribution import FlowDistribution
from pyro_nf.flows.flow import Flow
from pyro_nf.flows.stochastic import StochasticFlowDistribution
from pyro_nf.testing import (
    check_flow,
    check_log_prob,
    check_stochastic,
    ladj_is_autograds,
    randomize,
)
from pyro_nf.transforms.chain import Chain
from pyro_nf.transforms.coupling import affine_coupling
from pyro_nf.transforms.elementwise import spline
from pyro_nf.transforms.linear import LULinear
from pyro_nf.transforms.stochastic import StochasticTransform
from pyro_nf.transforms.stochastic_chain import StochasticChain, chained
from tests.stochastic_layers import (
    Abs,
    Argmax,
    Augment,
    Die,
    Largest,
    Metropolis,
    Noise,
    Rounded,
    Slice,
    TracedLinear,
)

F64 = torch.float64
GRID = torch.linspace(-9.0, 9.0, 901, dtype=F64)
LOG_TARGET = torch.tensor([0.0, -1.0, 0.5, -2.0, 1.0], dtype=F64)


def integral(log_density: Tensor) -> Tensor:
    """log of the integral over the grid, in the last dimension."""
    return log_density.logsumexp(-1) + (GRID[1] - GRID[0]).log()


def base(dim: int) -> DiagonalNormal:
    loc = torch.linspace(-0.4, 0.5, dim, dtype=F64)
    return DiagonalNormal(dim, loc=loc, scale=torch.linspace(0.8, 1.3, dim, dtype=F64))


def normals(of: Base) -> list[Normal]:
    return [Normal(loc, scale) for loc, scale in zip(of.loc, of.scale, strict=True)]


@dataclass(frozen=True)
class Case:
    """A flow, its true log density, and points."""

    flow: Flow
    truth: Callable[[Tensor], Tensor]
    y: Tensor
    context: Tensor | None = None


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64).unsqueeze(-1)


def made(transform: StochasticTransform, of: Base) -> Flow:
    return Flow(randomize(transform), of).double()


def a_fold() -> Case:
    """|x| of a spline of a normal: two points fold onto one."""
    warp = randomize(spline(1, count_bins=4, bound=2.0)).double()
    flow = Flow(warp, base(1))

    def truth(y: Tensor) -> Tensor:
        return torch.logaddexp(flow.log_prob(y), flow.log_prob(-y))

    return Case(Flow(StochasticChain([warp, Abs(1)]), base(1)), truth, column(0.1, 0.8, 2.5))


def a_largest() -> Case:
    of = normals(base(3))

    def truth(y: Tensor) -> Tensor:
        rest = sum(n.cdf(y).log() for n in of)
        return torch.cat([n.log_prob(y) + rest - n.cdf(y).log() for n in of], -1).logsumexp(-1)

    return Case(made(Largest(3, output_shape=1), base(3)), truth, column(-0.2, 0.6, 2.0))


def a_noise() -> Case:
    """A bimodal law, noise, and a linear map: the truth is an integral over what came before."""
    warp = randomize(spline(1, count_bins=4, bound=2.0)).double()
    noise = randomize(Noise(1)).double()
    before = Flow(warp, base(1))

    def truth(y: Tensor) -> Tensor:
        log_p = noise.p(GRID, None).log_prob(y / 2)  # y = 2 x'
        return integral(before.log_prob(GRID.unsqueeze(-1)) + log_p) - math.log(2)

    double = LULinear(1).double()
    with torch.no_grad():
        double.log_diagonal.fill_(math.log(2))
    chain = StochasticChain([warp, noise, double])
    return Case(Flow(chain, base(1)), truth, column(-1.0, 0.3, 4.0))


def a_conditional_noise() -> Case:
    noise = randomize(Noise(1, 2)).double()
    context = torch.tensor([0.7, -0.4], dtype=F64)

    def truth(y: Tensor) -> Tensor:
        (n,) = normals(base(1))
        return integral(n.log_prob(GRID) + noise.p(GRID, context).log_prob(y))

    return Case(Flow(noise, base(1)), truth, column(-1.0, 0.3, 2.0), context)


def an_augmentation() -> Case:
    """Sizes differ, and nothing is drawn on the way back: the density is exact."""
    augment, turn = randomize(Augment(1, 1)).double(), randomize(LULinear(2)).double()

    def truth(y: Tensor) -> Tensor:
        x, ladj = turn.inverse_and_ladj(y)
        (n,) = normals(base(1))
        law = Normal(x[..., :1] @ augment.net.weight.T + augment.net.bias, 0.7)
        return n.log_prob(x[..., 0]) + law.log_prob(x[..., 1:]).sum(-1) + ladj

    y = torch.tensor([[0.1, 1.0], [-2.0, 0.3]], dtype=F64)
    return Case(Flow(StochasticChain([augment, turn]), base(1)), truth, y)


def an_image() -> Case:
    """A channel is dropped; what is drawn for it is narrower than what it was."""
    flow = Flow(Slice(event_shape=(2, 3, 2), output_shape=(1, 3, 2))).double()
    y = torch.linspace(-1.0, 1.0, 12, dtype=F64).reshape(2, 1, 3, 2)
    return Case(flow, lambda y: Normal(0.0, 1.0).log_prob(y).sum((-3, -2, -1)), y)


def a_rounding() -> Case:
    of = normals(base(2))

    def truth(y: Tensor) -> Tensor:
        each = [(n.cdf(y[..., i] + 1) - n.cdf(y[..., i])).log() for i, n in enumerate(of)]
        return each[0] + each[1]

    y = torch.tensor([[0.0, 0.0], [-1.0, 1.0], [1.0, -2.0]], dtype=F64)
    return Case(made(Rounded(2), base(2)), truth, y)


def an_argmax() -> Case:
    of = normals(base(3))
    below = [torch.special.log_ndtr((GRID - n.loc) / n.scale) for n in of]
    each = [n.log_prob(GRID) + sum(below) - own for n, own in zip(of, below, strict=True)]
    table = integral(torch.stack(each))
    y = column(0.0, 1.0, 2.0)
    return Case(made(Argmax(3), base(3)), lambda y: table[y.long().squeeze(-1)], y)


def a_metropolis() -> Case:
    """Three steps on a ring of five states: the truth is a product of matrices."""
    step, die = Metropolis(LOG_TARGET), randomize(Die(5)).double()
    log_p = (die.logits.softmax(-1) @ torch.linalg.matrix_power(step.matrix(), 3)).log()
    chain = StochasticChain([step, step, step])
    y = torch.arange(5, dtype=F64).unsqueeze(-1)
    return Case(Flow(chain, die), lambda y: log_p[y.long().squeeze(-1)], y)


CASES = [
    a_fold,
    a_largest,
    a_noise,
    a_conditional_noise,
    an_augmentation,
    an_image,
    a_rounding,
    an_argmax,
    a_metropolis,
]


@pytest.mark.parametrize("make", CASES)
def test_the_bound_of_a_flow_agrees_with_enumeration(make: Callable[[], Case]) -> None:
    case = make()
    wanted = "exact" if make is an_augmentation else "bound"
    assert case.flow.log_prob_kind == wanted
    check_log_prob(case.flow, case.truth, case.y, case.context)


def test_enumeration_sums_to_one() -> None:
    """The truths themselves are laws."""
    for make in (an_argmax, a_metropolis):
        case = make()
        assert abs(case.truth(case.y).logsumexp(0).item()) < 1e-6


def test_many_paths_come_near_the_truth() -> None:
    case = an_argmax()
    torch.manual_seed(0)
    d, wanted = case.flow(), case.truth(case.y)
    many = d.importance_weighted_log_prob(case.y, 20_000)
    few = torch.stack([d.importance_weighted_log_prob(case.y, 2) for _ in range(400)]).mean(0)
    one = torch.stack([d.log_prob(case.y) for _ in range(400)]).mean(0)
    assert bool((one < few).all())
    assert bool((few < wanted).all())
    torch.testing.assert_close(many, wanted, atol=0.05, rtol=0)
    assert d.importance_weighted_log_prob(case.y.long(), 2).shape == (3,)


def test_a_law_finds_what_is_wrong() -> None:
    class Unpaid(Abs):
        """Forgets the coins."""

        def _contribution(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
            return torch.zeros_like(x[..., 0])

    class Turned(Noise):
        """Has the sign of the contribution wrong."""

        def _contribution(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
            return -super()._contribution(x, y, context)

    class Backwards(Metropolis):
        """Weighs the way back."""

        def _contribution(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
            return -super()._contribution(x, y, context)

    class Unsloped(Argmax):
        """Forgets the slope of what presses the others below the top."""

        def _contribution(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
            is_top = self._is_top(y)
            gap = torch.where(is_top, 1.0, x.gather(-1, y.long()) - x)
            slope = torch.where(is_top, 0.0, (-(-gap).expm1()).log())
            return super()._contribution(x, y, context) + slope.sum(-1)

    class Certain(Abs):
        """Says that the inverse draws nothing."""

        random = "forward"

    ring = Metropolis(LOG_TARGET).matrix()
    die = randomize(Die(5)).double()

    def of_ring(y: Tensor) -> Tensor:
        return (die.logits.softmax(-1) @ ring).log()[y.long().squeeze(-1)]

    wrong = [
        (Flow(StochasticChain([a_fold().flow.transform.parts[0], Unpaid(1)]), base(1)), a_fold()),
        (made(Turned(1), base(1)), a_noise()),
        (Flow(Backwards(LOG_TARGET), die), Case(die, of_ring, a_metropolis().y)),
        (made(Unsloped(3), base(3)), an_argmax()),
        (Flow(Certain(1), base(1)), a_fold()),
    ]
    for flow, case in wrong:
        with pytest.raises(AssertionError, match="off by"):
            check_log_prob(flow, case.truth, case.y)
    with pytest.raises(AssertionError, match="undoes"):
        check_stochastic(Certain(1))


def test_a_law_finds_a_contribution_of_another_pair() -> None:
    class Stale(Noise):
        """Weighs one draw and returns another."""

        def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
            return self._forward(x, context), super()._forward_and_ladj(x, context)[1]

    class Shared(Noise):
        """One draw for all."""

        def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
            p = self.p(x, context)
            return p.loc + p.scale * torch.zeros_like(x)

    with pytest.raises(AssertionError, match="contribution forward"):
        check_stochastic(Stale(2))
    with pytest.raises(AssertionError, match="random is 'both'"):
        check_stochastic(Shared(2))


@pytest.mark.parametrize("wrong", ["ladj", "gradient"])
def test_a_law_finds_a_biased_estimate(wrong: str) -> None:
    class Biased(TracedLinear):
        def _trace(self, like: Tensor, s: Tensor) -> Tensor:
            trace = super()._trace(like, s)
            return trace + 0.05 if wrong == "ladj" else trace.detach() + 0 * self.A.sum()

    ladj_is_autograds(randomize(TracedLinear(3)).double())
    with pytest.raises(AssertionError, match=f"mean {wrong}"):
        ladj_is_autograds(randomize(Biased(3)).double())


# Kinds: a chain is as good as its weakest part.


def test_a_chain_is_as_good_as_its_weakest_part() -> None:
    exact, estimate, bound = LULinear(2), TracedLinear(2), Noise(2)
    assert chained([exact, exact]).ladj_kind == "exact"
    assert Chain([exact, estimate]).ladj_kind == Chain([estimate, exact]).inv.ladj_kind
    assert Chain([exact, estimate]).inv.ladj_kind == "estimate"
    assert TracedLinear(2, 1).condition(torch.zeros(1)).ladj_kind == "estimate"
    assert chained([exact, estimate, bound]).ladj_kind == "bound"
    assert chained([Chain([exact, estimate]), Augment(2, 1)]).ladj_kind == "estimate"
    assert chained([exact, Abs(2)]).ladj_kind == "bound"
    assert chained([exact, Abs(2)]).random == "inverse"
    assert chained([Abs(2).inv, Abs(2)]).random == "both"
    assert chained([exact, Abs(2)]).inv.ladj_kind == Augment(2, 1).ladj_kind == "exact"
    assert not chained([exact, Metropolis(LOG_TARGET).inv][1:]).has_rsample
    kinds = [Flow(t).log_prob_kind for t in (exact, estimate, bound)]
    assert kinds == [Flow(t)().log_prob_kind for t in (exact, estimate, bound)]
    assert kinds == ["exact", "estimate", "bound"]
    assert "exact" not in repr(Flow(bound)) and "a bound" in repr(Flow(bound))
    assert "an estimate" in repr(Flow(estimate)) and "log_prob" not in repr(Flow(exact))


def test_parts_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"part 0, Augment, makes .*\(3,\), but part 1.*\(2,\)"):
        StochasticChain([Augment(2, 1), LULinear(2)])
    with pytest.raises(ValueError, match="whole numbers"):
        StochasticChain([LULinear(1), Metropolis(LOG_TARGET)])
    with pytest.raises(ValueError, match="context_dim"):
        StochasticChain([Noise(2, 1), Noise(2, 3)])
    with pytest.raises(ValueError, match="at least one"):
        StochasticChain([])
    with pytest.raises(TypeError, match="StochasticChain"):
        Chain([LULinear(2), Noise(2)])
    with pytest.raises(ValueError, match=r"event_shape"):
        StochasticFlowDistribution(DiagonalNormal(3)(), Noise(2))
    with pytest.raises(ValueError, match="support"):
        Flow(Argmax(3))().log_prob(torch.tensor([3.0]))


# The distribution.


def flow_of(kind: str, context_dim: int = 0) -> Flow:
    torch.manual_seed(0)
    coupling = affine_coupling(2, context_dim, hidden_dims=(8,))
    layer = {"bound": Noise(2, context_dim), "exact": Augment(2, 1, context_dim)}.get(kind)
    parts = [coupling, TracedLinear(2, context_dim) if layer is None else layer]
    return randomize(Flow(chained([*parts, LULinear(3 if kind == "exact" else 2)])), 0.5)


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("kind", ["exact", "estimate", "bound"])
def test_flow_laws(kind: str, context_dim: int) -> None:
    flow = flow_of(kind, context_dim)
    assert flow.log_prob_kind == kind
    check_flow(flow)


def test_draws_know_the_weight_of_their_path() -> None:
    flow = flow_of("bound").double()
    d = flow()
    torch.manual_seed(1)
    y, weight = d.rsample_and_log_prob((5,))
    torch.manual_seed(1)
    same = d.rsample((5,))
    assert torch.equal(same, y)
    assert torch.equal(d.log_prob(same), weight)
    assert torch.equal(d.log_prob(same), weight)  # as often as it is asked for
    assert torch.equal(d.to_event(0).log_prob(same), weight)
    with torch.no_grad():
        assert not d.log_prob(same).requires_grad
        assert torch.equal(d.log_prob(same), weight)
    assert not torch.equal(d.log_prob(same.clone()), weight)
    assert not torch.equal(copy.copy(d).log_prob(same.clone()), weight)
    assert not torch.equal(pickle.loads(pickle.dumps(d)).log_prob(same), weight)
    with torch.no_grad():
        flow.transform.parts[1].share.data += 0.1
    assert not torch.equal(d.log_prob(same), weight)


def test_seeds_repeat_and_sampling_leaves_no_graph() -> None:
    d = flow_of("bound")()
    y = d.sample((3,))
    assert not y.requires_grad
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(d.log_prob(y))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_draws_without_a_gradient_say_so() -> None:
    flow = Flow(StochasticChain([Metropolis(LOG_TARGET)]), Die(5)).double()
    d = flow()
    assert not d.has_rsample
    assert bool(d.support.check(d.sample((20,))).all())
    with torch.no_grad():
        assert d.rsample_and_log_prob((3,))[1].shape == (3,)
    with pytest.raises(NotImplementedError, match="has_rsample = False"):
        d.rsample()

    def guide() -> None:
        pyro.sample("x", flow())

    def model() -> None:
        pyro.sample("x", dist.Categorical(torch.ones(1, 5)).to_event(1))

    with pytest.raises(NotImplementedError, match="has_rsample = False"):
        Trace_ELBO().differentiable_loss(model, guide)


def test_an_elbo_with_a_bound_is_a_lower_bound_and_learns() -> None:
    """z ~ N(0, 1), y ~ N(z, 1/2): log p(y) is known, and the guide's ELBO stays below it."""
    y = torch.tensor(1.3, dtype=F64)
    log_evidence = Normal(0.0, 1.25**0.5).log_prob(y).item()

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z[..., 0], 0.5), obs=y)

    torch.manual_seed(0)
    flow = Flow(StochasticChain([Noise(1), LULinear(1)])).double()

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("z", flow())

    elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=0)
    pyro.clear_param_store()
    before = -elbo.loss(model, guide)
    small = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), small)
    for _ in range(150):
        svi.step()
    after = -elbo.loss(model, guide)
    assert before < log_evidence - 0.3
    assert log_evidence - 0.05 < after < log_evidence + 0.02


def test_saves_and_loads(tmp_path) -> None:
    flow, other = flow_of("exact", 2), flow_of("exact", 2)
    randomize(other, seed=4)
    flow.save(tmp_path / "flow.safetensors")
    loaded = Flow.load(tmp_path / "flow.safetensors", into=other)
    context, y = torch.randn(4, 2), torch.randn(4, 3)
    assert torch.equal(loaded.log_prob(y, context), flow.log_prob(y, context))
    assert loaded.input_dim == 3


def test_batches_of_contexts_and_kinds_of_distribution() -> None:
    d = flow_of("bound", 2)(torch.zeros(4, 2))
    assert isinstance(d, StochasticFlowDistribution)
    assert not isinstance(d, FlowDistribution)
    assert (d.batch_shape, d.event_shape) == ((4,), (2,))
    y, log_prob = d.rsample_and_log_prob((3,))
    assert (y.shape, log_prob.shape) == ((3, 4, 2), (3, 4))
    assert len(set(y.flatten().tolist())) == 24
    assert d.expand((5, 4)).log_prob(y[0]).shape == (5, 4)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_importance_weighted_bounds_keep_contexts_apart(count: int) -> None:
    flow = Flow(randomize(Noise(1, context_dim=1).double()), DiagonalNormal(1).double())
    contexts = torch.tensor([[-1.0], [0.0], [2.0]], dtype=torch.float64)
    value = torch.tensor([0.3], dtype=torch.float64)
    torch.manual_seed(0)
    together = flow(contexts).importance_weighted_log_prob(value, count)
    torch.manual_seed(0)
    apart = flow(contexts).importance_weighted_log_prob(value.expand(3, 1), count)
    torch.testing.assert_close(together, apart)
    assert together.shape == (3,)
