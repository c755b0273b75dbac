"""Every test and doctest starts alike: one thread, no screen, seeded, an empty param store."""

from collections.abc import Iterator

import matplotlib
import pyro
import pytest
import torch

torch.set_num_threads(1)  # the tests run in parallel, one thread each
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _fresh_start() -> Iterator[None]:
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)  # torch.compile turns it off for the whole process
    yield
    pyro.clear_param_store()
