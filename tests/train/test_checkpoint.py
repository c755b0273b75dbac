"""Files: what is written comes back, and what cannot be read or written is a clear error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from pyro_nf import _storage
from pyro_nf._storage import check_same_tensors, load_tensors, save_tensors
from pyro_nf.train.batches import Minibatches
from pyro_nf.train.loop import train
from pyro_nf.train.saved.digest import digest
from pyro_nf.train.stages import Stage, adam


def run(path, width: int = 3, **options: object):
    module = nn.Linear(width, 1)
    stage = Stage(lambda _: module.weight.square().sum(), adam(module.parameters()))
    options = {"max_steps": 20, "check_every": 10, "checkpoint_every": 10} | options
    return train(module, stage, checkpoint=path, progress=False, **options)


def test_round_trip_keeps_dtypes_views_and_header(tmp_path):
    square = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    tensors = {"a": square, "view": square.T, "mask": torch.tensor([True, False])}
    save_tensors(tmp_path / "x.safetensors", "example", tensors, {"n": [1, {"k": None}]})
    loaded, header = load_tensors(tmp_path / "x.safetensors", "example")
    assert header == {"n": [1, {"k": None}]}
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, "example", {"a": torch.ones(2)}, {})

    def crash(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_storage.os, "replace", crash)
    with pytest.raises(OSError, match=r"cannot write .*No space left"):
        save_tensors(path, "example", {"a": torch.zeros(2)}, {})
    assert torch.equal(load_tensors(path, "example")[0]["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_checkpoint(tmp_path, keep):
    path = tmp_path / "fit.safetensors"
    run(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        run(path)


def test_checkpoint_of_another_architecture_lists_what_differs(tmp_path):
    path = tmp_path / "fit.safetensors"
    run(path, width=3)
    with pytest.raises(ValueError, match=r"weight has shape \(1, 3\), wanted \(1, 5\)"):
        run(path, width=5)


def test_checkpoint_of_other_settings(tmp_path):
    path = tmp_path / "fit.safetensors"
    run(path, seed=0)
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        run(path, seed=1)


def test_newer_version(tmp_path, monkeypatch):
    path = tmp_path / "fit.safetensors"
    monkeypatch.setattr(_storage, "FORMAT_VERSION", 3)
    run(path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"format version 3.*up to 2.*Upgrade"):
        run(path)


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="was not written by pyro_nf"):
        load_tensors(path, "flow")
    save_tensors(path, "flow", {}, {})
    with pytest.raises(ValueError, match="holds a flow, wanted a training checkpoint"):
        run(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_tensors(tmp_path / "nothing", "flow")


def test_a_place_that_cannot_be_written_is_found_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing" / "fit", tmp_path / "file" / "fit", tmp_path):
        with pytest.raises(OSError, match="cannot write"):
            run(path, max_steps=10**9)


def test_a_disk_that_fills_up_does_not_end_the_fit(tmp_path, monkeypatch):
    def crash(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_storage.os, "replace", crash)
    with pytest.warns(UserWarning, match="goes on without this checkpoint"):
        history = run(tmp_path / "fit.safetensors")
    assert history.stopped == "max_steps"


def test_differences_are_listed_and_cut_short():
    wanted = {f"w{i}": torch.zeros(2) for i in range(20)}
    with pytest.raises(ValueError, match=r"w0 is missing.*and 13 more"):
        check_same_tensors("load", wanted, {"other": torch.zeros(1)}, "the file")
    with pytest.raises(ValueError, match="other is not known here"):
        check_same_tensors("load", {}, {"other": torch.zeros(1)}, "the file")


def test_14_a_checkpoint_without_marks_is_not_trusted(tmp_path):
    path = tmp_path / "fit.safetensors"
    run(path)
    tensors, header = load_tensors(path, "training checkpoint")
    del header["settings"]["network"]
    save_tensors(path, "training checkpoint", tensors, header)
    with pytest.raises(ValueError, match=r"earlier version.*no record of network"):
        run(path)


def test_14_batches_are_compared(tmp_path):
    rows = torch.arange(12.0).reshape(4, 3)
    run(tmp_path / "fit", batches=Minibatches((rows,), 2))
    run(tmp_path / "fit", batches=Minibatches((rows.clone(),), 2))
    for other in (Minibatches((rows.flip(0),), 2), Minibatches((rows,), 3), [rows]):
        with pytest.raises(ValueError, match="batches was"):
            run(tmp_path / "fit", batches=other)


DIGESTS = """
import functools, numpy as np, torch
from pyro_nf.train.saved.digest import digest
generator = torch.Generator().manual_seed(0)
values = [
    torch.randn(3, 2, generator=generator), {"b": 1, "a": [None, True, "x"]}, {"x", "y", "z"},
    np.arange(3.0), 1, 1.5, float("nan"), 1j, b"x", torch.nn.Linear, functools.partial(max, 1),
    np.array(["a", None], dtype=object), torch.float32, slice(1, 2), object(),
]
print([digest(value) for value in values])
"""


def test_14_digests_are_the_same_in_every_process():
    shown = {
        subprocess.run(
            [sys.executable, "-c", DIGESTS],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(shown) == 1
    assert "float32 (3, 2)" in shown.pop()


def test_14_digests_differ_where_values_do():
    x = torch.arange(6.0)
    values = [
        x, x.double(), x.reshape(2, 3), x.flip(0), x + 1e-6, -x, x.int(), x.half(), x.bfloat16(),
        [x], [[x]], [x, x], {"x": x}, {"y": x}, (), [()], {}, None, 0, False, 0.0, "", b"", "0",
        0j, nn.ReLU, nn.ReLU(), nn.Tanh(), torch.empty(0), torch.empty(0, 2), x > 2,
        torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.0, 2.0),
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)
    assert digest(x) == digest(x.numpy()) == digest(nn.Parameter(x))
    assert digest(x.reshape(2, 3).T) == digest(x.reshape(2, 3).T.contiguous())
    loop: list[object] = []
    loop.append(loop)
    assert digest(loop) == digest(loop)


@pytest.mark.parametrize(
    "history",
    [7, {}, {"losses": "abc"}, {"losses": [1.0]}, {"unknown": 1}, {"best_step": -1}, None],
)
def test_18_a_hostile_checkpoint_is_one_value_error(history, tmp_path):
    path = tmp_path / "fit.safetensors"
    run(path)
    tensors, header = load_tensors(path, "training checkpoint")
    whole = header["history"]
    hostile = whole | history if isinstance(history, dict) and history else history
    save_tensors(path, "training checkpoint", tensors, header | {"history": hostile})
    if history == {}:
        header.pop("history")
        save_tensors(path, "training checkpoint", tensors, header)
    with pytest.raises(ValueError, match=r"corrupt|is none"):
        run(path)


@pytest.mark.parametrize("key", ["settings", "optimizers", "optimizer_scalars", "generators"])
@pytest.mark.parametrize("value", [None, 7, "x", [[1]]])
def test_18_hostile_entries_of_a_checkpoint(key, value, tmp_path):
    path = tmp_path / "fit.safetensors"
    run(path)
    tensors, header = load_tensors(path, "training checkpoint")
    save_tensors(path, "training checkpoint", tensors, header | {key: value})
    with pytest.raises(ValueError, match=r"corrupt|earlier version"):
        run(path)


def test_18_settings_of_numpy_are_written(tmp_path):
    path = tmp_path / "fit.safetensors"
    for _ in range(2):
        run(path, seed=np.int64(3), settings={"n": np.int64(2), "rate": np.float32(0.5)})
