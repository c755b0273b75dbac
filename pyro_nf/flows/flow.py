"""A flow: a Module that makes distributions."""

from __future__ import annotations

import copy
import inspect
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, cast

import torch
from torch import Size, Tensor, nn

from pyro_nf._checks import (
    check_context,
    check_dtype,
    check_embedded,
    check_event_shape,
    check_kind,
    check_path,
    floating_dtype,
    input_dim_of,
    is_count,
    size_of,
)
from pyro_nf._storage import (
    Bounded,
    InvalidFile,
    check_same_dtype,
    check_same_tensors,
    load_tensors,
    plain,
    save_tensors,
)
from pyro_nf.flows.base import Base, DiagonalNormal
from pyro_nf.flows.distribution import FlowDistribution
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.flows.stochastic import StochasticFlowDistribution
from pyro_nf.flows.student import StudentT
from pyro_nf.ops.spaces import describe, is_within
from pyro_nf.transforms.affine import FixedAffine, with_unit_triangles
from pyro_nf.transforms.base import FlowTransform, indented
from pyro_nf.transforms.kinds import LogProbKind, in_words
from pyro_nf.transforms.stochastic import StochasticTransform
from pyro_nf.transforms.stochastic_chain import StochasticChain

P = ParamSpec("P")

_RECIPES: dict[str, Callable[..., Flow]] = {}
_BASES: dict[str, Callable[..., Base]] = {
    base.__name__: base for base in (DiagonalNormal, GaussianMixture, StudentT)
}
_UNITS = ("units", "context_units")
_BOUND_OF_A_LAYER = 5.0  # what the log-scales of a layer were bounded by before stacks shared one
_NOT_BUILT = ("base.", "units.", "context_units.")  # what the arguments of a flow do not decide


def recipe(function: Callable[P, Flow]) -> Callable[P, Flow]:
    """Makes the flows of a function remember how they were built, so that ``Flow.load`` can too.

    The arguments are remembered as JSON gives them back; the integers among them are sizes. A flow
    whose arguments JSON cannot hold, a class of activations for example, remembers nothing: it can
    be saved, and ``Flow.load(path, into=flow)`` reads it.
    """
    signature = inspect.signature(function)
    by_name = all(
        parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        for parameter in signature.parameters.values()
    )

    @wraps(function)
    def build(*args: P.args, **kwargs: P.kwargs) -> Flow:
        flow = function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        try:
            arguments = plain(dict(bound.arguments))
        except TypeError:
            return flow
        flow.recipe = (function.__name__, arguments) if by_name else None
        return flow

    _RECIPES[function.__name__] = build
    return build


