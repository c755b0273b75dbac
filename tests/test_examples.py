"""Every script in examples/ runs, with a few steps, and writes its pictures."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# With so few steps weights may be poor, and SVI's guides far off; the scripts must run, no more.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(path).main(["--smoke", "--output", str(tmp_path / "pictures")])
    pictures = list((tmp_path / "pictures").glob("*.png"))
    assert pictures
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    printed = capsys.readouterr().out
    assert all(str(picture) in printed for picture in pictures)


def test_the_examples_are_found() -> None:
    assert {path.stem for path in EXAMPLES} >= {
        "eight_schools",
        "posterior_script",
        "two_moons",
        "vae_digits",
    }


def test_the_demo_prints_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(path for path in EXAMPLES if path.stem == "eight_schools")
    load(path).main(["--smoke", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    for site in ("mu", "tau", *(f"theta[{i}]" for i in range(8))):
        assert f"\n{site} " in printed
    for figure in ("ELBO", "log evidence", "PSIS k-hat", "effective sample size"):
        assert figure in printed
