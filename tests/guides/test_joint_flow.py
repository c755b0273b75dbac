"""The parts of a guide's flow by name, and what version 0.1 saved under numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_nf import AutoFlow, Flow, fit_svi, flows, infer, transforms, univariate
from pyro_nf._storage import load_tensors, save_tensors
from pyro_nf.guides.joint_flow import modules_of_old, with_part_names
from pyro_nf.search.start import GaussianStart
from pyro_nf.testing import randomize
from pyro_nf.train.saved.checkpoint import KIND
from pyro_nf.train.saved.digest import digest
from tests.cases import numbered

F64 = torch.float64
PARTS = ("flow", "affine", "coordinates", "recentring")


def plain() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))


def hierarchy() -> None:
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 3.0))
    log_tau = pyro.sample("log_tau", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", dist.Normal(mu, log_tau.exp()))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor([1.0, 2.0, -1.0]))


def small(dim: int) -> Flow:
    return flows.iaf(dim, count_layers=1, hidden_dims=(4,))


def started(guide: AutoFlow) -> AutoFlow:
    """Where a fit might begin: nothing has to be searched."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()  # or the guide takes what another one of its name has left there
    guide.setup()
    generator = torch.Generator().manual_seed(0)
    h, b = torch.rand(2, 5, generator=generator)
    recentring = infer.Recentre(guide.log_joint(), h, b)
    guide.start_at(GaussianStart(0.1 + torch.zeros(5), torch.eye(5), elbo=-10.0), recentring)
    return guide


@pytest.fixture(scope="module")
def fitted() -> AutoFlow:
    """With a recentring and all layers, and not at the start of anything."""
    guide = started(AutoFlow(hierarchy))
    randomize(guide.flow, 0.2)
    return guide


Z = torch.linspace(-1, 1, 15).reshape(3, 5)


# ---- names


def test_the_parts_have_names(fitted: AutoFlow) -> None:
    parts = dict(fitted.flow.transform.named_children())
    assert tuple(parts) == PARTS
    assert parts["coordinates"] is fitted.coordinates
    assert parts["recentring"] is fitted.recentring
    assert fitted.flow.transform.parts == list(parts.values())
    for name in fitted.state_dict():
        assert name.startswith(("flow.base.", *(f"flow.transform.{part}." for part in PARTS)))


def test_it_is_the_formula() -> None:
    """z = m_0 + L_0 (m + L f(eps)), part by part and by its density."""
    guide = AutoFlow(plain, transforms.LowerAffine).setup()
    guide.start_at(GaussianStart(torch.tensor([3.0, -1.0], dtype=F64), torch.eye(2).double(), 0.0))
    randomize(guide.flow, 0.5)
    own, eps = guide.flow.transform, torch.randn(4, 2, dtype=F64)
    (f, m, c) = (own.flow, own.affine, own.coordinates)
    z = c.loc + (m.loc + (f.loc + eps @ f.scale_tril.mT) @ m.scale_tril.mT) @ c.scale.mT
    torch.testing.assert_close(own(eps), z, rtol=1e-12, atol=1e-12)
    L = c.scale @ m.scale_tril @ f.scale_tril
    loc = c.loc + c.scale @ (m.loc + m.scale_tril @ f.loc)
    wanted = dist.MultivariateNormal(loc, scale_tril=L).log_prob(z)
    torch.testing.assert_close(guide.flow().log_prob(z), wanted, rtol=1e-10, atol=1e-10)
    affine = dist.MultivariateNormal(
        c.loc + c.scale @ m.loc, scale_tril=c.scale @ m.scale_tril
    ).log_prob(z)
    torch.testing.assert_close(guide.flow.affine_flow()().log_prob(z), affine)


def test_exchanged_parts_share_the_rest(fitted: AutoFlow) -> None:
    plain_flow = fitted.recentred_flow
    assert plain_flow.transform.recentring is None
    kept = dict(fitted.flow.named_parameters())
    assert all(p is kept[name] for name, p in plain_flow.named_parameters())
    assert len(kept) == len(list(plain_flow.parameters()))
    x = torch.randn(3, 5)
    v, ladj = plain_flow.transform.forward_and_ladj(x)
    z, last = fitted.recentring.forward_and_ladj(v)
    torch.testing.assert_close(fitted.flow.transform.forward_and_ladj(x), (z, ladj + last))


