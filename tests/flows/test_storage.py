"""Flow.save and Flow.load: the same flow elsewhere, and nothing lost when something is wrong."""

import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from pyro_nf import _storage, flows, transforms
from pyro_nf._storage import save_tensors
from pyro_nf.flows import flow as flow_module
from pyro_nf.flows.base import Base, DiagonalNormal
from pyro_nf.flows.flow import Flow, recipe
from pyro_nf.testing import randomize
from pyro_nf.transforms.chain import Chain
from tests.cases import CONTEXT_DIM, RECIPES

ELSEWHERE = """
import sys, torch
from pyro_nf.flows.flow import Flow
torch.manual_seed(99)
flow = Flow.load(sys.argv[1])
y = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
context = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
with torch.no_grad():
    print(flow(context).log_prob(y).tolist())
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "flow.safetensors"


def test_in_another_process_under_another_seed(path: Path) -> None:
    flow = randomize(flows.nsf(3, 2, count_layers=2, hidden_dims=(8,), count_bins=4)).double()
    flow.save(path)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", ELSEWHERE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    y = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    context = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
    assert json.loads(run.stdout) == flow(context).log_prob(y).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe(recipe: str, context_dim: int, dtype: torch.dtype, path: Path) -> None:
    flow = randomize(RECIPES[recipe](3, context_dim)).to(dtype)
    flow.save(path)
    loaded = Flow.load(path)
    assert json.dumps(loaded.recipe) == json.dumps(flow.recipe)
    wanted = flow.state_dict()
    for name, value in loaded.state_dict().items():
        assert value.dtype == wanted[name].dtype
        assert torch.equal(value, wanted[name])
    # what was loaded can be saved again
    loaded.save(path)
    assert json.dumps(Flow.load(path).recipe) == json.dumps(flow.recipe)


def test_a_flow_of_no_recipe_needs_into(path: Path) -> None:
    def build() -> Flow:
        return Flow(Chain([transforms.LULinear(2), transforms.Permutation.random(2, seed=1)]))

    flow = randomize(build())
    flow.save(path)
    with pytest.raises(ValueError, match=r"no recipe built.*into=flow"):
        Flow.load(path)
    into = build()
    assert Flow.load(path, into=into) is into
    y = torch.randn(3, 2)
    torch.testing.assert_close(into().log_prob(y), flow().log_prob(y), rtol=0, atol=0)


def test_another_architecture_leaves_the_target_alone(path: Path) -> None:
    flows.realnvp(3, hidden_dims=(8,)).save(path)
    into = randomize(flows.realnvp(3, hidden_dims=(9,)))
    before = {name: value.clone() for name, value in into.state_dict().items()}
    with pytest.raises(ValueError, match=r"another architecture.*shape \(8, .*wanted \(9, "):
        Flow.load(path, into=into)
    with pytest.raises(ValueError, match=r"another architecture.*is missing"):
        Flow.load(path, into=flows.realnvp(3, hidden_dims=(8,), count_layers=9))
    assert all(torch.equal(before[name], value) for name, value in into.state_dict().items())


def test_truncated_and_foreign_files(path: Path) -> None:
    flows.realnvp(3).save(path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated or corrupt"):
            Flow.load(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not written by pyro_nf"):
        Flow.load(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        Flow.load(path.with_name("nothing"))


def test_a_newer_version_is_refused(path: Path) -> None:
    flows.realnvp(3).save(path)
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata = json.loads(file.metadata()["pyro_nf"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["version"] += 1
    safetensors.torch.save_file(tensors, path, metadata={"pyro_nf": json.dumps(metadata)})
    with pytest.raises(ValueError, match="Upgrade pyro_nf"):
        Flow.load(path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(OSError, match="cannot write"):
        flows.realnvp(2).save(file / "flow.safetensors")
    with pytest.raises(OSError, match="cannot write"):
        flows.realnvp(2).save(tmp_path / "missing" / "flow.safetensors")
    with pytest.raises(OSError, match="cannot write"):
        flows.realnvp(2).save(tmp_path)
    assert file.read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]  # and no litter


def test_a_failed_write_keeps_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = randomize(flows.realnvp(2))
    flow.save(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        flows.realnvp(2).save(path)
    monkeypatch.undo()
    y = torch.randn(3, 2)
    torch.testing.assert_close(Flow.load(path)().log_prob(y), flow().log_prob(y), rtol=0, atol=0)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# Hostile and damaged files.


def small_flow() -> Flow:
    return randomize(flows.gaussian(2))


def same_state(a: Flow, b: Flow) -> bool:
    wanted = b.state_dict()
    return all(torch.equal(value, wanted[name]) for name, value in a.state_dict().items())


def test_18_every_damaged_byte_is_refused_or_harmless(path: Path) -> None:
    flow = small_flow()
    flow.save(path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    dice = random.Random(0)
    refused = 0
    for i in range(len(whole)):
        changes = [whole[i] ^ 1 << dice.randrange(8), dice.randrange(256)]
        for byte in changes:
            path.write_bytes(whole[:i] + bytes([byte]) + whole[i + 1 :])
            try:
                loaded = Flow.load(path)
            except ValueError:
                refused += 1
                continue
            assert same_state(loaded, flow)
            assert i < 8 + length or byte == whole[i]  # no number may change
            assert json.dumps(loaded.recipe) == json.dumps(flow.recipe)
    assert refused > 1.9 * len(whole)


def test_18_every_truncation_and_appendix_is_refused(path: Path) -> None:
    small_flow().save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated or corrupt"):
            Flow.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="truncated or corrupt"):
        Flow.load(path)


def rewrite(path: Path, **changes: Any) -> None:
    """The file with another header and a right checksum."""
    tensors, header = _storage.load_tensors(path, "flow")
    save_tensors(path, "flow", tensors, header | changes)


DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE: dict[str, dict[str, Any]] = {
    "no recipe": {"recipe": None},
    "unknown recipe": {"recipe": ["os.system", {}]},
    "recipe is a number": {"recipe": 7},
    "recipe is a list of lists": {"recipe": [[], {}]},
    "arguments are a list": {"recipe": ["gaussian", [2]]},
    "unknown argument": {"recipe": ["gaussian", {"input_dim": 2, "path": "x"}]},
    "no argument": {"recipe": ["gaussian", {}]},
    "text for a size": {"recipe": ["gaussian", {"input_dim": "2"}]},
    "negative size": {"recipe": ["gaussian", {"input_dim": -2}]},
    "other size": {"recipe": ["gaussian", {"input_dim": 3}]},
    "nothing for a size": {"recipe": ["gaussian", {"input_dim": None}]},
    "NaN": {"recipe": ["nsf", {"input_dim": 2, "bound": float("nan")}]},
    "huge size": {"recipe": ["gaussian", {"input_dim": 10**12}]},
    "huge integer": {"recipe": ["gaussian", {"input_dim": 10**400}]},
    "large size": {"recipe": ["gaussian", {"input_dim": 60_000}]},
    "wide": {"recipe": ["realnvp", {"input_dim": 2, "hidden_dims": [20_000, 20_000]}]},
    "wide maf": {"recipe": ["maf", {"input_dim": 2, "hidden_dims": [20_000, 20_000]}]},
    "wide context": {"recipe": ["gaussian", {"input_dim": 2, "context_dim": 60_000}]},
    "wide and many bins": {"recipe": ["nsf", {"input_dim": 60_000, "count_bins": 60_000}]},
    "autoregressive bins": {
        "recipe": ["nsf", {"input_dim": 60_000, "count_bins": 60_000, "autoregressive": True}]
    },
    "many layers": {"recipe": ["realnvp", {"input_dim": 2, "count_layers": 100_000}]},
    "less many layers": {"recipe": ["maf", {"input_dim": 2, "count_layers": 60_000}]},
    "planar layers": {"recipe": ["planar", {"input_dim": 2, "count_layers": 65_000}]},
    "many widths": {"recipe": ["maf", {"input_dim": 2, "hidden_dims": [1] * 6_000}]},
    "no base": {"base": None},
    "base without a name": {"base": [None, {}]},
    "base is a number": {"base": 3},
    "base with other sizes": {"base": ["DiagonalNormal", {"input_dim": 3}]},
    "base with unknown sizes": {"base": ["DiagonalNormal", {"scale": -1}]},
    "many components": {"base": ["GaussianMixture", {"input_dim": 2, "count_components": 10**9}]},
    "some components": {"base": ["GaussianMixture", {"input_dim": 2, "count_components": 50_000}]},
    "wide mixture": {"base": ["GaussianMixture", {"input_dim": 60_000, "count_components": 9}]},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_18_hostile_headers_are_refused_before_memory_is_taken(
    changes: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_flow().save(path)
    rewrite(path, **changes)
    made: list[int] = []
    call = _storage.Bounded.__torch_dispatch__

    def counted(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = call(self, func, types, args, kwargs)
        made.append(out.numel() if isinstance(out, torch.Tensor) else 0)
        return out

    monkeypatch.setattr(_storage.Bounded, "__torch_dispatch__", counted)
    tracemalloc.start()  # what Python itself takes; torch's tensors are counted above
    try:
        with pytest.raises(ValueError, match="load: "):
            Flow.load(path)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
    assert len(made) < 1500
    assert max(made, default=0) < 200_000


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "null",
        "[]",
        "7",
        DEEP,
        '{"kind": "flow"}',
        '{"kind": "flow", "version": -1, "header": {}}',
        '{"kind": "flow", "version": 0, "header": {}}',
        '{"kind": "flow", "version": true, "header": {}}',
        '{"kind": "flow", "version": 1.0, "header": {}}',
        '{"kind": "flow", "version": "1", "header": {}}',
        '{"kind": "flow", "version": null, "header": {}}',
        '{"kind": "flow", "version": 99, "header": {}}',
        '{"kind": ["flow"], "version": 1, "header": {}}',
        '{"kind": "flow", "version": 1, "header": []}',
        '{"kind": "flow", "version": 1, "header": null}',
        '{"kind": "flow", "version": 2, "header": {"recipe": ["gaussian", {"input_dim": 2}]}}',
        '{"kind": "flow", "version": 1, "header": {"recipe": ' + DEEP + "}}",
        '{"kind": "flow", "version": ' + "9" * 5000 + "}",
    ],
)
def test_18_hostile_metadata_is_one_value_error(metadata: str, path: Path) -> None:
    tensors = small_flow().state_dict()
    safetensors.torch.save_file(tensors, path, metadata={"pyro_nf": metadata})
    with pytest.raises(ValueError, match="load: "):
        Flow.load(path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool, torch.uint8])
def test_18_numbers_of_another_kind_are_refused(dtype: torch.dtype, path: Path) -> None:
    flow = small_flow()
    flow.save(path)
    _, header = _storage.load_tensors(path, "flow")
    tensors = {name: value.to(dtype) for name, value in flow.state_dict().items()}
    save_tensors(path, "flow", tensors, header)
    for into in (None, small_flow()):
        with pytest.raises(ValueError, match="load"):
            Flow.load(path, into=into)


def test_18_a_file_of_the_first_version_loads(path: Path) -> None:
    flow = small_flow()
    header = {
        "recipe": ["gaussian", {"input_dim": 2, "context_dim": 0, "hidden_dims": [64, 64]}],
        "base": ["DiagonalNormal", {"input_dim": 2}],
        "dtype": "float32",
    }
    metadata = json.dumps({"kind": "flow", "version": 1, "header": header})
    safetensors.torch.save_file(flow.state_dict(), path, metadata={"pyro_nf": metadata})
    assert same_state(Flow.load(path), flow)


def test_18_a_checksum_is_checked_whatever_the_version(path: Path) -> None:
    flow = small_flow()
    flow.save(path)
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: value + 1 for name, value in flow.state_dict().items()}
    metadata["pyro_nf"] = metadata["pyro_nf"].replace('"version": 2', '"version": 1')
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="checksum"):
        Flow.load(path)


@pytest.mark.parametrize(
    "hidden_dims",
    [
        np.array([5, 6]),
        (np.int64(5), np.int32(6)),
        torch.tensor([5, 6]).tolist(),
        torch.Size([5, 6]),
    ],
)
def test_18_arguments_of_numpy_and_torch_are_saved(hidden_dims: Any, path: Path) -> None:
    made = flows.nsf(
        np.int64(3),  # type: ignore[arg-type]
        np.int64(2),  # type: ignore[arg-type]
        count_bins=np.int16(4),  # type: ignore[arg-type]
        bound=np.float32(2.5),  # type: ignore[arg-type]
        hidden_dims=tuple(hidden_dims),
        autoregressive=np.bool_(True),  # type: ignore[arg-type]
    )
    flow = randomize(made)
    flow.save(path)
    loaded = Flow.load(path)
    assert same_state(loaded, flow)
    assert loaded.recipe is not None
    assert loaded.recipe[1]["bound"] == 2.5
    assert loaded.recipe[1]["hidden_dims"] == [5, 6]


def test_18_a_recipe_with_a_class_is_read_by_into(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_module, "_RECIPES", dict(flow_module._RECIPES))

    @recipe
    def mine(input_dim: int, activation: type[nn.Module] = nn.Tanh) -> Flow:
        return Flow(
            transforms.Autoregressive(
                flows.maf(1).transform.parts[0].univariate, input_dim, activation=activation
            )
        )

    flow = randomize(mine(2, nn.SiLU))
    flow.save(path)
    with pytest.raises(ValueError, match=r"no recipe built.*into=flow"):
        Flow.load(path)
    assert same_state(Flow.load(path, into=mine(2, nn.SiLU)), flow)


def test_18_a_base_of_ones_own_is_read_by_into(path: Path) -> None:
    class Mine(DiagonalNormal):
        pass

    def build() -> Flow:
        flow = flows.gaussian(2)
        base: Base = Mine(2, scale=3.0)
        flow.base = base
        return flow

    flow = randomize(build())
    flow.save(path)
    with pytest.raises(ValueError, match="into=flow"):
        Flow.load(path)
    loaded = Flow.load(path, into=build())
    assert same_state(loaded, flow)


def test_18_replacing_keeps_a_link_and_the_mode(tmp_path: Path) -> None:
    target, link = tmp_path / "deep" / "target", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    first, second = small_flow(), small_flow()
    first.save(link)  # the link points to nothing yet
    umask = os.umask(0o022)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask
    target.chmod(0o640)
    second.transform.bias.data += 1
    second.save(link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert same_state(Flow.load(target), second)
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_18_a_reader_of_the_old_file_is_not_disturbed(path: Path) -> None:
    old, new = small_flow(), small_flow()
    new.transform.bias.data += 1
    old.save(path)
    with path.open("rb") as reader:
        new.save(path)
        path.with_name("copy").write_bytes(reader.read())
    assert same_state(Flow.load(path.with_name("copy")), old)
    assert same_state(Flow.load(path), new)


def test_18_a_device_or_pipe_is_not_replaced(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(OSError, match="no regular file"):
        small_flow().save(path)
    assert path.is_fifo()
    with pytest.raises(FileNotFoundError):
        Flow.load(path)


def test_11_another_dtype_is_not_loaded_in_secret(path: Path) -> None:
    flow = small_flow()
    flow.save(path)
    into = small_flow().double()
    before = {name: value.clone() for name, value in into.state_dict().items()}
    with pytest.raises(TypeError, match=r"torch\.float32, wanted torch\.float64"):
        Flow.load(path, into=into)
    with pytest.raises(TypeError, match=r"torch\.float32, wanted torch\.float64"):
        into.load_state_dict(flow.state_dict())
    holder = nn.ModuleDict({"flow": flow})
    with pytest.raises(TypeError, match=r"flow\..*torch\.float64, wanted torch\.float32"):
        holder.load_state_dict({f"flow.{k}": v for k, v in before.items()})
    assert all(torch.equal(before[name], value) for name, value in into.state_dict().items())
    assert same_state(Flow.load(path, into=into.float()), flow)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_11_a_file_keeps_its_dtypes(dtype: torch.dtype, path: Path) -> None:
    flow = small_flow().to(dtype)
    flow.base.float()  # a base of its own dtype
    flow.save(path)
    loaded = Flow.load(path)
    assert {n: v.dtype for n, v in loaded.state_dict().items()} == {
        n: v.dtype for n, v in flow.state_dict().items()
    }
    assert same_state(loaded, flow)


@pytest.mark.parametrize("name", ["realnvp", "glow", "maf", "iaf"])
def test_19_a_file_from_before_stacks_shared_a_bound(name: str, path: Path) -> None:
    """Each layer could scale by e^5 then, and that decides the density where it is reached."""
    build = getattr(flows, name)
    flow = randomize(build(3, count_layers=3, max_log_scale=15.0), scale=3.0).double()
    flow.recipe[1].pop("max_log_scale")
    flow.save(path)
    y = 3 * torch.randn(50, 3, dtype=torch.float64)
    loaded, expected = Flow.load(path), flow().log_prob(y)
    torch.testing.assert_close(loaded().log_prob(y), expected, rtol=0, atol=0)
    narrow = build(3, count_layers=3).double()
    narrow.load_state_dict(flow.state_dict())
    assert not torch.equal(narrow().log_prob(y), expected)
