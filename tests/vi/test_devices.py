"""Flat priors follow the device of the data; ``meta``, which has no numbers, stands for others."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

from pyro_nf.ops.devices import device_of, in_double
from pyro_nf.sites.latents import trace_prototype


def flat(y: torch.Tensor, *rest: object) -> None:
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0, validate_args=False), obs=y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_24_flat_priors_start_where_the_data_are(dtype: torch.dtype) -> None:
    y = torch.zeros(5, dtype=dtype, device="meta")
    with pyro.validation_enabled(False):
        for args, kwargs in (((y,), {}), ((y, 3.0), {}), ((), {"y": y})):
            trace = trace_prototype(flat, args, kwargs)
            assert trace.nodes["mu"]["value"].device.type == "meta"
    assert trace_prototype(flat, (torch.zeros(3),)).nodes["mu"]["value"].device.type == "cpu"


def test_24_the_device_is_that_of_the_first_tensor() -> None:
    meta = torch.ones(2, device="meta")
    assert device_of([{"x": (1, meta)}, torch.ones(1)]).type == "meta"
    assert device_of(nn.Linear(1, 1, device="meta")).type == "meta"
    assert device_of("a", 1.0, [], {}) is None


def test_24_a_device_without_double_precision_hands_over_to_the_cpu() -> None:
    assert in_double(torch.ones(2, device="meta")).device.type == "meta"
    moved = []

    class Single(torch.Tensor):
        """Says that it is on such a device."""

        device = torch.device("mps")

        def cpu(self):
            moved.append(True)
            return torch.ones(2)

    made = in_double(torch.ones(2).as_subclass(Single))
    assert moved == [True]
    assert made.dtype == torch.float64