# ---- version 0.1


def test_only_the_guides_own_parts_are_renamed() -> None:
    names = {
        "flow.transform.parts.0.transform.parts.1.loc": "flow.transform.flow.transform.parts.1.loc",
        "flow.transform.parts.3.shift": "flow.transform.recentring.shift",
        "flow.transform.flow.transform.parts.2.loc": "flow.transform.flow.transform.parts.2.loc",
        "other.transform.parts.0.loc": "other.transform.parts.0.loc",
        "flow.base.loc": "flow.base.loc",
    }
    renamed = with_part_names({old: old for old in names}, "flow.")
    assert {old: new for new, old in renamed.items()} == names


def test_a_state_of_0_1_by_its_written_names() -> None:
    """z = 1 + 2 (0.5 + e^0.1 (-1 + e^-0.3 eps)), the numbers in the tensors of then."""
    one, none = torch.ones(2, dtype=F64), torch.zeros(2, 2, dtype=F64)
    state = {
        "flow.base.loc": 0 * one,
        "flow.base.scale": one,
        "flow.transform.parts.0.loc": -one,
        "flow.transform.parts.0.log_diagonal": -0.3 * one,
        "flow.transform.parts.0.unit_triangle": none,
        "flow.transform.parts.1.loc": 0.5 * one,
        "flow.transform.parts.1.log_diagonal": 0.1 * one,
        "flow.transform.parts.1.unit_triangle": none,
        "flow.transform.parts.2.loc": one,
        "flow.transform.parts.2.scale": 2 * torch.eye(2, dtype=F64),
    }
    guide = AutoFlow(plain, transforms.LowerAffine).setup()
    guide.load_state_dict(state)
    scale = 2 * torch.tensor(0.1 - 0.3, dtype=F64).exp()
    loc = 1 + 2 * (0.5 - torch.tensor(0.1, dtype=F64).exp())
    z = torch.randn(4, 2, dtype=F64)
    wanted = dist.Normal(loc, scale).expand([2]).to_event(1).log_prob(z)
    torch.testing.assert_close(guide.flow().log_prob(z), wanted, rtol=1e-12, atol=1e-12)
    other = AutoFlow(plain, transforms.LowerAffine).setup()
    of_flow = {name.removeprefix("flow."): tensor for name, tensor in state.items()}
    other.flow.load_state_dict(of_flow)
    assert torch.equal(other.flow().log_prob(z), guide.flow().log_prob(z))


def test_a_state_of_0_1_brings_layers_and_recentring(fitted: AutoFlow) -> None:
    older = numbered(fitted.state_dict(), "flow.")
    assert "flow.transform.parts.0.parts.2.net.layers.0.weight" in older
    assert "flow.transform.parts.3.precision" in older
    fresh = AutoFlow(hierarchy).setup()
    assert fresh.recentring is None
    fresh.load_state_dict(older)
    assert torch.equal(fresh.flow().log_prob(Z), fitted.flow().log_prob(Z))


def test_a_param_store_of_0_1(fitted: AutoFlow, tmp_path: Path) -> None:
    fitted.register()
    store = pyro.get_param_store()
    older = numbered({name: store[name].detach() for name in store}, "AutoFlow.flow$$$")
    assert "AutoFlow.flow$$$transform.parts.2.scale" in older
    pyro.clear_param_store()
    for name, tensor in older.items():
        store[name] = tensor
    store.save(str(tmp_path / "store"))
    pyro.clear_param_store()
    store.load(str(tmp_path / "store"))
    fresh = AutoFlow(hierarchy).setup()
    assert torch.equal(fresh.flow().log_prob(Z), fitted.flow().log_prob(Z))
    assert not any("parts.2.scale" in name for name in store)
    fresh()
    assert torch.equal(fresh.flow().log_prob(Z), fitted.flow().log_prob(Z))


def three() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))


