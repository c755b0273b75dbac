"""Recordings of a log density and its gradient, one for each size of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_nf.ops.recording import fold_constants, process_seconds, simplify
from pyro_nf.sites.substitute import SafeLinalg, fast_pyro

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]

#: Recording costs about this many evaluations; it predicts whether a recording can meet its limit.
#: (Measured: 110 on eight schools, 340 on an unrolled time series of 200 steps.)
RECORDING_COST = 300.0


class Recordings:
    """The recorded operations of a log density and its gradient, by the size of the batch.

    A recording holds for one size and one dtype. On eight schools with 64 particles a replay takes
    about a third of the time of the model and autograd.
    """

    def __init__(self) -> None:
        self._replays: dict[tuple[int, torch.dtype], ValueAndGrad] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"_replays": {}}  # graphs can hardly be pickled, and are made again

    def has(self, batch_size: int, dtype: torch.dtype) -> bool:
        """Whether there is one for batches of this size."""
        return (batch_size, dtype) in self._replays

    def find(self, z: Tensor) -> ValueAndGrad | None:
        """The replay for batches like z (S, D), if there is one."""
        return self._replays.get((len(z), z.dtype)) if self._replays else None

    def make(
        self,
        operations: Callable[[Tensor], Tensor],
        value_and_grad: ValueAndGrad,
        points: tuple[Tensor, Tensor],
        *,
        max_seconds: float | None,
        clock: Callable[[], float],
        compile: bool,
        if_faster: bool,
    ) -> bool:
        """Makes a recording, and keeps it if it gives what the density gives, and faster.

        Args:
            operations: The log density (S,) of z (S, D), to be recorded.
            value_and_grad: The density itself, to compare with.
            points: z (S, D) to record at, and others to compare at.
            max_seconds: Give up when recording takes longer, or is expected to; None for never.
            clock: What the seconds are counted with.
            compile: Whether `torch.compile` shall fuse the recording.
            if_faster: Whether it is kept only if it is the faster by a clock.

        Returns:
            Whether it is kept.
        """
        if max_seconds is not None and max_seconds <= 0:
            return False
        z, other = points
        start = clock()
        value_and_grad(z)
        if max_seconds is not None and RECORDING_COST * (clock() - start) > max_seconds:
            return False
        deadline = None if max_seconds is None else clock() + max_seconds
        try:
            replay = _recorded(operations, z, SafeLinalg(deadline, clock))
            # What the recording took for a constant shows at another point.
            if not _agree(replay(other), value_and_grad(other)):
                return False
        except Exception:  # a model that cannot be recorded is evaluated as it is
            return False
        # A long unrolled loop replays no faster than autograd's own engine runs it.
        if (
            if_faster
            and not compile
            and process_seconds(lambda: replay(other))
            > process_seconds(lambda: value_and_grad(other))
        ):
            return False
        self._replays[len(z), z.dtype] = torch.compile(replay) if compile else replay
        return True


def _recorded(
    operations: Callable[[Tensor], Tensor], z: Tensor, mode: SafeLinalg
) -> torch.fx.GraphModule:
    """The operations of a log density and its gradient at z, without those that change nothing."""

    def both(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            value = operations(z)
            (grad,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), grad

    with fast_pyro(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mode:
            graph = make_fx(both)(z)
    fold_constants(graph)
    simplify(graph, z)
    return graph


def _agree(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    """Whether a recording gives what a density gives, wherever that is finite."""
    (value, grad), (log_prob, slope) = got, wanted
    finite = torch.isfinite(log_prob)
    close = torch.isclose(value, log_prob, rtol=1e-4, atol=1e-4) | ~finite
    ok = (torch.isfinite(grad).all(-1) & torch.isfinite(value)).unsqueeze(-1)
    alike = torch.isclose(torch.where(ok, grad, 0.0), slope, rtol=1e-2, atol=1e-2)
    return bool(close.all() and alike.all())
