"""The innermost loops of an autoregressive inverse, compiled by numba: the extra ``fast``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pyro_nf.nn.masked import MaskedNet
from pyro_nf.nn.triangular import Leaf, Link
from pyro_nf.ops.gradients import by_hand
from pyro_nf.univariate.affine import Affine
from pyro_nf.univariate.base import UnivariateMap

# So many points at a time: few enough that their sums stay in the cache, and enough for long loops.
POINTS = 1024


def compiled_leaf(
    univariate: UnivariateMap, inverse: bool, net: MaskedNet, v: Tensor
) -> Leaf | None:
    """Compiles the leaves of :func:`pyro_nf.nn.triangular.solve` where numba is installed.

    Only on a CPU, and for shift and scale by a network of ReLUs without skips. The first use takes
    some seconds to compile; numba keeps the result on disk.

    Args:
        univariate: The map.
        inverse: Which direction of it is wanted.
        net: The network of its parameters.
        v: The points.

    Returns:
        What computes a leaf; None if it must be done by torch.

    Example:
        >>> leaf = compiled_leaf(Affine(), False, MaskedNet(5, 2), torch.zeros(7, 5))
        >>> (leaf is None) == (find_spec("numba") is None)
        True
    """
    first, *_ = net.layers  # quicker than an index
    weight = cast(Tensor, first.weight)
    if not (
        type(univariate) is Affine
        and net.rectified
        and v.device.type == weight.device.type == "cpu"
        and v.dtype == weight.dtype
        and v.dtype in (torch.float, torch.double)
        and by_hand()  # tracers and torch.func do not see what numba does
    ):
        return None
    kernel = _compiled()
    return kernel and partial(_leaf, kernel, inverse, univariate.max_log_scale)


@cache
def _compiled() -> Callable[..., None] | None:
    """:func:`_substitute`, compiled when it is called; None without numba."""
    if find_spec("numba") is None:
        return None
    import numba

    # Products may be added in any order, but nan stays nan.
    compiled = partial(numba.njit, nogil=True, fastmath={"contract", "reassoc"})
    try:
        return compiled(cache=True)(_substitute)
    except RuntimeError:  # there is no folder to write to
        return compiled()(_substitute)


def _leaf(
    kernel: Callable[..., None],
    inverse: bool,
    bound: float,
    ladj: Tensor,
    ring: Sequence[Link],
    first: int,
    last: int,
) -> None:
    weights = tuple([link.weight.detach().numpy() for link in ring])
    sums = tuple([link.sums.numpy() for link in ring])
    z = ring[-1].values.numpy()
    groups = [ring[-1].value_groups, *[link.sum_groups for link in ring]]
    ends = np.array([group.ends[first : last + 1] for group in groups])
    bound = z.dtype.type(bound)  # or all would be computed in its precision
    run = partial(kernel, weights, sums, z, ladj.numpy(), ends, inverse, bound)
    starts = range(0, len(ladj), POINTS)
    threads = min(len(starts), torch.get_num_threads())
    if threads < 2:
        for start in starts:
            run(start)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, starts))


def _substitute(
    weights: Any, sums: Any, z: Any, ladj: Any, ends: Any, inverse: bool, bound: Any, start: int
) -> None:
    r"""Computes :math:`s_1, \dots, s_L, \theta, z` of the leaf, group by group; is compiled.

    ``z`` is given as ``v``; values take the place of what they are computed from. ``ends`` says
    where the groups begin and end, first those of ``z``, then those of the sums of each link.
    """
    points = slice(start, min(start + POINTS, len(ladj)))
    for i in range(ends.shape[1] - 1):
        for k in range(len(weights)):
            before = sums[k - 1] if k else z
            # Units see those of their own group too, coordinates only those of earlier ones.
            first, last = ends[k, 0], ends[k, i + 1] if k else ends[k, i]
            for row in range(ends[k + 1, i], ends[k + 1, i + 1]):
                s, w = sums[k][row, points], weights[k][row]
                # Four products at a time: s is read and written a quarter as often.
                for c in range(first, last - 3, 4):
                    w_0, w_1, w_2, w_3 = w[c], w[c + 1], w[c + 2], w[c + 3]
                    a_0, a_1 = before[c, points], before[c + 1, points]
                    a_2, a_3 = before[c + 2, points], before[c + 3, points]
                    for n in range(len(s)):
                        s[n] += w_0 * a_0[n] + w_1 * a_1[n] + w_2 * a_2[n] + w_3 * a_3[n]
                for c in range(last - (last - first) % 4, last):
                    w_0, a_0 = w[c], before[c, points]
                    for n in range(len(s)):
                        s[n] += w_0 * a_0[n]
                if k < len(weights) - 1:
                    for n in range(len(s)):
                        if s[n] < 0:
                            s[n] = 0
        t, s = sums[-1][ends[-1, i], points], sums[-1][ends[-1, i] + 1, points]
        z_i, ladj_i = z[ends[0, i], points], ladj[points]
        for n in range(len(s)):
            if s[n] < -bound:
                s[n] = -bound
            if s[n] > bound:
                s[n] = bound
            if inverse:
                z_i[n] = (z_i[n] - t[n]) * math.exp(-s[n])
                ladj_i[n] -= s[n]
            else:
                z_i[n] = t[n] + z_i[n] * math.exp(s[n])
                ladj_i[n] += s[n]
