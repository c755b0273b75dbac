"""Files: what is written comes back, and what cannot be read or written is a clear error."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from pyro_nf import _storage
from pyro_nf._storage import check_same_tensors, load_tensors, save_tensors
from pyro_nf.train.loop import Stage, adam, train


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
