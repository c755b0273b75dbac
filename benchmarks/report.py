"""Joins what the benchmarks measured into the page that the docs show.

python -m benchmarks.report [--json benchmarks/results.json] [--markdown docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.timing import Figure, table

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
HEAD = """# Speed

Each figure is a ratio of process CPU times on one thread: ours over that of the best of the others,
taken in turn in one process. Small is good; `must` is the bound that the library keeps to, `aim`
where it wants to be. `~` marks a time that was extrapolated, because the call would take more than
a minute. The extra `fast` is installed. `make bench` measures all again against the torch peers,
`make bench-jax` against the JAX peers; both write this page.
"""


def page(results: dict[str, dict]) -> str:
    """The page in markdown.

    Args:
        results: By section, the figures and the conditions they were taken under.
    """
    parts = [HEAD]
    for section, content in results.items():
        figures = [
            Figure(**{k: v for k, v in figure.items() if k != "met"})
            for figure in content["figures"]
        ]
        title = section[0].upper() + section[1:]
        parts.append(f"## {title}\n\n{table(figures)}\n\n{content['conditions']}\n")
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Writes the page.

    Args:
        arguments: As on the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="what was measured")
    parser.add_argument("--markdown", type=Path, default=PAGE, help="the page to write")
    options = parser.parse_args(arguments)
    options.markdown.write_text(page(json.loads(options.json.read_text())))


if __name__ == "__main__":
    main()
