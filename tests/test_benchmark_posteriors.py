"""The rows of the posterior benchmark are kept, replaced and shown."""

from dataclasses import replace
from pathlib import Path

from benchmarks.posteriors import Row, add_to, page

GOOD = Row("banana", "ours", 0, 0.01, 0.02, 0.3, 0.97, -0.01, 0.0, 0.001, 0.01, 900, 10.0)


def test_rows_replace_those_of_the_same_posterior_and_method(tmp_path: Path) -> None:
    path, peer = tmp_path / "rows.json", replace(GOOD, method="AutoNormal", khat=1.2)
    add_to(path, [GOOD, peer])
    better = replace(GOOD, khat=0.1)
    assert add_to(path, [better]) == [better, peer]


def test_the_page_shows_the_worst_seed() -> None:
    text = page([GOOD, replace(GOOD, seed=1, khat=0.9, ess=0.5)], "today", {})
    assert "| banana | ours | 0.010 | 0.020 | 0.90 | 50.0% | 0.010 | 900 | no |" in text
    assert page([GOOD], "today", {}).count("yes") == 1
