"""One rule for dtypes: what differs from the flow is refused in words, never converted."""

import pytest
import torch

from pyro_nf import flows, transforms
from pyro_nf.flows.base import DiagonalNormal
from pyro_nf.flows.flow import Flow
from pyro_nf.testing import randomize
from pyro_nf.transforms.base import FlowTransform
from tests.cases import CONTEXT_DIM, RECIPES, TRANSFORM_ROWS, Row

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IN_WORDS = r"has dtype torch\.\w+, wanted torch\.\w+, the dtype of its parameters"


@pytest.mark.parametrize("own", [torch.float32, torch.float64])
@pytest.mark.parametrize("recipe", RECIPES)
def test_11_rows_and_contexts_of_another_dtype(recipe: str, own: torch.dtype) -> None:
    plain, flow = (randomize(RECIPES[recipe](2, c)).to(own) for c in (0, CONTEXT_DIM))
    y, context = torch.zeros(3, 2), torch.zeros(3, CONTEXT_DIM)
    assert plain.log_prob(y.to(own)).dtype == plain.sample(3).dtype == own
    for dtype in DTYPES:
        if dtype == own:
            continue
        for call in (
            lambda dtype=dtype: plain().log_prob(y.to(dtype)),
            lambda dtype=dtype: plain.log_prob(y.to(dtype)),
            lambda dtype=dtype: flow.log_prob(y.to(dtype), context.to(own)),
            lambda dtype=dtype: flow.log_prob(y.to(own), context.to(dtype)),
            lambda dtype=dtype: flow(context.to(dtype)),
            lambda dtype=dtype: flow.transform.forward_and_ladj(y.to(own), context.to(dtype)),
            lambda dtype=dtype: flow.transform.condition(context.to(dtype)),
        ):
            with pytest.raises(TypeError, match=IN_WORDS):
                call()


@pytest.mark.parametrize("row", TRANSFORM_ROWS, ids=str)
def test_11_a_transform_with_numbers_takes_its_dtype_alone(row: Row) -> None:
    transform = row.make()
    assert isinstance(transform, FlowTransform)
    transform = randomize(transform).float()
    tensors = [*transform.parameters(), *transform.buffers()]
    has_dtype = any(t.is_floating_point() for t in tensors)
    event_shape = transform.event_shape or (4,) * transform.domain.event_dim
    x = torch.full((2, *event_shape), 0.5)
    context = torch.zeros(transform.context_dim) if transform.context_dim else None
    y = transform.forward_and_ladj(x, context)[0].detach()
    for call, value in ((transform.forward_and_ladj, x), (transform.inverse_and_ladj, y)):
        if has_dtype:
            with pytest.raises(TypeError, match=IN_WORDS):
                call(value.double(), context)
        else:
            assert {t.dtype for t in call(value.double(), context)} == {torch.float64}
    if has_dtype:
        with pytest.raises(TypeError, match=IN_WORDS):
            transform.push_score(x, x.double(), context)


def test_11_a_base_has_a_dtype_too() -> None:
    flow = Flow(transforms.Softsign(), DiagonalNormal(2))
    with pytest.raises(TypeError, match=IN_WORDS):
        flow.log_prob(torch.zeros(2, dtype=torch.float64))
    assert flow.double().log_prob(torch.zeros(2, dtype=torch.float64)).dtype == torch.float64


def test_11_autocast_mixes_as_it_was_asked_to() -> None:
    flow = flows.realnvp(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        flow.log_prob(torch.zeros(4, 2), torch.zeros(4, 3, dtype=torch.bfloat16))


def test_25_short_forms() -> None:
    flow = randomize(flows.nsf(2, 3))
    context, x = torch.randn(4, 3), torch.randn(5, 4, 2)
    torch.testing.assert_close(flow.log_prob(x, context), flow(context).log_prob(x))
    for shape, wanted in ((7, (7, 4, 2)), ((), (4, 2)), ((2, 3), (2, 3, 4, 2)), (0, (0, 4, 2))):
        torch.manual_seed(0)
        got = flow.sample(shape, context)
        assert got.shape == wanted
        assert not got.requires_grad
        torch.manual_seed(0)
        shape = (shape,) if isinstance(shape, int) else shape
        assert torch.equal(got, flow(context).sample(shape))
    for bad in (-1, (2, -1), 1.5, ("a",), True):
        with pytest.raises((ValueError, TypeError), match="sample_shape"):
            flow.sample(bad, context)
    with pytest.raises(ValueError, match="context is missing"):
        flow.sample(3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_25_a_flow_is_printed_in_few_lines(recipe: str) -> None:
    flow = RECIPES[recipe](3, CONTEXT_DIM)
    text = repr(flow)
    assert text.startswith(f"Flow({flow.recipe[0]}, input_dim=3, context_dim={CONTEXT_DIM}, ")
    assert f"{sum(p.numel() for p in flow.parameters()):,} parameters" in text
    assert 3 <= len(text.splitlines()) <= 16
    assert all(type(part).__name__ in text for part in getattr(flow.transform, "parts", []))
    deep = flows.realnvp(3, count_layers=100)
    assert len(repr(deep).splitlines()) < 20
    assert "more ..." in repr(deep)


def test_23_a_draw_is_remembered_where_its_density_comes_for_nothing() -> None:
    for recipe, remembered in (("maf", False), ("iaf", True), ("realnvp", True), ("planar", True)):
        d = RECIPES[recipe](3, 0)()
        d.rsample((2,))
        assert (d._last is not None) == remembered, recipe
    large = flows.realnvp(16, hidden_dims=(512, 512))
    assert sum(p.numel() for p in large.parameters()) > 1_000_000
    for rows, remembered in ((1, False), (15, False), (16, True)):
        d = large()
        y = d.rsample((rows,))
        assert (d._last is not None) == remembered
        torch.testing.assert_close(d.log_prob(y), d.log_prob(y.clone()), atol=1e-4, rtol=1e-4)
