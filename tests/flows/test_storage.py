"""Flow.save and Flow.load: the same flow elsewhere, and nothing lost when something is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from pyro_nf import flows, transforms
from pyro_nf.flows.flow import Flow
from pyro_nf.testing import randomize
from pyro_nf.transforms.base import Chain
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
