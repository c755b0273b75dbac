"""The flow over all latents of a guide: its parts by name, and the names that they once had."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from pyro_nf._checks import input_dim_of
from pyro_nf.flows.base import Base, DiagonalNormal
from pyro_nf.flows.flow import Flow
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.guides.layers import affine_base
from pyro_nf.guides.recentre import Recentre
from pyro_nf.search.gaussians import MAX_FULL_DIM
from pyro_nf.search.mixtures import whitened
from pyro_nf.search.start import GaussianStart
from pyro_nf.transforms.affine import FixedAffine, LowerAffine
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.chain import Chain
from pyro_nf.transforms.stochastic import StochasticTransform
from pyro_nf.transforms.stochastic_chain import StochasticChain, chained

T = TypeVar("T")
Layers: TypeAlias = FlowTransform | StochasticTransform

PARTS = ("flow", "affine", "coordinates", "recentring")
"""The names of the parts, in the order in which they are applied."""

FIXED_PARTS = ("coordinates", "recentring")
"""Those that do not learn."""


class _ByName(nn.Module):
    """A chain whose parts are children by name, not by number."""

    flow: Layers
    affine: FlowTransform
    coordinates: FixedAffine
    recentring: Recentre | None

    def __init__(
        self,
        flow: Layers,
        affine: FlowTransform,
        coordinates: FixedAffine,
        recentring: Recentre | None = None,
    ) -> None:
        last = [] if recentring is None else [recentring]
        super().__init__([flow, affine, coordinates, *last])
        del self._modules["parts"]
        self.flow, self.affine, self.coordinates = flow, affine, coordinates
        self.recentring = recentring

    @property
    def parts(self) -> list[Layers]:
        """The parts in the order in which they are applied."""
        last = [] if self.recentring is None else [self.recentring]
        return [self.flow, self.affine, self.coordinates, *last]


class LatentMap(_ByName, Chain):  # type: ignore[misc]
    r"""The map from the base to the unconstrained latents, with a name for each part.

    .. math:: z = R(m_0 + L_0 (m + L f(\epsilon)))

    Args:
        flow: f, which learns.
        affine: :math:`m + L \, \cdot`, which learns.
        coordinates: :math:`m_0 + L_0 \, \cdot`, the coordinates that learning happens in.
        recentring: R, which places hierarchical sites by their priors; None for no such map.
    """


class StochasticLatentMap(_ByName, StochasticChain):  # type: ignore[misc]
    """A :class:`LatentMap` whose layers f draw or lose something.

    Args:
        flow: As there, and so are the others.
        affine: As there.
        coordinates: As there.
        recentring: As there.
    """


def latent_map(
    flow: Layers,
    affine: FlowTransform,
    coordinates: FixedAffine,
    recentring: Recentre | None = None,
) -> LatentMap | StochasticLatentMap:
    """The map of these parts, by the kind of the layers.

    Args:
        flow: f.
        affine: As in :class:`LatentMap`.
        coordinates: As there.
        recentring: As there.
    """
    kind = StochasticLatentMap if isinstance(flow, StochasticTransform) else LatentMap
    return kind(flow, affine, coordinates, recentring)


class JointFlow(Flow):
    """The flow over all latents of a guide.

    Args:
        parts: The map from the base to the unconstrained latents.
        base: Makes the base distribution; standard normals by default.
    """

    transform: LatentMap | StochasticLatentMap

    def __init__(self, parts: LatentMap | StochasticLatentMap, base: Base | None = None) -> None:
        super().__init__(parts, base)

    def with_flow(self, flow: Layers) -> JointFlow:
        """With other layers f, and everything else as it is.

        Args:
            flow: f.
        """
        own = self.transform
        return JointFlow(latent_map(flow, own.affine, own.coordinates, own.recentring), self.base)

    def with_recentring(self, recentring: Recentre | None) -> JointFlow:
        """With another last map, and everything else as it is.

        Args:
            recentring: R, or None for none.
        """
        own = self.transform
        return JointFlow(latent_map(own.flow, own.affine, own.coordinates, recentring), self.base)

    def affine_flow(self) -> Flow:
        """The affine part alone, in the coordinates before the recentring: a Gaussian."""
        gaussian, base = Chain([self.transform.affine, self.transform.coordinates]), self.base
        if base.event_shape != self.event_shape:  # layers that add or drop coordinates
            base = DiagonalNormal(self.event_shape).to(self.transform.coordinates.loc)
        return Flow(gaussian, base)

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
    made: Flow | Layers, loc: Tensor, init_scale: float, count_components: int
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
    if not isinstance(f, (FlowTransform, StochasticTransform)):
        raise TypeError(
            "AutoFlow: flow(latent_dim) must return a Flow or a FlowTransform, or a "
            f"StochasticTransform; got {type(made).__name__}."
        )
    if f.context_dim or f.output_shape not in (None, loc.shape):
        raise ValueError(
            f"AutoFlow: the model has {dim} unconstrained coordinates and no context, but the "
            f"flow has input_dim {input_dim_of(f.output_shape)} and context_dim {f.context_dim}."
        )
    unit = torch.ones_like(loc)
    scale = unit.diag_embed() if dim <= MAX_FULL_DIM else unit
    affine, coordinates = affine_base(GaussianStart(loc, scale, elbo=math.nan)).parts
    nn.init.constant_(cast("LowerAffine", affine).log_diagonal, math.log(init_scale))
    if count_components > 1:
        base = GaussianMixture(dim, count_components)
    parts = latent_map(f, cast(FlowTransform, affine), cast(FixedAffine, coordinates))
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
    old: nn.Module = Flow(chained([own.flow, own.affine, own.coordinates, *last]), flow.base)
    return [(name, type(part).__name__) for name, part in old.named_modules()]
