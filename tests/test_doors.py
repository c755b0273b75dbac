"""Every argument of every public function is checked where it comes in.

Each argument in turn is replaced by wrong ones. What comes out is a good result, if the value is
right after all, or an error of the library's own that names its owner and the argument.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO

import pyro_nf
from pyro_nf.flows.recipes import maf
from pyro_nf.guides.guide import AutoFlow
from pyro_nf.testing import randomize
from pyro_nf.train.batches import Minibatches
from pyro_nf.transforms.affine import LowerAffine
from pyro_nf.vi.fit import fit_svi
from tests.doors import INNER, WRONG, Door, parameters, surface, table

OWNS = (TypeError, ValueError, RuntimeError, OSError)


@cache
def owners() -> set[str]:
    """The names of all classes and functions of the library, one of which begins each message."""
    files = Path(pyro_nf.__file__).parent.rglob("*.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))]
    return {n.name for n in nodes if isinstance(n, (ast.ClassDef, ast.FunctionDef))}


def complaint(door: Door, name: str, what: str, value: object) -> str | None:
    """What is wrong with how a door treats one value of one argument, if anything."""
    kind = door.kinds[name]
    if what in kind.may or (what in kind.takes and not door.runs):
        return None
    text = f"{name} = {what}"
    try:
        door.call(**(door.good() | {name: value}))
    except OWNS as error:
        if what in kind.takes:
            return f"{text}: refused, {error}"
        message = getattr(error, "strerror", None) or str(error)
        words = re.match(r"([A-Za-z_]\w*)(\.\w+)*: ", message)
        if words is None or words[1] not in owners():
            return f"{text}: not our words, {type(error).__name__}: {str(error)[:120]}"
        said = {name, door.says.get(name, name)}
        if not any(re.search(rf"\b{word}\b", str(error)) for word in said):
            return f"{text}: the message does not say {name}: {error}"
    except Exception as error:
        return f"{text}: {type(error).__name__}: {str(error)[:120]}"
    else:
        if what not in kind.takes:
            return f"{text}: accepted"
    return None


@pytest.mark.parametrize("name", table())
def test_22_wrong_arguments_are_refused_in_words(name: str) -> None:
    door = table()[name]
    door.call(**door.good())
    wrong: dict[str, Any] = dict(WRONG)
    found = [
        complaint(door, parameter, what, make())
        for parameter in door.good()
        for what, make in (wrong | door.kinds[parameter].also).items()
    ]
    problems = [problem for problem in found if problem]
    assert not problems, "\n".join([f"{len(problems)} in {name}", *problems])


def test_22_every_public_function_has_a_row() -> None:
    doors = table()
    missing = []
    for name, function in surface():
        if name in INNER or not parameters(function):
            continue
        if name not in doors:
            missing.append(name)
            continue
        missing += [f"{name}({p})" for p in parameters(function) if p not in doors[name].good()]
    assert not missing, missing


def test_22_a_slow_flow_is_a_guide_under_jit() -> None:
    """Step for step the losses of JitTrace_ELBO are those of Trace_ELBO by the same draws."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(1.0))

    losses = []
    for elbo in (Trace_ELBO(), JitTrace_ELBO(ignore_jit_warnings=True)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoFlow(model, lambda d: maf(d, count_layers=2, hidden_dims=(8,))).setup()
        randomize(guide, 0.1)
        svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), elbo)
        svi.step()  # the first one compiles, and draws twice
        losses.append([])
        for seed in range(4):
            pyro.set_rng_seed(seed)
            losses[-1].append(svi.step())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_22_a_fit_without_a_seed_is_fresh() -> None:
    def model() -> None:
        pyro.sample("x", dist.Gamma(2.0, 1.0))

    before = torch.random.get_rng_state()
    losses = [
        fit_svi(
            model,
            AutoFlow(model, LowerAffine),
            max_steps=1,
            num_particles=4,
            seed=seed,
            progress=False,
        ).history.losses
        for seed in (None, None, 0, 0)
    ]
    assert losses[0] != losses[1] and losses[2] == losses[3]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_22_integers_of_numpy_are_counts() -> None:
    flow = maf(np.int64(2), count_layers=np.int32(1), hidden_dims=(np.int64(4),))
    assert flow.sample((np.int64(3),)).shape == (3, 2)
    assert len(Minibatches((torch.zeros(4),), np.int64(2)).tensors) == 1
