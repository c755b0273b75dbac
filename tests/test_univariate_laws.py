"""The laws of univariate maps over the table."""

import pytest
from tests.cases import UNIVARIATE_ROWS, Row

from pyro_nf.testing import check_univariate


@pytest.mark.parametrize("row", UNIVARIATE_ROWS, ids=str)
def test_univariate_laws(row: Row) -> None:
    check_univariate(row.make())
