"""How far a search looks, by what the log density costs in counted operations, not by a clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_nf.model.density import LogDensity

# What a call of an operation and one of its numbers count, in seconds of a machine that serves as
# the measure: the same model always costs the same, whatever this machine is busy with.
_CALL, _NUMBER = 5e-6, 1.5e-9
# Numbers that a step of the ascent itself handles for each coordinate of a point.
_ASCENT_NUMBERS = 60
#: The most and the fewest points that climb.
MOST_STARTS, FEWEST_STARTS = 8192, 64
# How many steps they make.
_STEPS = 100
# Costs, by that measure, at which fewer points climb, and at which they make fewer steps.
_FEWER_STARTS, _FEWER_STEPS = 2.0, 12.0
# Batches in which the operations are counted. No recording is made for such sizes.
_COUNTED = (3, 9)


class _OperationCount(TorchDispatchMode):
    """Counts the operations of torch and the numbers that they make, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.numbers = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if _is_tensor(t)]
        # A product or a factorisation of matrices makes each number from a row.
        product = any(word in str(func) for word in ("mm", "linalg", "cholesky", "solve"))
        width = max([1, *(a.shape[-1] for a in args if _is_tensor(a) and a.dim() and product)])
        self.calls += 1
        self.numbers += width * sum(t.numel() for t in made)
        return out


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def nominal_cost(joint: LogDensity) -> tuple[float, float]:
    """What a step of an ascent costs, by counted operations and not by a clock.

    Args:
        joint: The log joint density.

    Returns:
        Seconds of a nominal machine for a step of no points, and for each point more; the same for
        the same model wherever and whenever it runs.
    """
    costs = []
    for rows in _COUNTED:
        with _OperationCount() as counted:
            joint.value_and_grad(joint.init_loc.expand(rows, -1))
        own = _ASCENT_NUMBERS * rows * joint.latent_dim
        costs.append(_CALL * counted.calls + _NUMBER * (counted.numbers + own))
    each = (costs[1] - costs[0]) / (_COUNTED[1] - _COUNTED[0])
    return max(costs[0] - _COUNTED[0] * each, 0.0), each


@dataclass(frozen=True)
class Effort:
    """How far is looked.

    Attributes:
        num_starts: Points that climb.
        max_steps: Steps that each of them may make.
        num_points: Points at which guide and posterior are compared.
    """

    num_starts: int
    max_steps: int = _STEPS
    num_points: int = 4096

    @classmethod
    def for_joint(cls, joint: LogDensity) -> Effort:
        """As much as a log joint density of this cost allows, by a rule that asks no clock."""
        fixed, each = nominal_cost(joint)
        count = MOST_STARTS
        while count > FEWEST_STARTS and _STEPS * (fixed + count * each) > _FEWER_STARTS:
            count //= 2
        affordable = int(_FEWER_STEPS / (fixed + count * each))
        return cls(count, min(_STEPS, max(1, affordable)), min(4096, max(256, count)))

    @property
    def is_cut_short(self) -> bool:
        """Whether the climbs have fewer steps than they want."""
        return self.max_steps < _STEPS
