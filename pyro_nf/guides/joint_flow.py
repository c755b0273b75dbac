"""The flow over all latents of a guide: its parts by name, and the names that they once had."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from pyro_nf.flows.base import Base
from pyro_nf.flows.flow import Flow
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.guides.layers import affine_base
from pyro_nf.guides.recentre import Recentre
from pyro_nf.search.gaussians import MAX_FULL_DIM
from pyro_nf.search.mixtures import whitened
from pyro_nf.search.start import GaussianStart
from pyro_nf.transforms.affine import FixedAffine, LowerAffine
from pyro_nf.transforms.base import Chain, FlowTransform

T = TypeVar("T")

PARTS = ("flow", "affine", "coordinates", "recentring")
"""The names of the parts, in the order in which they are applied."""

FIXED_PARTS = ("coordinates", "recentring")
"""Those that do not learn."""


class LatentMap(Chain):
    r"""The map from the base to the unconstrained latents, with a name for each part.

    .. math:: z = R(m_0 + L_0 (m + L f(\epsilon)))

    Args:
        flow: f, which learns.
        affine: :math:`m + L \, \cdot`, which learns.
        coordinates: :math:`m_0 + L_0 \, \cdot`, the coordinates that learning happens in.
        recentring: R, which places hierarchical sites by their priors; None for no such map.
    """

    flow: FlowTransform
    affine: FlowTransform
    coordinates: FixedAffine
    recentring: Recentre | None

    def __init__(
        self,
        flow: FlowTransform,
        affine: FlowTransform,
        coordinates: FixedAffine,
        recentring: Recentre | None = None,
    ) -> None:
        last = [] if recentring is None else [recentring]
        super().__init__([flow, affine, coordinates, *last])
        del self._modules["parts"]  # the children are known by name here, not by number
        self.flow, self.affine, self.coordinates = flow, affine, coordinates
        self.recentring = recentring

    @property
    def parts(self) -> list[FlowTransform]:  # type: ignore[override]
        """The parts in the order in which they are applied."""
        last = [] if self.recentring is None else [self.recentring]
        return [self.flow, self.affine, self.coordinates, *last]


class JointFlow(Flow):
    """The flow over all latents of a guide.

    Args:
        parts: The map from the base to the unconstrained latents.
        base: Makes the base distribution; standard normals by default.
    """

    transform: LatentMap

    def __init__(self, parts: LatentMap, base: Base | None = None) -> None:
        super().__init__(parts, base)

    def with_flow(self, flow: FlowTransform) -> JointFlow:
        """With other layers f, and everything else as it is.

        Args:
            flow: f.
        """
        own = self.transform
        return JointFlow(LatentMap(flow, own.affine, own.coordinates, own.recentring), self.base)

    def with_recentring(self, recentring: Recentre | None) -> JointFlow:
        """With another last map, and everything else as it is.

        Args:
            recentring: R, or None for none.
        """
        own = self.transform
        return JointFlow(LatentMap(own.flow, own.affine, own.coordinates, recentring), self.base)

    def affine_flow(self) -> Flow:
        """The affine part alone, in the coordinates before the recentring: a Gaussian."""
        return Flow(Chain([self.transform.affine, self.transform.coordinates]), self.base)

    def start_at(self, start: GaussianStart | GaussianMixture) -> None:
        """Puts the coordinates, and the law in them, at a Gaussian or a mixture.

        Args:
            start: It; a mixture has as many components as the base.
        """
        if isinstance(start, GaussianMixture):
            start, mixture = whitened(start)
            self.base.load_state_dict(mixture.state_dict())
        if len(start.loc) <= MAX_FULL_DIM:
            start = replace(start, scale=start.scale_tril)
        affine, coordinates = affine_base(start).parts
        self.transform.affine.load_state_dict(affine.state_dict())
        self.transform.coordinates.load_state_dict(coordinates.state_dict())

    def fixed_tensors(self) -> dict[str, Tensor]:
        """The buffers of the parts that do not learn, by their names in the flow."""
        starts = tuple(f"transform.{part}." for part in FIXED_PARTS)
        return {name: b for name, b in self.named_buffers() if name.startswith(starts)}

    def renewed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().renewed(with_part_names(tensors))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Takes states of version 0.1 too."""
        renamed = with_part_names(state_dict, prefix)
        state_dict.clear()
        state_dict.update(renamed)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def joint_flow(
    made: Flow | FlowTransform, loc: Tensor, init_scale: float, count_components: int
) -> JointFlow:
    """The flow of a guide that has no start yet.

    Args:
        made: f, with a base of its own if it is a Flow.
        loc: Where it lies, ``(D,)``; dtype and device follow it.
        init_scale: Its scale there.
        count_components: Components of the base, if there are to be more than one.

    Raises:
        TypeError: If f is something else.
        ValueError: If f has another dimension or wants a context.
    """
    dim = len(loc)
    f, base = (made.transform_in_units(), made.base) if isinstance(made, Flow) else (made, None)
    if not isinstance(f, FlowTransform):
        raise TypeError(
            "AutoFlow: flow(latent_dim) must return a Flow or a FlowTransform, got "
            f"{type(made).__name__}."
        )
    if f.context_dim or f.input_dim not in (None, dim):
        raise ValueError(
            f"AutoFlow: the model has {dim} unconstrained coordinates and no context, but the "
            f"flow has input_dim {f.input_dim} and context_dim {f.context_dim}."
        )
    unit = torch.ones_like(loc)
    scale = unit.diag_embed() if dim <= MAX_FULL_DIM else unit
    affine, coordinates = affine_base(GaussianStart(loc, scale, elbo=math.nan)).parts
    nn.init.constant_(cast("LowerAffine", affine).log_diagonal, math.log(init_scale))
    if count_components > 1:
        base = GaussianMixture(dim, count_components)
    parts = LatentMap(f, cast(FlowTransform, affine), cast(FixedAffine, coordinates))
    return JointFlow(parts, base).to(loc)


def with_part_names(tensors: Mapping[str, T], prefix: str = "") -> dict[str, T]:
    """What belongs to a guide's flow, by its names of now.

    Version 0.1 numbered the parts: ``transform.parts.2.loc`` is ``transform.coordinates.loc``.

    Args:
        tensors: By their names of now or of then.
        prefix: What comes before the name of the flow's own in each of them; other names stay.

    Example:
        >>> with_part_names({"flow.transform.parts.0.parts.1.value": 1, "x": 2}, "flow.")
        {'flow.transform.flow.parts.1.value': 1, 'x': 2}
    """
    numbered = re.compile(rf"{re.escape(prefix)}transform\.parts\.([0-3])\.")

    def of_now(match: re.Match[str]) -> str:
        return f"{prefix}transform.{PARTS[int(match[1])]}."

    return {numbered.sub(of_now, n, 1) if numbered.match(n) else n: t for n, t in tensors.items()}


def has_part(names: Iterable[str], part: str, prefix: str = "") -> bool:
    """Whether names of now have something of a part.

    Args:
        names: Of tensors.
        part: One of :data:`PARTS`.
        prefix: What comes before the name of the flow's own.
    """
    return any(name.startswith(f"{prefix}transform.{part}.") for name in names)


def modules_of_old(flow: JointFlow) -> list[tuple[str, str]]:
    """The modules of a flow, name and class, as version 0.1 made it of the same parts.

    Args:
        flow: The flow.
    """
    own = flow.transform
    last = [] if own.recentring is None else [own.recentring]
    old: nn.Module = Flow(Chain([own.flow, own.affine, own.coordinates, *last]), flow.base)
    return [(name, type(part).__name__) for name, part in old.named_modules()]
