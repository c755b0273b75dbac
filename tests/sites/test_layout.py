"""One layout of the latents in a vector, for a model's density and for its guide."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_nf.guides.guide import AutoFlow
from pyro_nf.model.joint import LogJoint
from pyro_nf.sites.layout import Layout

F64 = torch.float64
SEEN = torch.tensor([True, False, True])


def one() -> torch.Tensor:
    return torch.ones((), dtype=F64)


def model() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0 * one(), 1.0))
    pyro.sample("share", dist.Dirichlet(one().expand(3)))
    with pyro.plate("columns", 2, dim=-1), pyro.plate("rows", 3, dim=-2):
        pyro.sample("u", dist.Uniform(-one(), 2.0))
    with pyro.plate("entries", 3), poutine.mask(mask=SEEN):
        pyro.sample("partly", dist.Normal(one(), scale))


def run() -> poutine.Trace:
    return poutine.trace(model).get_trace()


def test_coordinates_follow_the_trace() -> None:
    trace = run()
    layout = Layout.of_trace(trace, {"partly": SEEN})
    assert {name: (s.start, s.size) for name, s in layout.sites.items()} == {
        "scale": (0, 1),
        "share": (1, 2),
        "u": (3, 6),
        "partly": (9, 2),
    }
    assert layout.latent_dim == len(layout.labels) == len(layout.owners) == 11
    assert layout.labels[3:5] == ["u[0, 0]", "u[0, 1]"]
    assert layout.labels[-2:] == ["partly[0]", "partly[2]"]
    assert layout.owners[8:10] == ["u", "partly"]
    z = layout.coordinates(trace)
    assert z[0] == trace.nodes["scale"]["value"].log()
    values = layout.unpack(z)
    for name in layout.sites:
        torch.testing.assert_close(values[name], trace.nodes[name]["value"])


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_pack_inverts_unpack_for_all_leading_shapes(lead: tuple[int, ...]) -> None:
    layout = Layout.of_trace(run(), {"partly": SEEN})
    z = torch.randn(*lead, layout.latent_dim, dtype=F64)
    torch.testing.assert_close(layout.pack(layout.unpack(z)), z)


def test_a_value_without_leading_dimensions_is_broadcast() -> None:
    layout = Layout.of_trace(run())
    values = layout.unpack(torch.randn(5, layout.latent_dim, dtype=F64))
    values["scale"] = 2 * one()
    z = layout.pack(values)
    assert z.shape == (5, layout.latent_dim)
    assert z[:, 0].tolist() == [(2 * one()).log().item()] * 5


def test_values_outside_are_told_and_the_ladj_is_autograds() -> None:
    trace = run()
    layout = Layout.of_trace(trace)
    z = torch.randn(layout.latent_dim, dtype=F64)
    values = layout.unpack(torch.stack([z, z]))
    values["u"][1, 0, 0] = 7.0
    got, ladj, is_outside = layout.pack_inside(values, trace)
    assert is_outside.tolist() == [False, True]
    torch.testing.assert_close(got[0], z)

    def free(z: torch.Tensor) -> torch.Tensor:
        """All values flat; of a simplex all but the last entry."""
        x = layout.unpack(z)
        return torch.cat([x[n].flatten()[: s.size] for n, s in layout.sites.items()])

    jacobian = torch.autograd.functional.jacobian(free, z)
    torch.testing.assert_close(ladj[0], torch.linalg.slogdet(jacobian).logabsdet)


def test_a_density_and_a_guide_have_the_same_layout() -> None:
    joint, guide = LogJoint(model), AutoFlow(model).setup()
    for name, site in joint.layout.sites.items():
        mine = guide.layout.sites[name]
        assert (site.start, site.size, site.shape) == (mine.start, mine.size, mine.shape)
    z = torch.randn(3, joint.latent_dim, dtype=F64)
    torch.testing.assert_close(guide.layout.unpack(z), joint.unpack(z))


def test_wrong_values_are_named() -> None:
    layout = Layout.of_trace(run())
    values = layout.unpack(torch.zeros(layout.latent_dim, dtype=F64))
    with pytest.raises(ValueError, match="site 'u' is missing"):
        layout.pack({name: x for name, x in values.items() if name != "u"})
    with pytest.raises(ValueError, match=r"site 'u' has shape \(2, 2\)"):
        layout.pack(values | {"u": torch.zeros(2, 2, dtype=F64)})
    with pytest.raises(TypeError, match="floating"):
        layout.pack(values | {"scale": torch.tensor(1)})
