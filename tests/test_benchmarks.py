"""The benchmarks run, in smoke mode, and write their page."""

import json
from pathlib import Path

from benchmarks import __main__ as everything
from benchmarks import density
from benchmarks.timing import Figure, Timing, ratio, table


def test_speed_runs_and_writes_its_page(tmp_path: Path) -> None:
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    everything.main(["--smoke", "--json", str(results), "--markdown", str(page)])
    sections = json.loads(results.read_text())
    assert "autoregressive" in sections
    assert "coupling" in sections
    text = page.read_text()
    assert "one thread" in text
    for section in sections.values():
        for figure in section["figures"]:
            assert figure["name"] in text


def test_densities_are_fitted_and_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    density.main(["--smoke", "--methods", "pyro_nf,sklearn mixture", "--markdown", str(page)])
    text = page.read_text()
    assert "| test NLL, nats | moons |" in text
    assert "| pyro_nf | " in text
    assert "| sklearn mixture | " in text


def test_a_bound_that_is_missed_is_said() -> None:
    met = Figure("fast", 0.5, must=0.9)
    missed = Figure("slow", 1.5, must=0.9)
    assert met.met
    assert not missed.met
    lines = table([met, missed]).splitlines()
    assert "| yes |" in lines[2]
    assert "| NO |" in lines[3]


def test_a_ratio_is_to_the_best_of_the_others() -> None:
    figure = ratio("x", Timing(1.0, 2.0), {"a": Timing(4.0, 4.0), "b": Timing(2.0, 8.0)}, must=1.0)
    assert figure.value == 0.5
    assert figure.by_median == 0.25
