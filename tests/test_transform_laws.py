"""The laws of transforms over the table, with random weights, in float64."""

import pytest

from pyro_nf.testing import TRANSFORM_LAWS, randomize
from tests.cases import TRANSFORM_ROWS, Row


@pytest.mark.parametrize("law", TRANSFORM_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("row", TRANSFORM_ROWS, ids=str)
def test_transform_laws(row: Row, law) -> None:
    law(randomize(row.make()).double())
