"""What a log-determinant or a log density is worth: exact, an estimate, or a bound."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

LadjKind = Literal["exact", "estimate"]
LogProbKind = Literal["exact", "estimate", "bound"]

_FROM_BEST = ("exact", "estimate", "bound")
# Where torch's and Pyro's distributions and transforms keep what they are made of.
_PARTS = ("base_dist", "base_transform", "_component_distribution", "component0", "component1")
_LISTS = ("transforms", "parts")
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


def kind_of(law: object) -> LogProbKind:
    """What the ``log_prob`` of a distribution is, and of what it is made of.

    Args:
        law: A distribution. One that says nothing is as good as its base, its components and its
            transforms; one without them counts as exact.

    Example:
        >>> import pyro.distributions as dist
        >>> kind_of(dist.Normal(0.0, 1.0).mask(True))
        'exact'
    """
    said = getattr(law, "log_prob_kind", None) or getattr(law, "ladj_kind", None)
    if said is not None:
        return cast(LogProbKind, said)
    parts = [getattr(law, name, None) for name in _PARTS]
    listed = [part for name in _LISTS for part in getattr(law, name, None) or ()]
    return weakest(kind_of(part) for part in [*parts, *listed] if part is not None)


def check_exact(owner: str, name: str, value: object, do: str) -> None:
    """Raises if the ``log_prob`` of a distribution says that it is an estimate or a bound.

    Args:
        owner: Who asks.
        name: What it calls the distribution.
        value: The distribution.
        do: What to do instead.

    Raises:
        TypeError: If it is not exact.
    """
    kind = kind_of(value)
    if kind != "exact":
        raise TypeError(
            f"{owner}: {name} must have an exact log_prob, got {in_words(kind)} "
            f"(log_prob_kind = {kind!r}); {do}."
        )
