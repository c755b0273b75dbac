"""Draws of several sites, entry by entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def entries(samples: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every entry of every site by its name: the site, with the index if the site is no scalar.

    Args:
        samples: Draws of each site, ``(S, *shape)``.

    Yields:
        A name and the draws of that entry, ``(S,)``, on the CPU and without a graph.

    Example:
        >>> import torch
        >>> [name for name, _ in entries({"a": torch.zeros(5), "b": torch.zeros(5, 2)})]
        ['a', 'b[0]', 'b[1]']
    """
    for name, draws in samples.items():
        flat = draws.detach().cpu().reshape(len(draws), draws.shape[1:].numel())
        for i, column in enumerate(flat.unbind(1)):
            index = torch.unravel_index(torch.tensor(i), draws.shape[1:]) if draws.dim() > 1 else ()
            yield name + (f"[{','.join(str(int(k)) for k in index)}]" if index else ""), column
