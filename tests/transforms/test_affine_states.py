"""Older states of the affine part, whose triangle was that of L itself, give what they gave."""

import pytest
import torch

from pyro_nf.flows.flow import Flow
from pyro_nf.testing import randomize
from pyro_nf.transforms.affine import FixedAffine, LowerAffine, with_unit_triangles
from pyro_nf.transforms.chain import Chain
from tests.cases import as_older

F64 = torch.float64


def older_state() -> dict[str, torch.Tensor]:
    return {
        "loc": torch.randn(4, dtype=F64),
        "log_diagonal": torch.randn(4, dtype=F64),
        "triangle": torch.randn(4, 4, dtype=F64),
    }


def distribution(state: dict[str, torch.Tensor]) -> torch.distributions.MultivariateNormal:
    L = state["triangle"].tril(-1) + state["log_diagonal"].exp().diag()
    return torch.distributions.MultivariateNormal(state["loc"], scale_tril=L)


@pytest.mark.parametrize("prefix", ["", "parts.0."])
def test_19_an_older_state_gives_the_same_distribution(prefix: str) -> None:
    state = older_state()
    affine = LowerAffine(4).double()
    module = Chain([affine, FixedAffine(torch.zeros(4), torch.ones(4))]) if prefix else affine
    tensors = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    if prefix:
        tensors |= {"parts.1.loc": torch.zeros(4), "parts.1.scale": torch.ones(4)}
    module.load_state_dict(tensors)
    y = torch.randn(10, 4, dtype=F64)
    expected = distribution(state).log_prob(y)
    torch.testing.assert_close(Flow(affine).double()().log_prob(y), expected, rtol=1e-12, atol=0)
    assert f"{prefix}triangle" in tensors  # what was given is left alone


def test_19_a_state_of_now_stays_as_it_is() -> None:
    state = randomize(LowerAffine(4)).state_dict()
    renamed = with_unit_triangles(state)
    assert renamed.keys() == state.keys()
    assert all(torch.equal(renamed[name], state[name]) for name in state)


def test_19_an_older_file_gives_the_same_flow(tmp_path, monkeypatch) -> None:
    flow = randomize(Flow(LowerAffine(4))).double()
    y = torch.randn(10, 4, dtype=F64)
    expected = flow().log_prob(y)
    older = as_older(flow.state_dict())
    monkeypatch.setattr(flow, "state_dict", lambda: older)
    flow.save(tmp_path / "flow")
    loaded = Flow.load(tmp_path / "flow", into=Flow(LowerAffine(4)).double())
    torch.testing.assert_close(loaded().log_prob(y), expected, rtol=1e-12, atol=0)
