"""How benchmarks measure: process CPU time on one thread, interleaved, as ratios.

On a shared machine a time says little, but the ratio of two times does if both were taken in the
same minutes. So :func:`interleave` runs all calls in turn, round after round, and a figure is the
ratio of the shortest readings, beside that of the medians.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median

PACKAGES = (
    "pyro-nf",
    "torch",
    "numba",
    "pyro-ppl",
    "zuko",
    "nflows",
    "normflows",
    "jax",
    "flowjax",
    "numpyro",
)
# A reading repeats a call until it takes this long, so that the clock does not count.
SHORTEST_READING = 5e-3
# A call that takes longer is run once.
SLOW = 3.0


@dataclass
class Timing:
    """Seconds of one call: the shortest and the median reading; extrapolated if not run in full."""

    shortest: float
    median: float
    extrapolated: bool = False

    def scaled(self, factor: float) -> Timing:
        return Timing(self.shortest * factor, self.median * factor, True)


def one_thread() -> None:
    """Keeps torch and XLA to one thread. Call it before the first work is done."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    )
    import torch

    torch.set_num_threads(1)


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int = 40, seconds: float = 8.0
) -> dict[str, Timing]:
    """Times calls in turn.

    Args:
        calls: What to time, by name.
        rounds: How many readings to take of each.
        seconds: Begin no further round after this time, though one is always taken.
    """
    # The first run warms up, unless the call is so slow that this hardly counts.
    first = {name: _reading(call, 1) for name, call in calls.items()}
    quick = {name: call for name, call in calls.items() if first[name] < SLOW}
    repeats = {
        name: max(1, round(SHORTEST_READING / max(_reading(call, 1), 1e-6)))
        for name, call in quick.items()
    }
    readings = {name: [first[name]] if name not in quick else [] for name in calls}
    start = time.process_time()
    for done in range(rounds):
        if done and time.process_time() - start > seconds:
            break
        for name, call in quick.items():
            readings[name].append(_reading(call, repeats[name]))
    return {name: Timing(min(times), median(times)) for name, times in readings.items()}


def _reading(call: Callable[[], object], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


@dataclass
class Figure:
    """One line of a table: a measured ratio (or error) beside what it must be at most.

    Attributes:
        name: What is measured.
        value: The figure; of a ratio, that of the shortest readings.
        must: The bound it must keep.
        aim: The bound it aims at.
        by_median: The same ratio of the medians.
        detail: What it was measured against, in words.
    """

    name: str
    value: float
    must: float
    aim: float | None = None
    by_median: float | None = None
    detail: str = ""

    @property
    def met(self) -> bool:
        return self.value <= self.must


def ratio(
    name: str, ours: Timing, theirs: Mapping[str, Timing], must: float, aim: float | None = None
) -> Figure:
    """The ratio to the best of the others; ``~`` marks those that were not run in full."""
    best = min(theirs, key=lambda peer: theirs[peer].shortest)
    times = {"ours": ours, **theirs}
    detail = ", ".join(
        f"{name} {'~' if t.extrapolated else ''}{_duration(t.shortest)}"
        for name, t in times.items()
    )
    return Figure(
        name,
        ours.shortest / theirs[best].shortest,
        must,
        aim,
        ours.median / theirs[best].median,
        detail,
    )


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 0.1 or value == 0:
        return f"{value:.3g}"
    return f"1/{1 / value:.3g}" if value > 1e-4 else f"{value:.1e}"


def table(figures: Iterable[Figure]) -> str:
    """The figures as a markdown table."""
    lines = [
        "| figure | measured | by median | must | aim | met | times |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in figures:
        numbers = map(_number, (f.value, f.by_median, f.must, f.aim))
        lines.append(
            f"| {f.name} | {' | '.join(numbers)} | {'yes' if f.met else 'NO'} | {f.detail} |"
        )
    return "\n".join(lines)


def conditions(command: str) -> str:
    """When, where and with what the figures were taken, in a line of markdown."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    date = time.strftime("%Y-%m-%d")
    python = platform.python_version()
    return (
        f"{date}, `{command}`, one thread, process CPU time, shortest of interleaved readings; "
        f"Python {python}, {', '.join(versions)}; {_processor()}, {sys.platform}."
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def add_to(path: Path, section: str, figures: Iterable[Figure], command: str) -> None:
    """Writes the figures under their section into a JSON file, beside what it holds already."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content[section] = {
        "conditions": conditions(command),
        "figures": [asdict(figure) | {"met": figure.met} for figure in figures],
    }
    path.write_text(json.dumps(content, indent=1))
