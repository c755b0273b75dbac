"""Draws how the blocked inverse goes through a weight: `python docs/figures/blocks.py`."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

GROUPS, LEAF = 16, 2
LEAF_COLOUR = "#f28e2b"
PUSH_COLOURS = ("#1f4e79", "#4f8fc0", "#a9cbe4")


def draw(axes: Axes, first: int, last: int, depth: int, turn: list[int]) -> None:
    """The order of :func:`pyro_nf.nn.triangular.substitute`, numbered as it runs."""

    def block(row: int, column: int, height: int, width: int, colour: str, text: str) -> None:
        axes.add_patch(
            Rectangle((column, row), width, height, facecolor=colour, edgecolor="white", lw=1.5)
        )
        size = 7 + 1.3 * min(height, width)
        axes.text(
            column + width / 2, row + height / 2, text, ha="center", va="center",
            color="white" if colour != PUSH_COLOURS[-1] else "black", fontsize=size,
        )  # fmt: skip

    if last - first <= LEAF:
        turn[0] += 1
        block(first, first, last - first, last - first, LEAF_COLOUR, str(turn[0]))
        return
    middle = (first + last) // 2
    draw(axes, first, middle, depth + 1, turn)
    turn[0] += 1
    block(middle, first, last - middle, middle - first, PUSH_COLOURS[depth], str(turn[0]))
    draw(axes, middle, last, depth + 1, turn)


def main(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5.2, 5.2))
    draw(axes, 0, GROUPS, 0, [0])
    axes.add_patch(Rectangle((0, 0), GROUPS, GROUPS, fill=False, edgecolor="0.6"))
    axes.text(12, 3.6, "zero:\nnever multiplied", ha="center", va="center", color="0.5")
    axes.set(
        xlim=(-0.1, GROUPS + 0.1),
        ylim=(GROUPS + 0.1, -0.1),
        xlabel="groups of the layer before, in the order of their degrees",
        ylabel="groups of the layer",
        aspect="equal",
        xticks=[],
        yticks=[],
    )
    axes.set_title("orange: group by group;  blue: one GEMM", fontsize=10)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.savefig(path, bbox_inches="tight", dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
