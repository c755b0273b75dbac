"""The layers of a guide's flow, light ones and full ones, and the affine base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from pyro_nf._checks import check_count, check_kind
from pyro_nf.flows.recipes import nsf
from pyro_nf.search.gaussians import MAX_FULL_DIM
from pyro_nf.search.start import GaussianStart
from pyro_nf.transforms.affine import FixedAffine, LowerAffine, LowRankAffine
from pyro_nf.transforms.autoregressive import Autoregressive
from pyro_nf.transforms.base import FlowTransform
from pyro_nf.transforms.chain import Chain
from pyro_nf.transforms.elementwise import Elementwise
from pyro_nf.univariate.affine import Affine, SmoothAffine
from pyro_nf.univariate.sinh_arcsinh import SinhArcsinh

# Layers of the flow; where there are few coordinates six cost little more than four.
COUNT_LAYERS, MANY_LAYERS, MANY_LAYERS_DIM = 4, 6, 20
# All layers together scale by up to e^6. That is ample, and one layer with all of it would be
# carried away by the noise of single particles.
MAX_LOG_SCALE = 6.0
HIDDEN_DIM, MAX_HIDDEN_DIM = 64, 256
# In plain SVI all parameters learn at one rate. Many weights move a draw together, each by little.
LIGHT_GAIN = 1 / 16
# Location and scale must go a long way, in units of the scale, so that they come to rest in narrow
# posteriors. But at rest the slope that one particle gives is noise: at a rate r a gain c leaves a
# loss of about r c / 4 nats in each coordinate. So the more coordinates, the smaller the gains.
SHIFT_GAIN, MOST_SHIFT_GAIN = 128.0, 32.0
SCALE_GAIN, MOST_SCALE_GAIN = 10.0, 4.0


def affine_base(start: GaussianStart, rank: int = 16) -> Chain:
    r"""The learnable Gaussian in the coordinates of a start.

    .. math:: z = m_0 + L_0 (m + L x)

    At zero parameters it is the start itself. In these coordinates one learning rate suits all
    posteriors. ``L`` is full and lower triangular, or, where the start is diagonal, diagonal plus
    full in a subspace.

    Args:
        start: Gives m_0 and L_0.
        rank: Size of the subspace in high dimensions.
    """
    check_kind("affine_base", "start", start, GaussianStart)
    check_count("affine_base", "rank", rank)
    dim = len(start.loc)
    learned = LowerAffine(dim) if dim <= MAX_FULL_DIM else LowRankAffine(dim, rank)
    return Chain([learned.to(start.loc), FixedAffine(start.loc, start.scale)])


def light_layers(input_dim: int) -> Chain:
    """One autoregressive layer and a shift and scale of each coordinate, all smoothly bounded.

    Pyro takes one optimiser for each parameter, so what a step of plain ``SVI`` costs goes by the
    number of parameters: here there are five. What a draw can be moved and stretched by is bounded,
    because with single particles a step may follow one wild draw. Of few coordinates the shift goes
    far at each step, so that a location far off is reached at small learning rates too.

    Args:
        input_dim: Size of the event.

    Example:
        >>> len(light_layers(4).parts), len(list(light_layers(4).parameters()))
        (2, 5)
    """
    width = max(HIDDEN_DIM, min(2 * input_dim, MAX_HIDDEN_DIM))
    layer = Autoregressive(
        SmoothAffine(shift_gain=LIGHT_GAIN, scale_gain=LIGHT_GAIN),
        input_dim,
        hidden_dims=(width,),
        activation=nn.SiLU,  # a posterior is smooth, and so should its flow be
        fast="forward",
    )
    far = SmoothAffine(
        shift_gain=min(max(SHIFT_GAIN / input_dim**2, 1.0), MOST_SHIFT_GAIN),
        scale_gain=min(max(SCALE_GAIN / input_dim, 1.0), MOST_SCALE_GAIN),
    )
    return Chain([layer, Elementwise(far, input_dim)])


def autoregressive_layers(input_dim: int) -> Chain:
    """Skewness and tails, and affine autoregressive layers that turn the order round.

    Six layers up to 20 coordinates, four above.

    The layers alone have the tails of the base: scales that vary make up for some of it only. All
    is fast to sample.

    Args:
        input_dim: Size of the event.

    Example:
        >>> len(autoregressive_layers(4).parts), len(autoregressive_layers(40).parts)
        (7, 5)
    """
    count = MANY_LAYERS if input_dim <= MANY_LAYERS_DIM else COUNT_LAYERS
    width = max(HIDDEN_DIM, min(2 * input_dim, MAX_HIDDEN_DIM))
    layers = [
        Autoregressive(
            Affine(MAX_LOG_SCALE / count),
            input_dim,
            hidden_dims=(width,),
            activation=nn.SiLU,  # a posterior is smooth, and so should its flow be
            # the last one in order: scales tend to come before what they scale
            reverse=(count - i) % 2 == 0,
            fast="forward",
        )
        for i in range(count)
    ]
    return Chain([Elementwise(SinhArcsinh(), input_dim), *layers])


def with_gains_of_now(
    layers: FlowTransform, tensors: Mapping[str, Tensor], start: str
) -> dict[str, Tensor]:
    """Tensors of the light layers of version 0.1, so that with these layers they are the same map.

    The shift and scale of each coordinate had the gains 32 and 4, whatever the dimension.

    Args:
        layers: What :func:`light_layers` makes.
        tensors: By their names; those of other parts stay.
        start: How the names of the layers begin.
    """
    key, last = f"{start}parts.1.net.value", cast(Chain, layers).parts[-1]
    far = cast(SmoothAffine, cast(Elementwise, last).univariate)
    if key not in tensors:
        return dict(tensors)
    then_over_now = tensors[key].new_tensor([32.0 / far.shift_gain, 4.0 / far.scale_gain])
    return {**tensors, key: tensors[key] * then_over_now}


def auto_flow(latent_dim: int) -> FlowTransform:
    """The flow that ``flow="auto"`` takes in plain ``SVI``: cheap, and bounded.

    One coordinate gets splines, since an affine autoregressive map of one coordinate is Gaussian.
    More get :func:`light_layers`: one autoregressive layer, and a shift and
    scale of each coordinate.

    Args:
        latent_dim: The number of unconstrained coordinates.

    Example:
        >>> auto_flow(1).fast, auto_flow(5).fast
        ('both', 'forward')
    """
    return _splines() if latent_dim == 1 else light_layers(latent_dim)


def full_flow(latent_dim: int) -> FlowTransform:
    """The flow that ``flow="auto"`` takes in the coordinates of a start: what fits most posteriors.

    One coordinate gets splines. More get :func:`autoregressive_layers`:
    skewness and tails of each, then six affine layers, four above 20 coordinates, with a hidden
    layer of 64 to 256 units that widens with the dimension.

    Args:
        latent_dim: The number of unconstrained coordinates.

    Example:
        >>> len(full_flow(5).parts)
        7
    """
    return _splines() if latent_dim == 1 else autoregressive_layers(latent_dim)


def _splines() -> FlowTransform:
    return cast(FlowTransform, nsf(1, count_layers=2).transform)