class Flow(nn.Module):
    r"""A base distribution and a transform: call it to get a fresh Pyro distribution.

    ``flow()`` or, with ``context_dim > 0``, ``flow(context)``: the batch shape follows the context,
    and the base is expanded to it, so that each context has noise of its own.

    Events have any shape: ``flow().event_shape`` is what the transform makes of the base's. A
    context is a vector of ``context_dim`` numbers; with ``embed`` it is whatever that Module takes,
    images or tokens for example, and the Module makes the vectors. It trains with the flow, and is
    saved with it.

    A fit to data sets two fixed maps, so that the transform :math:`T` learns in coordinates of
    about the unit scale, whatever the units of the data :math:`y` and of the contexts :math:`c`:

    .. math:: y = m + s \, T(x; e(c')), \qquad c = m_c + s_c \, c'

    where :math:`e` is the embedding, if there is one.

    Args:
        transform: The map from base to data, in the units of the data; or layers that draw or lose
            something, a :class:`~pyro_nf.transforms.stochastic.StochasticTransform`.
        base: Makes the base distribution; standard normals by default.
        embed: Makes vectors ``(..., context_dim)`` of contexts; None for contexts that are vectors.

    Attributes:
        units: The map :math:`m + s \, \cdot` of each column of the data, or each channel of images;
            None until a fit sets it.
        context_units: The same of the contexts.
        event_shape: Shape of the data's events.
        input_dim: Its size if these are vectors, else None.

    Raises:
        ValueError: If the shapes of the two differ, or neither names one, or if the base draws
            points that the transform does not take.
        TypeError: If an argument is of another kind.

    Example:
        >>> import torch
        >>> from pyro_nf.transforms.elementwise import Softsign
        >>> flow = Flow(Softsign(), DiagonalNormal(1, scale=3.0))
        >>> y = torch.tensor([[-0.8], [0.0], [0.8]])  # two humps, near -1 and near 1
        >>> [round(density, 2) for density in flow().log_prob(y).exp().tolist()]
        [1.37, 0.13, 1.37]
    """

    def __init__(
        self,
        transform: FlowTransform | StochasticTransform,
        base: Base | None = None,
        *,
        embed: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_kind("Flow", "transform", transform, (FlowTransform, StochasticTransform))
        if base is None:
            if transform.event_shape is None:
                raise ValueError(
                    f"Flow: {type(transform).__name__} maps events of any size; pass a base, for "
                    "example DiagonalNormal(input_dim)."
                )
            base = DiagonalNormal(transform.event_shape)
        check_kind("Flow", "base", base, Base)
        if transform.event_shape not in (None, base.event_shape):
            raise ValueError(
                f"Flow: the transform {type(transform).__name__} takes events of shape "
                f"{tuple(transform.event_shape)}, but the base draws events of shape "
                f"{tuple(base.event_shape)}. Build both with the same input_dim or event_shape."
            )
        check_kind("Flow", "embed", embed, nn.Module, optional=True)
        if embed is not None and not transform.context_dim:
            raise ValueError(
                f"Flow: embed makes contexts, but the transform {type(transform).__name__} takes "
                "none (context_dim = 0). Build it with the width that embed makes, or leave embed "
                "out."
            )
        support = base().support
        if not is_within(support, transform.domain):
            raise ValueError(
                f"Flow: the base {type(base).__name__} draws from {describe(support)}, but the "
                f"transform {type(transform).__name__} takes {describe(transform.domain)}. Take a "
                "base on that space, or put a map onto it first in the chain."
            )
        self.base = base
        self.transform = transform
        self.embed = embed
        self.event_shape = Size(transform.forward_shape(base.event_shape))
        self.input_dim = input_dim_of(self.event_shape)
        self.context_dim: int = transform.context_dim
        self.recipe: tuple[str, dict[str, Any]] | None = None
        self.units: FixedAffine | None = None
        self.context_units: FixedAffine | None = None

    @property
    def log_prob_kind(self) -> LogProbKind:
        """What ``log_prob`` returns: "exact", an "estimate" or a "bound" of the log density."""
        return self.transform.ladj_kind

    def forward(
        self, context: Tensor | None = None
    ) -> FlowDistribution | StochasticFlowDistribution:
        """Makes the distribution.

        Args:
            context: Shape ``(..., context_dim)``, or what the embedding takes; None if the flow
                takes none.

        Raises:
            ValueError: If the context is missing, superfluous or of the wrong width.
            TypeError: If it is no tensor, or of another dtype than the flow.
        """
        c = self._embedded(context)
        base_dist = self.base() if c is None else self.base(c.shape[:-1])
        transform = self._given(c)
        if isinstance(transform, StochasticTransform):
            return StochasticFlowDistribution(base_dist, transform, self)
        return FlowDistribution(base_dist, transform, self)

    def transform_in_units(
        self, context: Tensor | None = None
    ) -> FlowTransform | StochasticTransform:
        """The map from the base to the data in their own units, with the context filled in.

        Args:
            context: As the flow takes it, in its own units; None if it takes none.
        """
        return self._given(None if context is None else self._embedded(context))

    def _given(self, c: Tensor | None) -> FlowTransform | StochasticTransform:
        """The map to the data in their own units, given contexts as the transform sees them."""
        transform = self.transform if c is None else self.transform.condition(c)
        if self.units is None:
            return transform
        if isinstance(transform, StochasticTransform):
            return StochasticChain([transform, self.units])
        return _InUnits(transform, self.units)

    def _embedded(self, context: Tensor | None) -> Tensor | None:
        """The contexts as the transform sees them: in units, and embedded.

        Args:
            context: As the flow takes it, in its own units; None if it takes none.

        Returns:
            Shape ``(..., context_dim)``, or None.
        """
        owner = type(self).__name__
        if self.embed is None or context is None:
            check_context(owner, context, self.context_dim)
        else:
            check_kind(owner, "context", context, Tensor)
        if context is not None and self.context_units is not None:
            context = self.context_units.inverse_and_ladj(context)[0]
        if context is None or self.embed is None:
            return context
        if context.is_floating_point():
            check_dtype(owner, "context", context, floating_dtype(self.embed))
        c = self.embed(context)
        check_embedded(owner, c, self.context_dim)
        return cast(Tensor, c)

    def base_of_kind(self, name: str, sizes: Mapping[str, Any]) -> Base:
        """A base of another kind with the dtype and device of this flow, or the one it has.

        Args:
            name: Name of the class.
            sizes: What its ``sizes`` returned.

        Returns:
            The flow's own base if it is of that kind, or if that is no base of the library.
        """
        is_mine = (type(self.base).__name__, self.base.sizes()) == (name, dict(sizes))
        if is_mine or name not in _BASES:
            return self.base
        return _BASES[name](**sizes).to(next(self.parameters(), torch.empty(0)))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Units are there exactly if the state has them, and the base is of the state's kind."""
        start = f"{prefix}base."
        names = {n.removeprefix(start): t for n, t in state_dict.items() if n.startswith(start)}
        if type(self.base).__name__ in _BASES:
            sizes = Base.sizes(self.base)
            if "logits" in names:
                sizes["count_components"] = len(names["logits"])
                self.base = self.base_of_kind("GaussianMixture", sizes)
            elif "log_df" in names:
                self.base = self.base_of_kind("StudentT", sizes)
            elif "loc" in names:
                self.base = self.base_of_kind("DiagonalNormal", sizes)
        for name in _UNITS:
            loc = state_dict.get(f"{prefix}{name}.loc")
            like = next(self.parameters(), loc)
            setattr(self, name, None if loc is None else _unit_scale(loc.to(like)))
        # torch would convert the numbers of another dtype without a word
        for name, mine in self.state_dict().items():
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor):
                check_same_dtype("load_state_dict", prefix + name, given, mine)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Flow:
        copied = memo[id(self)] = type(self).__new__(type(self))
        with torch.inference_mode(False):  # what was made in that mode could not learn
            copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log density of ``x``; short for ``flow(context).log_prob(x)``.

        Args:
            x: Shape ``(..., *event_shape)``.
            context: As the flow takes it; its batch broadcasts against that of ``x``.

        Returns:
            Shape ``(...)``.

        Raises:
            ValueError: If a shape is wrong, or the context is missing or superfluous.
            TypeError: If ``x`` is no floating tensor of the dtype of the flow.

        Example:
            >>> import torch
            >>> from pyro_nf.flows.recipes import realnvp
            >>> round(realnvp(2).log_prob(torch.zeros(2)).item(), 3)  # -log(2 pi)
            -1.838
        """
        check_event_shape("Flow", "x", x, self.event_shape, len(self.event_shape))
        return self(context).log_prob(x)

    def sample(
        self, sample_shape: int | Sequence[int] = (), context: Tensor | None = None
    ) -> Tensor:
        """Draws without gradients; short for ``flow(context).sample(sample_shape)``.

        Args:
            sample_shape: How many draws for each context, or their shape.
            context: As the flow takes it.

        Returns:
            Shape ``sample_shape + (..., *event_shape)``.

        Raises:
            ValueError: If a shape is wrong, or the context is missing or superfluous.

        Example:
            >>> from pyro_nf.flows.recipes import realnvp
            >>> realnvp(2).sample(5).shape, realnvp(2).sample((3, 4)).shape
            (torch.Size([5, 2]), torch.Size([3, 4, 2]))
        """
        shape = (cast(int, sample_shape),) if is_count(sample_shape) else sample_shape
        return self(context).sample(size_of("Flow.sample", "sample_shape", cast(Any, shape)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all parameters and buffers, and how to build the flow, to one safetensors file.

        How an embedding is built is not in the file: such a flow is loaded into one that is there.

        Args:
            path: The file; an existing one is replaced, all or nothing, and keeps its mode.

        Raises:
            OSError: If the file cannot be written.
        """
        check_path("Flow.save", "path", path)
        known = _BASES.get(type(self.base).__name__) is type(self.base)
        header = {
            "recipe": self.recipe if self.embed is None else None,
            "base": (type(self.base).__name__ if known else None, self.base.sizes()),
        }
        save_tensors(path, "flow", self.state_dict(), header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], into: Flow | None = None) -> Flow:
        """Reads what ``save`` wrote.

        Args:
            path: The file.
            into: A flow of the same architecture and dtype to fill, needed if the saved one was not
                built by a recipe of :mod:`pyro_nf.flows`, or has an embedding. It is left alone if
                the file does not fit.

        Returns:
            The flow, with the dtypes of the file: a new one, or ``into``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is corrupt in any way, too new, or of another architecture, or
                asks for more than it holds. Nothing in a file is executed, and no more memory is
                taken than a small multiple of its size.
            TypeError: If ``into`` has another floating dtype than the file: numbers would be
                rounded, or seem more exact than they are.

        Example:
            >>> import pathlib, tempfile, torch
            >>> from pyro_nf.flows.recipes import realnvp
            >>> path = pathlib.Path(tempfile.mkdtemp()) / "flow.safetensors"
            >>> flow = realnvp(2)
            >>> flow.save(path)
            >>> y = torch.zeros(2)
            >>> bool(Flow.load(path).log_prob(y) == flow.log_prob(y))
            True
        """
        check_path("Flow.load", "path", path)
        check_kind("Flow.load", "into", into, Flow, optional=True)
        flow = into

        def accept(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
            nonlocal flow
            flow = _rebuilt(path, tensors, header) if flow is None else flow
            tensors = flow.renewed(tensors)
            wanted = flow._expected(tensors, header["base"])
            check_same_tensors("Flow.load", wanted, tensors, repr(str(path)))

        with torch.inference_mode(False):  # what was made in that mode could not learn
            tensors, _ = load_tensors(path, "flow", accept)
        loaded = cast(Flow, flow)
        loaded.load_state_dict(tensors)
        return loaded

    def renewed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, which an older version may have written, as they are now.

        Args:
            tensors: By their names.
        """
        return with_unit_triangles(tensors)

    def _expected(self, tensors: Mapping[str, Tensor], base: Any) -> dict[str, Tensor]:
        """What the tensors of a file must be like: its base and its units are followed."""
        name, sizes = base
        with Bounded(tensors):
            new_base = self.base if name is None else self.base_of_kind(name, sizes)
        like = next(self.parameters(), torch.empty(0))
        shapes = {"units": self.event_shape, "context_units": Size((self.context_dim,))}
        if self.embed is not None and "context_units.loc" in tensors:  # of any shape
            shapes["context_units"] = tensors["context_units.loc"].shape
        wanted = {n: t for n, t in self.state_dict().items() if not n.startswith(_NOT_BUILT)}
        wanted |= {f"base.{n}": t for n, t in new_base.state_dict().items()}
        return wanted | {
            f"{units}.{part}": torch.empty(shapes[units], dtype=like.dtype, device="meta")
            for units in _UNITS
            if any(key.startswith(f"{units}.") for key in tensors)
            for part in ("loc", "scale")
        }

    def __repr__(self) -> str:
        made = self.recipe[0] if self.recipe else type(self.transform).__name__
        count = sum(p.numel() for p in self.parameters())
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        size = f"event_shape={tuple(self.event_shape)}"
        size = size if self.input_dim is None else f"input_dim={self.input_dim}"
        head = f"Flow({made}, {size}{context}, {count:,} parameters)"
        if self.log_prob_kind != "exact":
            head += f"\n  log_prob: {in_words(self.log_prob_kind)}"
        embed = "" if self.embed is None else f"\n  embed: {indented(repr(self.embed))}"
        parts = f"\n  base: {self.base!r}\n  transform: {indented(repr(self.transform))}"
        return head + embed + parts


def _with_bound(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a recipe, where older files have no bound on the log-scales of a stack.

    Each layer had one of its own then.
    """
    bound = inspect.signature(_RECIPES[name]).parameters.get("max_log_scale")
    if bound is None or "max_log_scale" in arguments:
        return dict(arguments)
    return {**arguments, "max_log_scale": _BOUND_OF_A_LAYER * arguments["count_layers"]}


class _InUnits(FlowTransform):
    """A transform onto all real events, and then the units of the data.

    A chain of the two would do the same, but a flow makes this at every call, and a chain compares
    its parts when it is made.
    """

    def __init__(self, transform: FlowTransform, units: FixedAffine) -> None:
        super().__init__(context_dim=transform.context_dim, event_shape=transform.event_shape)
        self.transform, self.units = transform, units
        self.fast, self.inverse_kind = transform.fast, transform.inverse_kind
        self.ladj_kind = transform.ladj_kind
        self.domain = transform.domain

    @property
    def output_shape(self) -> Size | None:
        return self.units.event_shape

    def forward_shape(self, shape: Sequence[int]) -> Size:
        return self.transform.forward_shape(shape)

    def inverse_shape(self, shape: Sequence[int]) -> Size:
        return self.transform.inverse_shape(shape)

    def _forward_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y, ladj = self.transform._forward_and_ladj(x, context)
        y, more = self.units._forward_and_ladj(y, None)
        return y, ladj + more

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y, ladj = self.units._inverse_and_ladj(y, None)
        x, more = self.transform._inverse_and_ladj(y, context)
        return x, ladj + more

    def _push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj, score = self.transform._push_score(x, score, context)
        y, more, score = self.units._push_score(y, score, None)
        return y, ladj + more, score


def _unit_scale(loc: Tensor) -> FixedAffine:
    return FixedAffine(torch.zeros(loc.shape), torch.ones(loc.shape)).to(loc)


def _rebuilt(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> Flow:
    """The flow of a file by its recipe, its numbers still random; within what the file holds."""
    name, arguments = header.get("recipe") or (None, {})
    if name not in _RECIPES:
        raise InvalidFile(
            f"Flow.load: {str(path)!r} holds a flow that no recipe built, or one with an "
            f"embedding, got recipe {str(name)[:40]!r}; build the same flow and pass it as "
            "Flow.load(path, into=flow)."
        )
    base, sizes = header["base"]
    held = sum(tensor.numel() for tensor in tensors.values())
    if _largest((arguments, sizes)) > max(held, _SMALL):
        raise ValueError(f"it asks for sizes above its {held} numbers")
    with Bounded(tensors):
        flow = _RECIPES[name](**_with_bound(name, arguments))
        if base is None:
            raise InvalidFile(
                f"Flow.load: {str(path)!r} holds a flow whose base is none of {sorted(_BASES)}; "
                "build the same flow and pass it as Flow.load(path, into=flow)."
            )
        if base in _BASES:  # a fit may have exchanged it
            flow.base = _BASES[base](**sizes)
        dtypes = Counter(t.dtype for t in tensors.values() if t.is_floating_point())
        if dtypes:
            flow.to(dtypes.most_common(1)[0][0])
        for key, mine in flow.state_dict(keep_vars=True).items():
            if key in tensors and mine.is_floating_point() and tensors[key].is_floating_point():
                mine.data = mine.data.to(tensors[key].dtype)
    return flow


# Sizes up to this are built whatever the file holds: some arguments, of networks that a flow of one
# coordinate does not have for example, leave no trace in it.
_SMALL = 2**16


def _largest(value: Any) -> int:
    """The largest integer among the arguments of a recipe."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return max([len(value), *map(_largest, value)])
    return value if isinstance(value, int) else 0
