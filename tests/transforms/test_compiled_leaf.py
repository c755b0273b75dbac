"""The compiled leaf against the leaf of torch calls, and where it must not be used."""

import pytest
import torch
from torch import nn

from pyro_nf.transforms import autoregressive, compiled_leaf
from pyro_nf.transforms.autoregressive import Autoregressive
from pyro_nf.univariate.affine import Affine
from pyro_nf.univariate.spline import RationalQuadratic

pytest.importorskip("numba", reason="the extra `fast` is not installed")


def random_transform(input_dim, hidden_dims=(24, 16), univariate=None, std=0.3, **options):
    transform = Autoregressive(
        univariate or Affine(max_log_scale=1.0), input_dim, hidden_dims=hidden_dims, **options
    )
    scale = std / (1 + input_dim / 8)
    for parameter in transform.parameters():
        nn.init.normal_(parameter, std=scale)
    return transform.double()


def slow_direction(transform, v, context=None):
    if transform.fast == "inverse":
        return transform.forward_and_ladj(v, context)
    return transform.inverse_and_ladj(v, context)


@pytest.fixture
def calls(monkeypatch):
    """The leaves that were compiled and computed, as (first, last)."""
    found = []
    kept = compiled_leaf._leaf

    def leaf(*args):
        found.append(args[-2:])
        kept(*args)

    monkeypatch.setattr(compiled_leaf, "_leaf", leaf)
    return found


@pytest.fixture
def by_torch(monkeypatch):
    """Runs the slow direction as it is without numba."""

    def run(transform, *inputs):
        with monkeypatch.context() as without:
            without.setattr(autoregressive, "compiled_leaf", lambda *args: None)
            return slow_direction(transform, *inputs)

    return run


@pytest.mark.parametrize("fast", ["inverse", "forward"])
@pytest.mark.parametrize("hidden_dims", [(), (3,), (24, 16), (40, 40, 40)])
@pytest.mark.parametrize("input_dim", [1, 2, 5, 33, 150])
def test_equals_the_leaf_of_torch(input_dim, hidden_dims, fast, calls, by_torch):
    for std in (0.3, 5.0):  # with the second log-scales reach their bound
        for context_dim in (0, 3):
            transform = random_transform(
                input_dim, hidden_dims, std=std, fast=fast, context_dim=context_dim
            )
            v = torch.randn(4, 2, input_dim).double()
            context = torch.randn(2, 3).double() if context_dim else None
            with torch.no_grad():
                expected = by_torch(transform, v, context)
                assert not calls
                found = slow_direction(transform, v, context)
            assert calls
            calls.clear()
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch_shape", [(), (0,), (1,), (7,), (1025,), (30, 100)])
def test_batches(batch_shape, threads, calls, by_torch, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    transform, v = random_transform(6), torch.randn(*batch_shape, 6).double()
    before = v.clone()
    with torch.no_grad():
        found = slow_direction(transform, v)
        expected = by_torch(transform, v)
    assert calls == [(0, 6)] and torch.equal(v, before)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and not a.is_inference()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_single_precision(calls):
    transform = random_transform(64, (128, 128)).float()
    v = torch.randn(500, 64)
    with torch.no_grad():
        y, ladj = slow_direction(transform, v)
        back, ladj_back = transform.inverse_and_ladj(y)
    assert len(calls) == 2 and y.dtype == torch.float
    torch.testing.assert_close(back, v, rtol=0, atol=2e-5)
    torch.testing.assert_close(ladj_back, -ladj, rtol=0, atol=2e-5)


def test_gradients(calls, by_torch):
    transform, v = random_transform(9), torch.randn(5, 9).double().requires_grad_()
    inputs = (v, *transform.parameters())
    expected, found = (
        torch.autograd.grad(y.square().sum() + ladj.sum(), inputs)
        for y, ladj in (by_torch(transform, v), slow_direction(transform, v))
    )
    assert calls
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rows_stay_bad_and_alone(bad):
    transform, v = random_transform(20), torch.randn(50, 20).double()
    with torch.no_grad():
        expected, _ = slow_direction(transform, v)
        v[3, 7] = bad
        found, _ = slow_direction(transform, v)
    assert not found[3, 7].isfinite()
    assert found[3, 8:].isnan().all() or bad == float("inf")
    assert torch.equal(found[:, :7], expected[:, :7])
    keep = torch.arange(50) != 3
    assert torch.equal(found[keep], expected[keep])


class Doubled(Affine):
    """An affine map, but another."""

    def forward_and_ladj(self, x, params):
        return super().forward_and_ladj(x, 2 * params)

    def inverse_and_ladj(self, y, params):
        return super().inverse_and_ladj(y, 2 * params)


@pytest.mark.parametrize(
    "options",
    [
        {"univariate": RationalQuadratic(5, 1.5)},
        {"univariate": Doubled()},
        {"activation": nn.SiLU},
        {"hidden_dims": (16, 16), "residual": True},
    ],
)
def test_other_transforms_are_left_to_torch(options, calls):
    transform, v = random_transform(6, **options), torch.randn(7, 6).double()
    with torch.no_grad():
        y, _ = slow_direction(transform, v)
        torch.testing.assert_close(transform.inverse_and_ladj(y)[0], v, rtol=1e-9, atol=1e-9)
    assert not calls


def test_what_torch_must_see_is_left_to_torch(calls):
    transform, v = random_transform(6), torch.randn(7, 6).double()
    expected, _ = slow_direction(transform, v)
    calls.clear()
    found = torch.func.vmap(lambda v: slow_direction(transform, v)[0])(v)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="dtype"):
        slow_direction(transform, v.float())
    assert not calls


def test_nothing_is_compiled_without_numba(calls, monkeypatch):
    monkeypatch.setattr(compiled_leaf, "find_spec", lambda name: None)
    compiled_leaf._compiled.cache_clear()
    slow_direction(random_transform(6), torch.randn(7, 6).double())
    compiled_leaf._compiled.cache_clear()
    assert not calls


def test_compiles_where_nothing_can_be_written(by_torch, calls, monkeypatch):
    import numba

    njit = numba.njit

    def without_folder(cache=False, **options):
        if cache:
            raise RuntimeError("no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", without_folder)
    compiled_leaf._compiled.cache_clear()
    transform, v = random_transform(6), torch.randn(7, 6).double()
    found, expected = slow_direction(transform, v), by_torch(transform, v)
    compiled_leaf._compiled.cache_clear()
    assert calls
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
