"""Flows over images: densities, fits to digits, files, units, and contexts that are embedded."""

import pyro
import pytest
import torch
from pyro import poutine
from sklearn.datasets import load_digits
from torch import nn

from pyro_nf import transforms as t
from pyro_nf.flows.base import Base, DiagonalNormal
from pyro_nf.flows.distribution import FlowDistribution
from pyro_nf.flows.flow import Flow
from pyro_nf.flows.recipes import realnvp
from pyro_nf.flows.student import StudentT
from pyro_nf.testing import check_flow, randomize
from pyro_nf.train.density.fit import fit_density
from pyro_nf.train.density.start import MixtureBase, Standardised, StudentTails
from pyro_nf.train.density.table import units_of
from pyro_nf.transforms.affine import FixedAffine
from pyro_nf.univariate.affine import Affine
from tests.cases import BOARD, Flatten, Squeeze, small_conv


def layers(context_dim: int = 0, size: int = 4) -> t.Chain:
    """A chessboard and its swap, then channels of a squeezed image."""
    half = size // 2
    board = BOARD.repeat(size // 4, size // 4)
    boards = [
        t.Coupling(
            Affine(3.0),
            None,
            context_dim,
            event_shape=(1, size, size),
            mask=board,
            swap=swap,
            conditioner=small_conv,
        )
        for swap in (False, True)
    ]
    channels = t.Coupling(
        Affine(3.0),
        None,
        context_dim,
        event_shape=(4, half, half),
        axis=0,
        conditioner=small_conv,
    )
    return t.Chain([Squeeze().inv, *boards, Squeeze(), channels, Squeeze().inv])


def digits() -> torch.Tensor:
    """Some digits (1, 8, 8), with the noise that makes numbers of their levels."""
    images = torch.tensor(load_digits().images[:400], dtype=torch.float32).unsqueeze(1)
    return (images + torch.rand(images.shape, generator=torch.Generator().manual_seed(0))) / 17


def fit(flow: Flow, x: torch.Tensor, **more):
    return fit_density(flow, x, **({"max_steps": 12, "progress": False} | more))


def test_the_density_of_an_image_is_autograds():
    flow = randomize(Flow(layers(), DiagonalNormal((4, 2, 2), scale=1.5))).double()
    y = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    flow.units = FixedAffine(torch.full_like(y[0], 0.3), torch.full_like(y[0], 2.5))
    normal = torch.distributions.Normal(y.new_tensor(0.0), y.new_tensor(1.5))
    d = flow()
    for i in range(5):
        inverse = lambda v: flow.transform.inverse_and_ladj((v - 0.3) / 2.5)[0]  # noqa: E731
        jacobian = torch.autograd.functional.jacobian(inverse, y[i]).reshape(16, 16)
        wanted = normal.log_prob(inverse(y[i])).sum() + jacobian.slogdet().logabsdet
        torch.testing.assert_close(d.log_prob(y)[i], wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_flow_of_images_obeys_the_laws(context_dim):
    check_flow(Flow(layers(context_dim)))


def test_events_may_change_their_shape():
    flow = randomize(Flow(t.Chain([layers(), Flatten((1, 4, 4))])))
    assert flow.base.event_shape == (4, 2, 2)
    assert flow.event_shape == (16,) == flow().event_shape and flow.input_dim == 16
    d = flow().expand((3,))
    y = d.rsample((5,))
    assert y.shape == (5, 3, 16) and d.log_prob(y).shape == (5, 3)
    check_flow(flow)


def test_a_flow_of_images_is_a_pyro_distribution():
    flow = randomize(Flow(layers()))

    def model():
        with pyro.plate("images", 3):
            return pyro.sample("y", flow())

    trace = poutine.trace(model).get_trace()
    value = trace.nodes["y"]["value"]
    assert value.shape == (3, 1, 4, 4)
    torch.testing.assert_close(trace.log_prob_sum(), flow.log_prob(value).sum())


def test_a_point_too_far_for_its_numbers_has_no_density():
    flow = randomize(Flow(layers()))
    y = torch.randn(3, 1, 4, 4)
    y[1, 0, 2, 1] = 1e30
    log_prob = flow.log_prob(y)
    assert log_prob[1] == -torch.inf
    assert torch.equal(log_prob[[0, 2]], flow.log_prob(y[[0, 2]]))
    assert flow.log_prob(torch.full((1, 4, 4), torch.nan)).isnan()


def test_a_base_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"takes events of shape \(4, 2, 2\), but the base"):
        Flow(layers(), DiagonalNormal(16))
    image = DiagonalNormal((4, 2, 2))()
    assert FlowDistribution(image, layers()).event_shape == (1, 4, 4)
    normals = torch.distributions.Normal(torch.zeros(4, 2, 2), 1.0)
    with pytest.raises(ValueError, match=r"event_shape \(\), but the transform Chain takes"):
        FlowDistribution(normals, layers())


def test_an_image_flow_learns_digits_draws_and_is_saved(tmp_path):
    x, flow = digits(), Flow(layers(size=8))
    before = -flow.log_prob(x).mean().item()
    result = fit(flow, x, max_steps=30)
    held_out = -flow.log_prob(x).mean().item()
    assert result.validation < before - 20 and held_out < before - 20
    assert not result.baselines and set(result.starts) == {"standardised", "whitened"}
    assert flow.sample((2, 3)).shape == (2, 3, 1, 8, 8)
    path = tmp_path / "flow.safetensors"
    flow.save(path)
    with pytest.raises(ValueError, match=r"build the same flow and pass it as Flow\.load"):
        Flow.load(path)
    loaded = Flow.load(path, into=Flow(layers(size=8)))
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x))
    with pytest.raises(ValueError, match="of another architecture"):
        Flow.load(path, into=Flow(layers(size=4)))


