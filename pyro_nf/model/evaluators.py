"""The ways to evaluate a model on a batch of points, and the check of each against single runs."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_nf.model.density import Kind
from pyro_nf.model.runs import ModelRun
from pyro_nf.ops.recording import copy_out
from pyro_nf.sites.substitute import LinAlgError, SafeLinalg, fast_pyro

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor])


class Evaluator(ABC):
    """The log density of a batch of points, by runs of a model.

    Args:
        run: The log density of one point (D,), or of a batch if the model broadcasts.
        is_pure: Whether a run is a function of the point alone: no random numbers, no parameters.
    """

    kind: ClassVar[Kind]

    def __init__(self, run: ModelRun, is_pure: bool = True) -> None:
        self.run, self.is_pure = run, is_pure

    def __call__(self, z: Tensor) -> Tensor:
        """log p (S,) of z (S, D); raises what the model raises."""
        return self.over(self.run.log_prob, z)

    @abstractmethod
    def over(self, function: Callable[[Tensor], Result], z: Tensor) -> Result:
        """A function of one point that runs the model, for all points of a batch.

        Args:
            function: (D,) -> tensors.
            z: (S, D).
        """

    def of(self, run: ModelRun) -> Evaluator:
        """The same way for another run of the model."""
        return type(self)(run, self.is_pure)

    def robust(self, z: Tensor) -> Tensor:
        """As a call, but a factorisation that fails fails for its own point only."""
        with fast_pyro():
            try:
                return self(z)
            except LinAlgError:
                pass
            try:
                with SafeLinalg():
                    return self(z)
            except LinAlgError:
                return Loop(self.run)(z)

    def disagreement(self, z: Tensor, wanted: Tensor, state: Tensor) -> str:
        """What is wrong with the value of a batch, or "".

        Args:
            z: The batch (S, D).
            wanted: The values by single runs, of the first points at least.
            state: Of the random numbers before each single run.
        """
        self.run.last_site = ""
        torch.set_rng_state(state)
        try:
            with torch.no_grad(), fast_pyro(), SafeLinalg():
                got = self(z)
        except Exception as error:  # whatever a user's model raises
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return f"at site {self.run.last_site!r}: {lines[0].split('. ')[0][:160]}"
        if got.shape != z.shape[:1]:
            return f"log density of shape {tuple(got.shape)}, not {tuple(z.shape[:1])}"
        got = got[: len(wanted)]
        finite = torch.isfinite(wanted)
        # A wrong broadcast is an error of order one; rounding is far below this.
        tolerance = 1e3 * torch.finfo(z.dtype).eps * (1 + wanted.abs())
        wrong = torch.where(finite, (got - wanted).abs() > tolerance, torch.isfinite(got))
        if wrong.logical_or(finite & ~torch.isfinite(got)).any():
            i = int((got - wanted).abs().nan_to_num().argmax())
            return f"log density {float(got[i]):.6g} where a single run has {float(wanted[i]):.6g}"
        return ""


class Batched(Evaluator):
    """One run for all points, in an extra dimension to the left of all plates."""

    kind: ClassVar[Kind] = "batched"

    def over(self, function: Callable[[Tensor], Result], z: Tensor) -> Result:
        return function(z)


class Vmap(Evaluator):
    """One run under `torch.func.vmap`, for models whose operations mix batch dimensions."""

    kind: ClassVar[Kind] = "vmap"

    def over(self, function: Callable[[Tensor], Result], z: Tensor) -> Result:
        result: Result = torch.func.vmap(function, randomness="same")(z)
        return result


class RecordedVmap(Vmap):
    """`vmap` of one recorded run, in which writes in place (err[t] = ...) are none any more.

    `vmap` cannot write a point's value into a tensor that all points share.
    """

    kind: ClassVar[Kind] = "recorded vmap"

    def __init__(self, run: ModelRun, is_pure: bool = True) -> None:
        super().__init__(run, is_pure)
        self._recorded: torch.fx.GraphModule | None = None

    def __call__(self, z: Tensor) -> Tensor:
        if self._recorded is None:
            if not self.is_pure:
                raise RuntimeError("it writes in place")

            def single(z: Tensor) -> Tensor:
                value: Tensor = torch.func.functionalize(self.run.log_prob)(z)
                return value

            decompositions = {torch.ops.aten.copy.default: copy_out}
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._recorded = make_fx(single, decomposition_table=decompositions)(z[0].detach())
        value: Tensor = torch.func.vmap(self._recorded)(z)
        return value


class Loop(Evaluator):
    """A run for each point."""

    kind: ClassVar[Kind] = "loop"

    def __call__(self, z: Tensor) -> Tensor:
        return torch.stack([self.single(zi) for zi in z]) if len(z) else z.new_zeros(0)

    def over(self, function: Callable[[Tensor], Result], z: Tensor) -> Result:
        results: Any = [function(zi) for zi in z]
        if isinstance(results[0], Tensor):
            stacked: Any = torch.stack(results)
        else:
            stacked = tuple(map(torch.stack, zip(*results, strict=True)))
        return cast("Result", stacked)

    def single(self, z: Tensor) -> Tensor:
        """log p () of one point (D,); -inf where the numbers of the model fail."""
        try:
            return self.run.log_prob(z)
        except LinAlgError:
            return z.new_full((), -torch.inf)


def choose_evaluator(
    run: ModelRun,
    is_pure: bool,
    z: Tensor,
    wanted: Tensor,
    state: Tensor,
    is_late: Callable[[], bool] = lambda: False,
) -> tuple[Evaluator, str]:
    """The fastest way that agrees with single runs, and what is wrong with those before it.

    Args:
        run: The log density by a run of the model.
        is_pure: Whether it is a function of the point alone.
        z: A batch of points (S, D).
        wanted: The log densities of the first of them by single runs.
        state: Of the random numbers before each single run.
        is_late: Whether there is no time to try another way than the first.
    """
    reasons = list[str]()
    for way in (Batched, Vmap, RecordedVmap):
        if reasons and is_late():
            reasons.append(f"{way.kind}: there is no time to try")
            break
        evaluator = way(run, is_pure)
        problem = evaluator.disagreement(z, wanted, state)
        if not problem:
            return evaluator, "; ".join(reasons)
        reasons.append(f"{way.kind}: {problem}")
    return Loop(run, is_pure), "; ".join(reasons)
