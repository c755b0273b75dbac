"""The laws of flows over the table, with random weights, in float64."""

import pytest

from pyro_nf.testing import FLOW_LAWS, randomize
from tests.cases import FLOW_ROWS, Row


@pytest.mark.parametrize("law", FLOW_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("row", FLOW_ROWS, ids=str)
def test_flow_laws(row: Row, law) -> None:
    law(randomize(row.make()).double())