def test_a_channel_has_one_unit():
    scales = torch.tensor([1.0, 10.0, 0.1]).reshape(3, 1, 1)
    x = 5 + scales * torch.randn(300, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0, 0] = 5.0  # a pixel that never changes is no channel that never does
    flow = Flow(t.Elementwise(Affine(), event_shape=(3, 4, 6)))
    with pytest.warns(UserWarning, match=r"channel 0 .* 5 in 4.2 % .* of x repeats values"):
        fit(flow, x, max_steps=2, starts=[Standardised()])
    loc, scale = flow.units.loc, flow.units.scale
    assert loc.shape == scale.shape == (3, 4, 6)
    for value in (loc, scale):
        assert torch.equal(value, value[:, :1, :1].expand(3, 4, 6))
    torch.testing.assert_close(scale[:, 0, 0], x.std((0, 2, 3)), rtol=0.05, atol=0.0)
    torch.testing.assert_close(loc[:, 0, 0], x.mean((0, 2, 3)), rtol=0.05, atol=0.0)
    # of events with fewer dimensions each entry has its own
    entries = units_of(x[:, 0, :, 1:])
    torch.testing.assert_close(entries.loc, x[:, 0, :, 1:].mean(0), rtol=0.05, atol=0.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[:, :, :3], r"x must have a shape that ends in event_shape = \(2, 4, 4\)"),
        (lambda x: x.unsqueeze(0), r"x must be rows of shape \(N, 2, 4, 4\), got \(1, 40"),
        (lambda x: x.index_fill(1, torch.tensor(1), 3.0), "channel 1 of x is constant"),
        (lambda x: x.index_fill(1, torch.tensor(0), torch.nan), "channel 0 of x is not finite"),
        (lambda x: torch.where(x == x[7, 1, 2, 3], 1e9, x), r"row 7 of x is 1e\+09 at \(1, 2, 3\)"),
    ],
)
def test_bad_images_are_named(change, words):
    x = torch.randn(40, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    flow = Flow(t.Elementwise(Affine(), event_shape=(2, 4, 4)))
    with pytest.raises(ValueError, match=f"^fit_density: {words}"):
        fit(flow, change(x))


def test_an_image_at_the_end_of_its_space_is_named():
    x = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    flow = Flow(t.Chain([layers(), t.Sigmoid(event_dim=3)]))
    fit(flow, x, max_steps=2)
    assert flow.units is None and bool(((flow.sample(9) > 0) & (flow.sample(9) < 1)).all())
    x[3, 0, 1, 2] = 1.0
    with pytest.raises(ValueError, match=r"row 3 of x is 1 at \(0, 1, 2\), but the flow maps onto"):
        fit(flow, x)


def test_heavy_tails_of_images_bring_their_base(tmp_path):
    x = torch.distributions.StudentT(2.0).sample((400, 1, 4, 4))
    x[0, 0, 0, 0] = 1e3
    flow = Flow(layers())
    fit(flow, x, max_steps=2, starts=[StudentTails(Standardised())])
    assert type(flow.base) is StudentT and flow.base.log_df.shape == (4, 2, 2)
    flow.save(tmp_path / "flow")
    other = Flow.load(tmp_path / "flow", into=Flow(layers()))
    assert type(other.base) is StudentT
    assert torch.equal(other.log_prob(x), flow.log_prob(x))
    with pytest.raises(ValueError, match=r"MixtureBase: flow must have a base of vectors.*\(4, 2"):
        MixtureBase()(flow, x, None)


def test_a_base_of_ones_own_may_be_of_any_shape():
    class Uniform(Base):
        def forward(self, batch_shape=()):
            ones = torch.ones(self.event_shape)
            uniform = pyro.distributions.Uniform(-ones, ones)
            return uniform.expand((*batch_shape, *self.event_shape)).to_event(ones.dim())

    flow = Flow(t.Tanh(event_dim=2).inv, Uniform((2, 3)))
    assert flow.event_shape == (2, 3) and flow.sample(4).shape == (4, 2, 3)
    wanted = (2 * torch.tensor(0.5).atanh() * 0).expand(2)
    y = torch.zeros(2, 2, 3)
    torch.testing.assert_close(flow.log_prob(y), wanted - 6 * torch.tensor(2.0).log())


# Contexts of any shape.


def images_to(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(3 * 4 * 4, width)
    )


def test_an_embedding_makes_the_contexts():
    flow = randomize(Flow(realnvp(2, 5).transform, embed=images_to(5))).double()
    images = torch.randn(6, 2, 4, 4, dtype=torch.float64)
    y = torch.randn(6, 2, dtype=torch.float64)
    bare = Flow(flow.transform).double()
    c = flow.embed(images)
    assert torch.equal(flow.log_prob(y, images), bare.log_prob(y, c))
    d = flow(images)
    assert d.batch_shape == (6,) and d.sample((3,)).shape == (3, 6, 2)
    draw = d.rsample()
    torch.testing.assert_close(d.log_prob(draw), flow(images).log_prob(draw.clone()))
    flow.log_prob(y, images).sum().backward()
    assert all(bool((p.grad != 0).any()) for p in flow.embed.parameters())


def test_an_embedding_learns_and_is_saved_with_its_flow(tmp_path):
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 100.0]).reshape(2, 1, 1)
    images = scales * torch.rand(600, 2, 4, 4, generator=generator)
    mean = images[:, 0].mean((1, 2)).unsqueeze(-1)
    x = 3 * mean + 0.02 * torch.randn(600, 1, generator=generator)
    flow = Flow(realnvp(1, 4, count_layers=2, hidden_dims=(16,)).transform, embed=images_to(4))
    before = {name: p.clone() for name, p in flow.embed.named_parameters()}
    result = fit(flow, x, context=images, max_steps=400, validation=(x[:100], images[:100]))
    # a normal without contexts, whose spread is that of x, is the least that they must beat
    plain = torch.distributions.Normal(x.mean(), x.std()).log_prob(x).mean().item()
    assert result.validation < -plain - 0.5
    assert all(not torch.equal(p, before[name]) for name, p in flow.embed.named_parameters())
    units = flow.context_units
    assert units.loc.shape == (2, 4, 4)
    torch.testing.assert_close(units.scale[:, 0, 0], images.std((0, 2, 3)), rtol=0.1, atol=0.0)
    flow.save(tmp_path / "flow")
    with pytest.raises(ValueError, match=r"or one with an embedding.*Flow\.load"):
        Flow.load(tmp_path / "flow")
    other = Flow(realnvp(1, 4, count_layers=2, hidden_dims=(16,)).transform, embed=images_to(4))
    loaded = Flow.load(tmp_path / "flow", into=other)
    assert torch.equal(loaded.log_prob(x, images), flow.log_prob(x, images))
    bare = realnvp(1, 4, count_layers=2, hidden_dims=(16,))
    with pytest.raises(ValueError, match=r"embed\.0\.weight is not known here"):
        Flow.load(tmp_path / "flow", into=bare)


