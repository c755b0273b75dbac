"""The laws of transforms over the table, with random weights, in float64."""

import pytest

from pyro_nf.testing import STOCHASTIC_LAWS, TRANSFORM_LAWS, randomize
from tests.cases import STOCHASTIC_ROWS, TRANSFORM_ROWS, Row


@pytest.mark.parametrize("law", TRANSFORM_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("row", TRANSFORM_ROWS, ids=str)
def test_transform_laws(row: Row, law) -> None:
    law(randomize(row.make()).double())


@pytest.mark.parametrize("law", STOCHASTIC_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("row", STOCHASTIC_ROWS, ids=str)
def test_stochastic_laws(row: Row, law) -> None:
    law(randomize(row.make()).double())
