"""The affine map's gradient by hand against autograd's, and where it must not be taken."""

import pytest
import torch
from torch.nn import functional as F

from pyro_nf.univariate import affine
from pyro_nf.univariate.affine import Affine

BOUND = 1.5
DIRECTIONS = {
    "forward": lambda x, t, s: (t + x * s.exp(), s),
    "inverse": lambda y, t, s: ((y - t) * (-s).exp(), -s),
}


def direction_of(name):
    return getattr(Affine(BOUND), f"{name}_and_ladj")


def formula(name, value, params):
    t, a = params.unbind(-1)
    return DIRECTIONS[name](value, t, F.hardtanh(a, -BOUND, BOUND))


def values(layout):
    value = torch.randn(9, 4, dtype=torch.double)
    params = 2 * torch.randn(9, 4, 2, dtype=torch.double)
    if layout == "features first":
        value, params = (
            value.T.contiguous().T,
            params.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        )
    if layout == "expanded":
        params = params[:1].expand(9, 4, 2)
    assert (params[..., 1].abs() > BOUND).any()
    return value.requires_grad_(), params.requires_grad_()


@pytest.mark.parametrize("layout", ["rows first", "features first", "expanded"])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_gradient_by_hand_is_autograds(name, layout):
    inputs = values(layout)
    results = []
    for compute in (direction_of(name), lambda *args: formula(name, *args)):
        outputs = compute(*inputs)
        weighting = [torch.sin(t.detach()) for t in outputs]
        result = list(outputs)
        for used in (slice(0, 1), slice(1, 2), slice(0, 2)):  # the image alone, the ladj alone
            result += torch.autograd.grad(
                outputs[used],
                inputs,
                weighting[used],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        loss = sum(t.square().sum() for t in outputs)
        curved = torch.autograd.grad(loss, inputs, create_graph=True)
        result += curved
        result += torch.autograd.grad(sum(g.square().sum() for g in curved), inputs)
        many = [torch.stack((w, 2 * w)) for w in weighting]
        result += torch.autograd.grad(compute(*inputs), inputs, many, is_grads_batched=True)
        results.append(result)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_nothing_is_kept_but_value_and_ladj(name):
    value, params = values("rows first")
    outputs = direction_of(name)(value, params)
    kept = {t.data_ptr() for t in outputs[0].grad_fn.saved_tensors}
    assert kept == {(value if name == "forward" else outputs[0]).data_ptr(), outputs[1].data_ptr()}


# torch's own forward-mode derivatives script something when they are first used.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_formula_alone_under_torch_func(name, monkeypatch):
    value, params = (t.detach() for t in values("rows first"))
    expected = [torch.vmap(direction_of(name))(value, params), direction_of(name)(value, params)]
    torch.testing.assert_close(*expected)
    monkeypatch.setattr(affine, "_Forward", None)
    monkeypatch.setattr(affine, "_Inverse", None)
    torch.func.vmap(torch.func.jacrev(direction_of(name), (0, 1)))(value, params)
    torch.func.jvp(direction_of(name), (value, params), (value, params))
