"""The laws of univariate maps over the table."""

import pytest

from pyro_nf.testing import check_univariate
from tests.cases import UNIVARIATE_ROWS, Row


@pytest.mark.parametrize("row", UNIVARIATE_ROWS, ids=str)
def test_univariate_laws(row: Row) -> None:
    check_univariate(row.make())
