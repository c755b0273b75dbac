"""What a log-determinant or a log density is worth: exact, an estimate, or a bound."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

LadjKind = Literal["exact", "estimate"]
LogProbKind = Literal["exact", "estimate", "bound"]

_FROM_BEST = ("exact", "estimate", "bound")
_IN_WORDS = {
    "estimate": "an estimate, right on average but another number at each call",
    "bound": "a bound, below the log density on average and another number at each call",
}


def weakest(kinds: Iterable[LogProbKind]) -> LogProbKind:
    """The kind of a sum whose summands are of these kinds; exact if there is none.

    Args:
        kinds: Each of them "exact", "estimate" or "bound".

    Example:
        >>> weakest(["exact", "bound", "estimate"]), weakest([])
        ('bound', 'exact')
    """
    return cast(LogProbKind, _FROM_BEST[max(map(_FROM_BEST.index, kinds), default=0)])


def in_words(kind: LogProbKind) -> str:
    """What a ``log_prob`` of this kind is; "" if it is exact.

    Example:
        >>> in_words("bound")
        'a bound, below the log density on average and another number at each call'
    """
    return _IN_WORDS.get(kind, "")


def check_exact(owner: str, name: str, value: object, do: str) -> None:
    """Raises if the ``log_prob`` of a distribution says that it is an estimate or a bound.

    Args:
        owner: Who asks.
        name: What it calls the distribution.
        value: The distribution; one that does not say what it is counts as exact.
        do: What to do instead.

    Raises:
        TypeError: If it is not exact.
    """
    kind: LogProbKind = getattr(value, "log_prob_kind", "exact")
    if kind != "exact":
        raise TypeError(
            f"{owner}: {name} must have an exact log_prob, got {in_words(kind)} "
            f"(log_prob_kind = {kind!r}); {do}."
        )
