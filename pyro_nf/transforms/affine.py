"""Affine maps of the whole event: the Gaussian part of a posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nf._checks import check_count, check_finite, check_floating, check_seed
from pyro_nf.transforms.base import FlowTransform


class LowerAffine(FlowTransform):
    r"""A full lower-triangular affine map, :math:`y = m + L x`.

    .. math:: L = \operatorname{diag}(e^s) \, (I + T), \qquad T \text{ strictly lower triangular}

    The ladj is :math:`\sum s`. ``T`` is relative to the scale of its row, so that a step of an
    optimiser changes a narrow coordinate by little. Applied to standard normals it is the full-rank
    Gaussian. Both directions cost :math:`D^2` a point, the inverse by a triangular solve, exact. At
    zero parameters it is the identity.

    *Automatic Differentiation Variational Inference* (Kucukelbir, Tran, Ranganath, Gelman, Blei,
    2017).

    Args:
        input_dim: Size of the event.

    Raises:
        ValueError: If the dimension makes no sense.

    Example:
        >>> import torch
        >>> LowerAffine(2)(torch.tensor([1.0, 2.0])).tolist()
        [1.0, 2.0]
    """

    def __init__(self, input_dim: int) -> None:
        check_count("LowerAffine", "input_dim", input_dim)
        super().__init__(input_dim)
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.log_diagonal = nn.Parameter(torch.zeros(input_dim))
        self.unit_triangle = nn.Parameter(torch.zeros(input_dim, input_dim))

    @property
    def scale_tril(self) -> Tensor:
        """L, shape ``(D, D)``."""
        scale = self.log_diagonal.exp()
        return torch.addcmul(scale.diag(), self.unit_triangle.tril(-1), scale.unsqueeze(-1))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if f"{prefix}triangle" in state_dict:
            mine = {n: t for n, t in state_dict.items() if n.startswith(prefix)}
            del state_dict[f"{prefix}triangle"]
            state_dict.update(with_unit_triangles(mine))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y = self.loc + x @ self.scale_tril.mT
        return y, self.log_diagonal.sum().expand(x.shape[:-1])

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = _solve_rows(self.scale_tril, y - self.loc)
        return x, -self.log_diagonal.sum().expand(y.shape[:-1])

    def _push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        L = self.scale_tril
        y, ladj = self.loc + x @ L.mT, self.log_diagonal.sum().expand(x.shape[:-1])
        return y, ladj, _solve_rows(L.detach().mT, score, upper=True)


def with_unit_triangles(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""The tensors of a state, with the parameters of each :class:`LowerAffine` as they are now.

    Older states have ``triangle``, the strict triangle :math:`A` of ``L`` itself:

    .. math:: T = \operatorname{diag}(e^{-s}) \, A

    Args:
        tensors: The tensors of any module by their names; those of a state of now stay as they are.

    Example:
        >>> import torch
        >>> old = {"log_diagonal": torch.full((2,), 2.0).log(), "triangle": torch.ones(2, 2)}
        >>> with_unit_triangles(old)["unit_triangle"].tolist()
        [[0.0, 0.0], [0.5, 0.0]]
    """
    renamed = dict(tensors)
    for name in tensors:
        stem = name.removesuffix("triangle")
        is_old = name == f"{stem}triangle" and (not stem or stem.endswith("."))
        if is_old and f"{stem}log_diagonal" in tensors:
            s = tensors[f"{stem}log_diagonal"].unsqueeze(-1)
            renamed[f"{stem}unit_triangle"] = renamed.pop(name).tril(-1) * (-s).exp()
    return renamed


