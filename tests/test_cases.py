"""Every exported map, transform and recipe has a row in the table."""

from collections.abc import Iterable

import pytest

from pyro_nf import flows, transforms, univariate
from tests.cases import (
    ABSTRACT,
    FLOW_ROWS,
    STOCHASTIC_ROWS,
    TRANSFORM_ROWS,
    UNIVARIATE_ROWS,
    Row,
)


def missing(exported: Iterable[str], rows: Iterable[Row]) -> set[str]:
    covered = {row.name.split("-")[0] for row in rows}
    return {name for name in exported if name not in covered | ABSTRACT}


@pytest.mark.parametrize(
    ("exported", "rows"),
    [
        (univariate.__all__, UNIVARIATE_ROWS),
        (transforms.__all__, [*TRANSFORM_ROWS, *STOCHASTIC_ROWS]),
        ([name for name in flows.__all__ if name.islower()], FLOW_ROWS),
    ],
    ids=["univariate", "transforms", "flows"],
)
def test_every_export_has_a_row(exported: list[str], rows: list[Row]) -> None:
    assert not missing(exported, rows)


def test_a_missing_row_is_found() -> None:
    assert missing(["Affine", "Unheard"], UNIVARIATE_ROWS) == {"Unheard"}
