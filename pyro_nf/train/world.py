"""The processes that take part in a fit, and how they come to one verdict."""

from __future__ import annotations

import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_nf.train.budget import Clock, OutOfTime

T = TypeVar("T")

ANSWER_SECONDS = 600.0
"""A process that does not answer for so long counts as lost. One that has ended is noticed at
once."""

SEARCH_SECONDS = 7 * 86_400.0
"""So long the others wait while the first one searches for a start."""

SECOND_SIGNAL_SECONDS = 1.0
"""A launcher hands on the Ctrl-C that its processes have had already; a second one that is meant
comes later."""

SEED_STEP = 1_000_003
"""Difference of the seeds of two neighbours."""


class PeerLost(RuntimeError):
    """Another process of the fit has ended, or does not answer."""


class Signals:
    """Ctrl-C and the signal to terminate, put off until all processes can hear of them.

    Attributes:
        interrupted: Whether Ctrl-C was pressed.
        terminated: Whether the process was told to end.
        is_attended_to: Whether the processes have come to their verdict on it.
        first: When the first one came, by the monotonic clock.
    """

    def __init__(self) -> None:
        self.interrupted = self.terminated = self.is_attended_to = False
        self.first = 0.0

    @property
    def came(self) -> bool:
        """Whether the fit shall end."""
        return self.interrupted or self.terminated

    def note(self, number: int, frame: FrameType | None) -> None:
        """What the signal calls.

        Raises:
            KeyboardInterrupt: If it is a second one.
        """
        now = time.monotonic()
        if self.came and now > self.first + SECOND_SIGNAL_SECONDS:
            raise KeyboardInterrupt
        if not self.came:
            self.first = now
        self.interrupted |= number == signal.SIGINT
        self.terminated |= number == signal.SIGTERM


@contextmanager
def signals_put_off() -> Iterator[Signals]:
    """Signals are noted inside. On leaving they do what they would have done, unless it was done.

    Inside of another such block, and in a thread that gets no signals, nothing changes.
    """
    outer = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    if isinstance(outer, Signals):
        yield outer
        return
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signals.note) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if signals.terminated:
        signal.raise_signal(signal.SIGTERM)
    elif signals.interrupted and not signals.is_attended_to:
        raise KeyboardInterrupt


