"""Runs the benchmarks against the torch peers and writes the pages of the docs.

python -m benchmarks [--smoke] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import autoregressive, coupling, report


def main(arguments: list[str] | None = None) -> None:
    """Measures speed, and joins the figures to those that are there already.

    Args:
        arguments: As on the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--json", type=Path, default=report.RESULTS, help="file of the figures")
    parser.add_argument("--markdown", type=Path, default=report.PAGE, help="the page to write")
    options = parser.parse_args(arguments)
    passed = ["--json", str(options.json), *(["--smoke"] if options.smoke else [])]
    autoregressive.main(passed)
    coupling.main(passed)
    report.main(["--json", str(options.json), "--markdown", str(options.markdown)])


if __name__ == "__main__":
    main(sys.argv[1:])
