"""Importing the library changes nothing but sys.modules; tab completion shows what is public."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

BEFORE_AND_AFTER = """
import random, sys, threading, warnings
import numpy as np, pyro, torch, matplotlib, sympy  # of which torch imports some late
from torch.distributions import biject_to, transform_to
from torch.distributions.kl import _KL_REGISTRY


def world():
    return {
        "biject_to": dict(biject_to._registry),
        "transform_to": dict(transform_to._registry),
        "kl": dict(_KL_REGISTRY),
        "pyro validation": pyro.settings.get(),
        "torch validation": torch.distributions.Distribution._validate_args,
        "filters": list(warnings.filters),
        "dtype": torch.get_default_dtype(),
        "device": str(torch.get_default_device()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "python threads": threading.active_count(),
        "grad": (torch.is_grad_enabled(), torch.is_anomaly_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "torch random": torch.get_rng_state().tolist(),
        "numpy random": str(np.random.get_state()),
        "random": random.getstate(),
        "store": dict(pyro.get_param_store()),
        "stack": list(pyro.poutine.runtime._PYRO_STACK),
        "rc": dict(matplotlib.rcParams),
        "hook": sys.excepthook is sys.__excepthook__,
        "recursion": sys.getrecursionlimit(),
        "numpy errors": np.geterr(),
        "print": np.get_printoptions(),
    }


before = world()
import pyro_nf
after = world()
print([key for key in before if str(before[key]) != str(after[key])])
"""


def test_23_an_import_changes_nothing_global() -> None:
    run = subprocess.run(
        [sys.executable, "-c", BEFORE_AND_AFTER],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("room", ["", ".flows", ".infer", ".nn", ".train", ".transforms", ".plots"])
def test_25_tab_completion_shows_public_names(room: str) -> None:
    face = importlib.import_module(f"pyro_nf{room}")
    shown = {name for name in dir(face) if not name.startswith("_")}
    assert shown == set(face.__all__)
    assert all(hasattr(face, name) for name in shown)