@pytest.mark.parametrize("way", ["store", "state_dict"])
def test_light_layers_of_0_1_are_the_same_map(way: str) -> None:
    """Their shift had the gain 32 and their scale 4, in any dimension."""
    pyro.clear_param_store()
    guide = randomize(AutoFlow(three).setup(), 0.1)
    value = guide.flow.transform.flow.parts[1].net.value.detach()
    older = numbered(guide.state_dict(), "flow.")
    far = transforms.Elementwise(univariate.SmoothAffine(shift_gain=32.0, scale_gain=4.0), 3)
    own = guide.flow.transform
    then = transforms.Chain([own.flow.parts[0], far.double(), own.affine, own.coordinates])
    with torch.no_grad():
        far.net.value.copy_(value)
    z = torch.randn(5, 3, dtype=F64)
    wanted = Flow(then, guide.flow.base)().log_prob(z)
    assert not torch.allclose(guide.flow().log_prob(z), wanted)
    pyro.clear_param_store()
    if way == "store":
        store = pyro.get_param_store()
        for name, tensor in older.items():
            if not name.startswith("flow.base."):
                store[f"AutoFlow.flow$$${name.removeprefix('flow.')}"] = tensor.detach().clone()
    fresh = AutoFlow(three).setup()
    if way == "state_dict":
        fresh.load_state_dict(older)
    torch.testing.assert_close(fresh.flow().log_prob(z), wanted, rtol=1e-10, atol=1e-10)
    fresh.register()
    again = AutoFlow(three).setup()  # what is in the store now is of now
    torch.testing.assert_close(again.flow().log_prob(z), fresh.flow().log_prob(z))


def test_a_saved_flow_of_0_1(fitted: AutoFlow, tmp_path: Path) -> None:
    path = tmp_path / "flow"
    fitted.flow.save(path)
    tensors, header = load_tensors(path, "flow")
    save_tensors(path, "flow", numbered(tensors), header)
    other = AutoFlow(hierarchy).setup()
    other.load_state_dict(fitted.state_dict())
    randomize(other.flow, 0.3)
    assert Flow.load(path, into=other.flow) is other.flow
    assert torch.equal(other.flow().log_prob(Z), fitted.flow().log_prob(Z))


def as_0_1(path: Path, flow: infer.AutoFlow) -> None:
    """Turns a checkpoint into one that version 0.1 wrote."""
    tensors, header = load_tensors(path, KIND)
    for part in ("module/", "best/", "average/"):
        tensors = numbered(tensors, part)
    assert "module/transform.parts.2.loc" in tensors
    marks = header["settings"]
    modules = dict(modules_of_old(flow))
    assert modules["transform.parts.1"] == "LowerAffine" and modules["transform"] == "Chain"
    marks["network"] = digest([f"{name}: {kind}" for name, kind in modules.items()])
    marks["objective"] = "ELBO 0123456789abcdef"  # of another path of its file
    save_tensors(path, KIND, tensors, header)


@pytest.mark.parametrize("make", [small, None], ids=["own flow", "automatic"])
def test_a_checkpoint_of_0_1_goes_on_as_if_nothing_were(make, tmp_path: Path) -> None:
    calls, last = 0, 10**9

    def model() -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        hierarchy()

    def fresh() -> AutoFlow:
        return AutoFlow(model, make or "auto")

    def fit(guide: AutoFlow, **options: Any) -> infer.SVIFit:
        return fit_svi(model, guide, max_steps=70, num_particles=4, progress=False, **options)

    guide = started(fresh())
    calls = 0
    whole = fit(guide)
    total, path, other = calls, tmp_path / "fit", started(fresh())
    calls, last = 0, total - 10
    stopped = fit(other, checkpoint=path, checkpoint_every=50)
    assert 50 < stopped.history.steps < 70
    last = 10**9
    as_0_1(path, stopped.guide.flow)
    resumed = fit(fresh(), checkpoint=path)
    assert resumed.history.losses == whole.history.losses
    state: dict[str, Tensor] = resumed.guide.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in whole.guide.state_dict().items())
    as_0_1(path, stopped.guide.flow)
    with pytest.raises(ValueError, match="objective was ELBO 0123"):
        fit(fresh(), checkpoint=path, objective=infer.TemperedELBO(10))
