"""The distribution that a flow makes: never stale, never alive too long, one pass a layer."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, nn
from torch.func import vmap

from pyro_nf import AutoFlow, flows, transforms
from pyro_nf.flows.distribution import FlowDistribution
from pyro_nf.flows.flow import Flow
from pyro_nf.nn.masked import MaskedNet
from pyro_nf.nn.mlp import MLP
from pyro_nf.testing import randomize
from pyro_nf.transforms.chain import Chain
from tests.cases import CONTEXT_DIM, RECIPES

F64 = torch.float64
COUPLINGS = ("nice", "realnvp", "glow", "nsf")


def make(recipe: str, input_dim: int = 3, context_dim: int = 0) -> Flow:
    return randomize(RECIPES[recipe](input_dim, context_dim)).double()


# No stale state.


def change_data(flow: Flow) -> None:
    for p in flow.parameters():
        p.data.add_(0.1)


def step_of(make_optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[[Flow], None]:
    def step(flow: Flow) -> None:
        for p in flow.parameters():
            p.grad = torch.ones_like(p)
        make_optimizer(flow.parameters()).step()
        flow.zero_grad()

    return step


CHANGES = {
    "Adam": step_of(lambda p: torch.optim.Adam(p, 0.1)),
    "Adam fused": step_of(lambda p: torch.optim.Adam(p, 0.1, fused=True)),
    "ClippedAdam": step_of(lambda p: ClippedAdam(p, 0.1)),
    ".data": change_data,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("recipe", ["maf", "iaf", "nsf", "planar"])
def test_the_same_tensor_after_a_change_gives_the_new_value(
    recipe: str, change: Callable[[Flow], None]
) -> None:
    flow = make(recipe)
    data = torch.randn(5, 3, dtype=F64)
    d = flow()
    draws = d.rsample((5,))
    of_data, of_draws = flow().log_prob(data), d.log_prob(draws.clone())
    draws = d.rsample((5,))  # its density waits in d
    change(flow)
    fresh = copy.deepcopy(flow)()
    torch.testing.assert_close(d.log_prob(draws), fresh.log_prob(draws.clone()), rtol=0, atol=0)
    torch.testing.assert_close(flow().log_prob(data), fresh.log_prob(data), rtol=0, atol=0)
    assert not torch.equal(fresh.log_prob(data), of_data)
    assert of_draws.shape == (5,)


@pytest.mark.parametrize("recipe", ["maf", "iaf", "realnvp"])
def test_maximum_likelihood_on_one_tensor_needs_no_chores(recipe: str) -> None:
    flow = make(recipe, 2)
    data = 0.5 * torch.randn(200, 2, dtype=F64) + torch.tensor([2.0, -1.0], dtype=F64)
    optimizer = torch.optim.Adam(flow.parameters(), 2e-2, fused=True)
    d = flow()  # made once: it must follow the parameters
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = -d.log_prob(data).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert -flow().log_prob(data).mean().item() < losses[0] - 0.5


def test_a_changed_draw_is_not_the_draw() -> None:
    d = make("realnvp")()
    with torch.no_grad():
        y = d.rsample((4,))
        y.add_(1.0)
        torch.testing.assert_close(d.log_prob(y), d.log_prob(y.clone()), rtol=0, atol=0)


def test_a_value_made_under_no_grad_keeps_no_gradient_away() -> None:
    flow = make("iaf")
    d = flow()
    with torch.no_grad():
        y = d.rsample((4,))
    log_prob = d.log_prob(y)
    assert log_prob.requires_grad
    log_prob.sum().backward()
    assert any(bool((p.grad != 0).any()) for p in flow.parameters())
    y = d.rsample((4,))
    with torch.no_grad():
        assert not d.log_prob(y).requires_grad


def test_backward_twice() -> None:
    flow = make("iaf")
    d = flow()
    y = d.rsample((4,))
    d.log_prob(y).sum().backward()
    d.log_prob(y.detach()).sum().backward()
    y = d.rsample((4,))
    y.square().sum().backward()  # frees the graph that the waiting density shares
    with pytest.raises(RuntimeError, match="second time"):
        d.log_prob(y).sum().backward()  # torch's own rule: y's graph is gone
    d.log_prob(y.detach()).sum().backward()


def test_the_density_of_the_last_draw_is_handed_out_once() -> None:
    d = make("realnvp")()
    with passes(d.transform) as counts:
        y = d.rsample((4,))
        first = d.log_prob(y)
        assert set(counts.values()) == {1}
        second = d.log_prob(y)
        assert set(counts.values()) == {2}
    torch.testing.assert_close(first, second)


def test_the_density_of_an_earlier_draw_is_its_own() -> None:
    d = make("iaf")()
    y, z = d.rsample((4,)), d.rsample((4,))
    torch.testing.assert_close(d.log_prob(y), d.log_prob(y.clone()))
    torch.testing.assert_close(d.log_prob(z), d.log_prob(z.clone()))


# Nothing stays alive.


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Only reference counts may free: a cycle keeps tensors alive for long."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_stays_alive(recipe: str) -> None:
    flow = make(recipe)
    d = flow()
    y = d.rsample((4,))
    log_prob = d.log_prob(y)
    z = d.rsample((4,))
    dead = [weakref.ref(t) for t in (d, y, log_prob, z, d._last) if t is not None]
    del d, y, log_prob, z
    assert [ref() for ref in dead] == [None] * len(dead)


@pytest.mark.usefixtures("no_gc")
def test_a_distribution_keeps_no_draw_alive() -> None:
    d = make("nsf")()
    y = d.rsample((4,))
    alive = weakref.ref(y)
    del y
    assert alive() is None


# Copies.


def test_copies_before_and_after_a_call() -> None:
    flow = make("nsf")
    data = torch.randn(4, 3, dtype=F64)
    d = flow()
    for _ in range(2):
        wanted = d.log_prob(data).detach()
        for copied in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
            assert isinstance(copied, FlowDistribution)
            assert copied._last is None
            torch.testing.assert_close(copied.log_prob(data).detach(), wanted, rtol=0, atol=0)
        blank = make("nsf")
        blank.load_state_dict(flow.state_dict())
        torch.testing.assert_close(blank().log_prob(data).detach(), wanted, rtol=0, atol=0)
        d.rsample((4,))  # a density waits now, whose graph no copy could take along


# Shapes, as Pyro and its plates ask for them.


@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM])
def test_expand_mask_to_event(context_dim: int) -> None:
    flow = make("realnvp", 3, context_dim)
    context = torch.randn(4, context_dim, dtype=F64)
    d = (flow(context) if context_dim else flow()).expand((2, 4))
    assert (d.batch_shape, d.event_shape) == ((2, 4), (3,))
    y = d.sample((5,))
    assert y.shape == (5, 2, 4, 3)
    log_prob = d.log_prob(y)
    assert log_prob.shape == (5, 2, 4)
    events = d.to_event(1)
    assert (events.batch_shape, events.event_shape) == ((2,), (4, 3))
    torch.testing.assert_close(events.log_prob(y), log_prob.sum(-1))
    keep = torch.tensor([True, False, True, True])
    torch.testing.assert_close(d.mask(keep).log_prob(y), log_prob * keep)
    assert d.mask(False).log_prob(y).abs().max() == 0
    assert y.std((0, 1)).min() > 0.01  # noise of its own everywhere


def test_in_plates() -> None:
    flow = make("maf")

    def model() -> Tensor:
        with pyro.plate("a", 4), pyro.plate("b", 2):
            return pyro.sample("z", flow())

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].shape == (2, 4, 3)
    assert trace.nodes["z"]["log_prob"].shape == (2, 4)


# One pass of the network a layer.


@contextmanager
def passes(module: nn.Module) -> Iterator[dict[str, int]]:
    """Counts the passes of every conditioner, and of the inner blocks of an incremental inverse."""
    counts: dict[str, int] = {}
    handles = []
    for name, net in module.named_modules():
        if isinstance(net, MLP | MaskedNet):
            counts[name] = 0

            def hook(*_: object, name: str = name) -> None:
                counts[name] += 1

            handles.append(net.register_forward_hook(hook))
    assert counts
    yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("recipe", [*COUPLINGS, "iaf"])
def test_an_elbo_step_is_one_pass_a_layer(recipe: str) -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    guide = AutoFlow(model, lambda d: RECIPES[recipe](d, 0)).setup()
    for elbo in (Trace_ELBO(), Trace_ELBO(num_particles=5, vectorize_particles=True)):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        svi.step()  # the first one looks for the plates too
        with passes(guide) as counts:
            svi.step()
        assert set(counts.values()) == {1}, counts


@pytest.mark.parametrize("recipe", [*COUPLINGS, "maf", "nsf-autoregressive"])
@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM])
def test_a_density_is_one_pass_a_layer(recipe: str, context_dim: int) -> None:
    flow = make(recipe, 3, context_dim)
    context = (torch.randn(CONTEXT_DIM, dtype=F64),) if context_dim else ()
    with passes(flow) as counts:
        flow(*context).log_prob(torch.randn(7, 3, dtype=F64)).sum().backward()
    assert set(counts.values()) == {1}, counts


@pytest.mark.parametrize("recipe", [*COUPLINGS, "iaf"])
def test_a_draw_with_its_density_is_one_pass_a_layer(recipe: str) -> None:
    d = make(recipe)()
    for draw in (lambda: d.log_prob(d.rsample((7,))), lambda: d.rsample_and_log_prob((7,))):
        with passes(d.transform) as counts:
            draw()
        assert set(counts.values()) == {1}, counts


# Inside torch.func and torch.compile.


@pytest.mark.parametrize("recipe", [*COUPLINGS, "iaf"])
def test_draws_under_vmap(recipe: str) -> None:
    flow = make(recipe, 3, CONTEXT_DIM)
    contexts = torch.randn(6, CONTEXT_DIM, dtype=F64)

    def draw(context: Tensor) -> tuple[Tensor, Tensor]:
        d = flow(context)
        y = d.rsample((4,))
        return y, d.log_prob(y)

    y, log_prob = vmap(draw, randomness="different")(contexts)
    assert y.shape == (6, 4, 3)
    torch.testing.assert_close(log_prob, flow(contexts[:, None]).log_prob(y), atol=1e-8, rtol=0)
    assert y.flatten(0, 1).unique(dim=0).shape == (24, 3)
    same, _ = vmap(lambda _: draw(contexts[0]), randomness="same")(contexts)
    torch.testing.assert_close(same[0], same[5], rtol=0, atol=0)


def test_an_ensemble_under_vmap() -> None:
    members = [make("realnvp"), randomize(make("realnvp"), seed=5)]
    state = torch.func.stack_module_state(members)
    y = torch.randn(4, 3, dtype=F64)

    class Density(nn.Module):
        def __init__(self, flow: Flow) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
            d = self.flow()
            draws = d.rsample((4,))
            return d.log_prob(y), d.log_prob(draws)

    parameters, buffers = ({f"flow.{k}": v for k, v in part.items()} for part in state)
    blank = Density(make("realnvp"))

    def density(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(blank, (parameters, buffers), (y,))

    got, of_draws = vmap(density, randomness="different")(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([m().log_prob(y) for m in members]))
    assert of_draws.shape == (2, 4)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM], ids=["plain", "conditional"])
@pytest.mark.parametrize("recipe", [*COUPLINGS, "gaussian", "iaf"])
def test_compiled_draws(recipe: str, context_dim: int) -> None:
    flow = make(recipe, 3, context_dim)
    context = (torch.randn(2, CONTEXT_DIM, dtype=F64),) if context_dim else ()

    def draw(*context: Tensor) -> Tensor:
        return flow(*context).rsample((5,))

    y = compiled(draw)(*context)
    assert y.shape == ((5, 2, 3) if context_dim else (5, 3))
    assert y.dtype == F64
    assert y.flatten(0, -2).unique(dim=0).shape[0] == y.numel() // 3
    y.sum().backward()
    assert all(p.grad is not None for p in flow.transform.parameters())


@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM], ids=["plain", "conditional"])
@pytest.mark.parametrize("recipe", [*COUPLINGS, "gaussian", "maf", "nsf-autoregressive"])
def test_compiled_densities(recipe: str, context_dim: int) -> None:
    flow = make(recipe, 3, context_dim)
    context = (torch.randn(2, CONTEXT_DIM, dtype=F64),) if context_dim else ()
    y = torch.randn(5, 1, 3, dtype=F64)

    def log_prob(y: Tensor, *context: Tensor) -> Tensor:
        return flow(*context).log_prob(y)

    torch.testing.assert_close(compiled(log_prob)(y, *context), log_prob(y, *context))


# Messages.


def test_bad_values() -> None:
    d = flows.realnvp(3)()
    with pytest.raises(ValueError, match="input_dim is 3"):
        d.log_prob(torch.zeros(2))
    with pytest.raises(TypeError, match="int64"):
        d.log_prob(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="context is missing"):
        flows.realnvp(3, 2)()
    with pytest.raises(ValueError, match="takes none"):
        flows.realnvp(3)(torch.zeros(2))
    with pytest.raises(ValueError, match="context_dim = 2"):
        flows.realnvp(3, 2)(torch.zeros(3))
    bounded = Flow(Chain([transforms.LULinear(2), transforms.Sigmoid()]))
    with pytest.raises(ValueError, match="support"):
        bounded().log_prob(torch.tensor([0.5, 1.5]))