class LowRankAffine(FlowTransform):
    r"""An affine map that is full in a learned subspace and diagonal outside of it.

    .. math:: y = m + e^{s} \odot (x + Q (T - I) Q^\top x)

    ``Q (D, r)`` has orthonormal columns (the QR factor of a free matrix) and ``T (r, r)`` is lower
    triangular with the diagonal :math:`e^{t}`. The determinant is :math:`\prod e^s \prod e^t`; the
    inverse has the same form with :math:`T^{-1}`, so both directions cost :math:`D r` a point. At
    zero ``m``, ``s`` and ``T`` it is the identity, whatever the subspace.

    Args:
        input_dim: Size of the event.
        rank: r, at most ``input_dim``.
        seed: Of the subspace at the start.

    Raises:
        ValueError: If a dimension makes no sense.

    Example:
        >>> import torch
        >>> x = torch.randn(5, 100)
        >>> torch.allclose(LowRankAffine(100, 4)(x), x, atol=1e-5)
        True
    """

    def __init__(self, input_dim: int, rank: int = 16, *, seed: int = 0) -> None:
        check_count("LowRankAffine", "input_dim", input_dim)
        super().__init__(input_dim)
        check_count("LowRankAffine", "rank", rank)
        check_seed("LowRankAffine", seed)
        generator = torch.Generator().manual_seed(seed)
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.log_diagonal = nn.Parameter(torch.zeros(input_dim))
        rank = min(rank, input_dim)
        self.subspace = nn.Parameter(torch.randn(input_dim, rank, generator=generator))
        self.log_inner_diagonal = nn.Parameter(torch.zeros(rank))
        self.inner_triangle = nn.Parameter(torch.zeros(rank, rank))

    def _inner(self) -> tuple[Tensor, Tensor, Tensor]:
        Q = torch.linalg.qr(self.subspace)[0]
        T = self.inner_triangle.tril(-1) + self.log_inner_diagonal.exp().diag_embed()
        return Q, T, self.log_diagonal.sum() + self.log_inner_diagonal.sum()

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        Q, T, ladj = self._inner()
        return self._image(x, Q, T), ladj.expand(x.shape[:-1])

    def _image(self, x: Tensor, Q: Tensor, T: Tensor) -> Tensor:
        inside = x @ Q
        return self.loc + self.log_diagonal.exp() * (x + (inside @ T.mT - inside) @ Q.mT)

    def _push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        Q, T, ladj = self._inner()
        y, ladj = self._image(x, Q, T), ladj.expand(x.shape[:-1])
        with torch.no_grad():
            inside = score @ Q
            outside = (_solve_rows(T.mT, inside, upper=True) - inside) @ Q.mT
            return y, ladj, (score + outside) * (-self.log_diagonal).exp()

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        Q, T, ladj = self._inner()
        x = (y - self.loc) * (-self.log_diagonal).exp()
        inside = x @ Q
        return x + (_solve_rows(T, inside) - inside) @ Q.mT, -ladj.expand(y.shape[:-1])


class FixedAffine(FlowTransform):
    r"""A given affine map, :math:`y = m_0 + L_0 x`: the coordinates in which to learn.

    Both directions are exact. It is a buffer: it travels with ``state_dict`` and is not learned.

    Args:
        loc: Shape ``(D,)``, or the shape of any other event.
        scale: Lower triangular ``(D, D)``, or the diagonal, of the shape of ``loc``; the diagonal
            is positive.

    Raises:
        ValueError: If a shape is wrong or the diagonal is not positive.

    Example:
        >>> import torch
        >>> FixedAffine(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 3.0]))(torch.ones(2)).tolist()
        [3.0, 3.0]
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        check_floating("FixedAffine", "loc", loc)
        check_finite("FixedAffine", "loc", loc)
        check_floating("FixedAffine", "scale", scale)
        check_count("FixedAffine", "the number of entries of loc", loc.numel())
        super().__init__(event_shape=loc.shape)
        self.is_diagonal = scale.shape == loc.shape
        if not (self.is_diagonal or (loc.dim() == 1 and scale.shape == loc.shape * 2)):
            raise ValueError(
                f"FixedAffine: scale has shape {tuple(scale.shape)}, but loc has shape "
                f"{tuple(loc.shape)}: pass a diagonal of that shape, or a square matrix for a "
                "vector loc."
            )
        check_finite("FixedAffine", "scale", scale)
        diagonal = scale if self.is_diagonal else scale.diagonal()
        if not bool((diagonal > 0).all()):
            raise ValueError("FixedAffine: the diagonal of scale must be positive.")
        if not self.is_diagonal and bool(scale.triu(1).any()):
            raise ValueError(
                "FixedAffine: scale must be lower triangular, got entries above its diagonal; "
                "take scale.tril(), or the Cholesky factor of a covariance."
            )
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    def _ladj(self) -> Tensor:
        return (self.scale if self.is_diagonal else self.scale.diagonal()).log().sum()

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        scaled = self.scale * x if self.is_diagonal else x @ self.scale.mT
        return self.loc + scaled, self._ladj().expand(x.shape[: x.dim() - self.loc.dim()])

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        centred = y - self.loc
        x = centred / self.scale if self.is_diagonal else _solve_rows(self.scale, centred)
        return x, -self._ladj().expand(y.shape[: y.dim() - self.loc.dim()])

    def _push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj = self._forward_and_ladj(x, context)
        if self.is_diagonal:
            return y, ladj, score / self.scale
        return y, ladj, _solve_rows(self.scale.mT, score, upper=True)


def _solve_rows(T: Tensor, rows: Tensor, *, upper: bool = False) -> Tensor:
    """x (..., D) with T x = row for every row: X T^T = R, solved from the right."""
    flat = rows.reshape(-1, rows.shape[-1])
    x = torch.linalg.solve_triangular(T.mT, flat, upper=not upper, left=False)
    return x.reshape(rows.shape)
