"""The laws that every map, transform and flow obeys, for the tests of this library and of yours.

Each law is a function that raises ``AssertionError`` and says what differs. ``check_univariate``,
``check_transform`` and ``check_flow`` run all that apply, with random weights and in float64.
"""

from pyro_nf.testing.cases import points, randomize
from pyro_nf.testing.estimates import check_log_prob
from pyro_nf.testing.flows import (
    FLOW_LAWS,
    batches_of_contexts,
    check_flow,
    density_of_draws,
    flow_copies_agree,
    gradient_of_a_draw,
    scores_agree,
)
from pyro_nf.testing.guides import check_guide
from pyro_nf.testing.programs import compiles, vmaps
from pyro_nf.testing.stochastic import (
    STOCHASTIC_LAWS,
    check_stochastic,
    contributions_agree,
    stochastic_input_is_named,
    stochastic_inverse_and_copies,
    stochastic_parameters_learn,
    stochastic_scores_are_pushed,
    stochastic_shapes,
    what_draws_nothing_undoes,
)
from pyro_nf.testing.transforms import (
    TRANSFORM_LAWS,
    bad_input_is_named,
    batch_shapes,
    check_transform,
    context_broadcasts,
    copies_agree,
    every_parameter_learns,
    gradients_cancel,
    inverse_is_a_module,
    keeps_dtype,
    ladj_is_autograds,
    nothing_is_stale,
    round_trip,
    scores_are_pushed,
    shapes_are_told,
)
from pyro_nf.testing.univariate import check_univariate, ends_are_safe

__all__ = [
    "FLOW_LAWS",
    "STOCHASTIC_LAWS",
    "TRANSFORM_LAWS",
    "bad_input_is_named",
    "batch_shapes",
    "batches_of_contexts",
    "check_flow",
    "check_guide",
    "check_log_prob",
    "check_stochastic",
    "check_transform",
    "check_univariate",
    "compiles",
    "context_broadcasts",
    "contributions_agree",
    "copies_agree",
    "density_of_draws",
    "ends_are_safe",
    "every_parameter_learns",
    "flow_copies_agree",
    "gradient_of_a_draw",
    "gradients_cancel",
    "inverse_is_a_module",
    "keeps_dtype",
    "ladj_is_autograds",
    "nothing_is_stale",
    "points",
    "randomize",
    "round_trip",
    "scores_agree",
    "scores_are_pushed",
    "shapes_are_told",
    "stochastic_input_is_named",
    "stochastic_inverse_and_copies",
    "stochastic_parameters_learn",
    "stochastic_scores_are_pushed",
    "stochastic_shapes",
    "vmaps",
    "what_draws_nothing_undoes",
]


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]
