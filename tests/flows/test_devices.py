"""Everything follows the flow's device; ``meta``, which has no numbers, stands for any other."""

import pytest
import torch

from tests.cases import CONTEXT_DIM, RECIPES


@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM])
@pytest.mark.parametrize("recipe", RECIPES)
def test_24_flows_stay_on_their_device(recipe: str, context_dim: int) -> None:
    """Tensors of two devices cannot meet: torch raises."""
    flow = RECIPES[recipe](3, context_dim).to("meta")
    y = torch.zeros(5, 3, device="meta")
    context = torch.zeros(5, context_dim, device="meta") if context_dim else None
    made = [flow.base().sample((4,)), flow.base().log_prob(y), *flow.state_dict().values()]
    d = flow(context)
    if flow.transform.fast != "forward":
        made += [d.log_prob(y), *flow.transform.inverse_and_ladj(y, context)]
    if flow.transform.fast != "inverse":
        made += [d.sample((2,)), *d.rsample_and_log_prob((2,))]
    assert {t.device.type for t in made} == {"meta"}