class World:
    """The processes of ``torch.distributed``, or this process alone.

    All processes call the same methods in the same order; what decides how a fit goes on is the
    same in each of them afterwards. Alone, each method costs nothing.

    Args:
        rank: The number of this process.
        size: How many there are.
        group: Over which they talk.
        inside: What is left when the fit ends.

    Example:
        >>> with World.joined() as world:
        ...     print(world.rank, world.size, world.together(lambda: 2 + 2))
        0 1 4
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        group: dist.ProcessGroup | None = None,
        inside: ExitStack | None = None,
    ) -> None:
        self.rank, self.size, self.group = rank, size, group
        self.signals, self._inside = Signals(), inside

    @classmethod
    @contextmanager
    def joined(cls, seconds: float = ANSWER_SECONDS, is_led: bool = False) -> Iterator[World]:
        """The processes that ``torch.distributed`` knows; this one alone if it is not initialised.

        Args:
            seconds: How long one waits for another.
            is_led: Whether the first process works while the others wait for what it says. Then it
                hears signals at once; else all put them off until all can hear of them.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            yield cls()
            return
        with _answers():
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
        rank, size = dist.get_rank(), dist.get_world_size()
        try:
            with ExitStack() as inside:
                world = cls(rank, size, group, inside)
                if not (is_led and world.is_first):
                    world.attend()
                yield world
        finally:
            if dist.is_initialized():
                dist.destroy_process_group(group)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def attentive(self) -> AbstractContextManager[Any]:
        """Signals are put off inside, so that no process leaves the others alone."""
        return nullcontext() if self.size == 1 else signals_put_off()

    def attend(self) -> None:
        """From now on signals are put off, so that no process leaves the others alone."""
        if self._inside is not None:
            self.signals = self._inside.enter_context(signals_put_off())

    # ---- one verdict

    def together(self, work: Callable[[], T]) -> T:
        """Do what all processes do; where it fails in one, it fails in all.

        Args:
            work: What this process does.

        Raises:
            KeyboardInterrupt: If any was interrupted.
            OutOfTime: If it takes too long in any.
            RuntimeError: If another failed; where it failed, its own error.
        """
        return self.counted(lambda: (work(), ()), 0)[0]

    def counted(
        self, work: Callable[[], tuple[T, Sequence[float]]], count: int
    ) -> tuple[T, list[float]]:
        """As :meth:`together`, for work that also returns numbers, of which all get the sums.

        Args:
            work: What this process does.
            count: How many numbers it returns.
        """
        if self.size == 1:
            result, numbers = work()
            return result, list(numbers)
        error: BaseException | None = None
        numbers = [0.0] * count
        try:
            result, numbers = work()
        except PeerLost:
            raise
        except BaseException as caught:
            error = caught
        sums = self._sums([*self._complaints(error), *numbers])
        self._raise(error, *sums[:3])
        return result, sums[3:]

    def _complaints(self, error: BaseException | None) -> list[float]:
        """Whether this process failed, was interrupted, or has no more time."""
        came = self.signals.came and not self.signals.is_attended_to
        stops = isinstance(error, KeyboardInterrupt) or came
        late = isinstance(error, OutOfTime)
        failed = error is not None and not isinstance(error, (KeyboardInterrupt, OutOfTime))
        return [float(failed), float(stops), float(late)]

    def _raise(self, error: BaseException | None, failed: float, stops: float, late: float) -> None:
        if failed:
            known = error is None or isinstance(error, (KeyboardInterrupt, OutOfTime))
            words = self.gather(None if known else f"{type(error).__name__}: {error}")
            if error is not None and not known:
                raise error
            rank, what = next((i, word) for i, word in enumerate(words) if word is not None)
            raise RuntimeError(f"train: the process of rank {rank} failed with {what}")
        if stops:
            self.signals.is_attended_to = True
            raise KeyboardInterrupt
        if late:
            raise OutOfTime

    def mean(self, value: float) -> float:
        """The mean over the processes, the same to the bit in each."""
        return value if self.size == 1 else self._sums([value])[0] / self.size

    def _sums(self, numbers: Sequence[float]) -> list[float]:
        sums = torch.tensor(numbers, dtype=torch.float64)
        with _answers():
            dist.all_reduce(sums, group=self.group)
        return [float(x) for x in sums]

    # ---- what is the same for all

    def share(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all of them; if that fails, it fails in all.

        Args:
            make: Makes it; what it holds must be on the CPU.
        """
        if self.size == 1:
            return make()
        made: Any = None
        packed, error = b"", None
        if self.is_first:
            try:
                made = make()
                packed = pickle.dumps(made)
            except BaseException as caught:
                error = caught
        box = [(packed, _portable(error))]
        with _answers():
            dist.broadcast_object_list(box, src=0, group=self.group)
        packed, failure = box[0]
        failure = failure if error is None else error
        if failure is not None:
            raise failure
        return made if self.is_first else pickle.loads(packed)

    def gather(self, value: T) -> list[T]:
        """What each process has, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _answers():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def same_as_first(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the numbers that they have in the first process."""
        mine = list(tensors)
        if self.size > 1 and mine:
            theirs = self.share(lambda: [tensor.detach().cpu() for tensor in mine])
            for tensor, numbers in zip(mine, theirs, strict=True):
                tensor.detach().copy_(numbers)

    def clock(self, clock: Clock) -> Clock:
        """A clock that shows to all what it shows to the first process.

        Args:
            clock: That of this process.
        """
        if self.size == 1:
            return clock

        def of_the_first() -> float:
            reading = torch.tensor(clock() if self.is_first else 0.0, dtype=torch.float64)
            with _answers():
                dist.broadcast(reading, src=0, group=self.group)
            return reading.item()

        return of_the_first

    # ---- what is each one's own

    def seed(self, seed: int) -> int:
        """A seed of this process's own; that of the first is the seed itself."""
        return seed if self.is_first else (seed + SEED_STEP * self.rank) % 2**63

    def parallel(
        self, function: Callable[..., Tensor], parameters: Iterable[Tensor]
    ) -> Callable[..., Tensor]:
        """A function whose gradients are averaged over the processes.

        Args:
            function: Returns a loss. If it raises, it must do so in all processes.
            parameters: What is differentiated.

        Raises:
            TypeError: If there are others and one of these is no ``nn.Parameter``.
        """
        if self.size == 1:
            return function
        module = _AsModule(function, parameters)
        group = self.group if all(p.device.type == "cpu" for p in module.parameters()) else None
        with _answers():
            # the stages of a fit learn different parameters, so some are unused in a step
            averaged = DistributedDataParallel(
                module, process_group=group, find_unused_parameters=True
            )

        def call(*args: Any) -> Tensor:
            with _answers():
                return averaged(*args)

        return call

    def backward(self, loss: Tensor) -> None:
        """Differentiate what a parallel function returned."""
        if self.size == 1:
            loss.backward()
        else:
            with _answers():
                loss.backward()


class _AsModule(nn.Module):
    """A function as a module with the parameters that it uses, as DistributedDataParallel wants."""

    def __init__(self, function: Callable[..., Tensor], parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.function = function
        for i, parameter in enumerate(dict.fromkeys(parameters)):
            if not isinstance(parameter, nn.Parameter):
                raise TypeError(
                    "train: with more than one process the optimisers must hold nn.Parameters, "
                    f"got a tensor of shape {tuple(parameter.shape)}; wrap it."
                )
            self.register_parameter(str(i), parameter)

    def forward(self, *args: Any) -> Tensor:
        return self.function(*args)


@contextmanager
def _answers() -> Iterator[None]:
    """What fails inside because another process is not there says so."""
    try:
        yield
    except RuntimeError as error:  # torch has no narrower class for its backends' errors
        if isinstance(error, PeerLost) or not _is_of_the_network(error):
            raise
        raise PeerLost(
            "train: another process of this fit has ended, or does not answer "
            f"({str(error).splitlines()[0]})."
        ) from error


def _is_of_the_network(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _NETWORK)


_NETWORK = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out waiting")


def _portable(error: BaseException | None) -> BaseException | None:
    """An error as another process can take it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