def test_a_recipe_that_got_an_embedding_is_not_rebuilt_without_it(tmp_path):
    flow = realnvp(2, 5)
    flow.embed = images_to(5)
    flow.save(tmp_path / "flow")
    with pytest.raises(ValueError, match="or one with an embedding"):
        Flow.load(tmp_path / "flow")


def test_tokens_are_contexts_too():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(3, 4)

        def forward(self, tokens):
            return self.words(tokens).mean(-2)

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, (500, 1), generator=generator)
    x = 4.0 * tokens + 0.1 * torch.randn(500, 1, generator=generator)
    flow = Flow(realnvp(1, 4, count_layers=2, hidden_dims=(16,)).transform, embed=Mean())
    fit(flow, x, context=tokens, max_steps=300, starts=[Standardised()])
    assert flow.context_units is None
    centres = flow.sample(300, torch.tensor([[0], [1], [2]])).mean(0).squeeze(-1)
    torch.testing.assert_close(centres, torch.tensor([0.0, 4.0, 8.0]), rtol=0, atol=0.5)


def test_a_wrong_embedding_is_refused():
    transform = realnvp(2, 5).transform
    with pytest.raises(TypeError, match="Flow: embed must be a Module, got function"):
        Flow(transform, embed=lambda c: c)
    with pytest.raises(ValueError, match="Flow: embed makes contexts, but the transform Chain"):
        Flow(realnvp(2).transform, embed=images_to(5))
    images = torch.zeros(6, 2, 4, 4)
    with pytest.raises(ValueError, match=r"embed must make a floating tensor of shape \(..., 5\)"):
        Flow(transform, embed=images_to(4))(images)
    flow = Flow(transform, embed=images_to(5))
    with pytest.raises(ValueError, match="context is missing"):
        flow()
    with pytest.raises(TypeError, match=r"context has dtype torch\.float64, wanted torch\.float32"):
        flow(images.double())
    with pytest.raises(ValueError, match=r"x has 9 rows, but context has shape \(6, 2, 4, 4\)"):
        fit(flow, torch.randn(9, 2), context=images)
