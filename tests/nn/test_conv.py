"""The convolutional conditioner: its formula, what a pixel sees, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyro_nf.nn.conv import ConvNet
from pyro_nf.testing import randomize


def test_its_formula():
    net = randomize(ConvNet((2, 5, 4), (3, 5, 4), 2, 3, hidden_channels=6, count_blocks=1)).double()
    x, c = torch.randn(7, 2, 5, 4).double(), torch.randn(7, 3).double()
    k = dict(net.named_parameters())
    h = F.conv2d(x, k["first.weight"], k["first.bias"], padding=1)
    h = h + (c @ k["context.weight"].T)[:, :, None, None]
    r = F.conv2d(h.clamp_min(0), k["blocks.0.1.weight"], k["blocks.0.1.bias"], padding=1)
    h = h + F.conv2d(r.clamp_min(0), k["blocks.0.3.weight"], k["blocks.0.3.bias"], padding=1)
    theta = F.conv2d(h.clamp_min(0), k["last.weight"], k["last.bias"])
    wanted = torch.stack([theta[:, 0::2], theta[:, 1::2]], -1)  # channel by channel
    torch.testing.assert_close(net(x, c), wanted)


def test_it_starts_at_zero_and_sees_neighbours_alone():
    net = ConvNet((1, 9, 9), (1, 9, 9), 2, hidden_channels=8, count_blocks=1, activation=nn.SiLU)
    assert not net(torch.randn(3, 1, 9, 9)).any()
    randomize(net).double()
    x = torch.randn(1, 9, 9).double()
    jacobian = torch.autograd.functional.jacobian(net, x)[0, 4, 4].abs().sum(0)[0]  # of the middle
    seen = torch.zeros(9, 9, dtype=torch.bool)
    seen[1:8, 1:8] = True  # three convolutions of width 3
    assert torch.equal(jacobian != 0, seen)


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 4), (2, 3, 4, 4)])
def test_any_batch_of_sequences_images_and_volumes(shape):
    net = randomize(ConvNet(shape, shape, 1, 2, hidden_channels=4, count_blocks=1))
    x, c = torch.randn(5, 1, *shape), torch.randn(3, 2)
    theta = net(x, c)
    assert theta.shape == (5, 3, *shape, 1)
    torch.testing.assert_close(theta[4, 1], net(x[4, 0], c[1]))
    assert net(x[:0, 0], c[:1]).shape == (0, *shape, 1)


@pytest.mark.parametrize(
    ("in_shape", "out_shape", "more", "words"),
    [
        ((2, 4, 4), (2, 4, 5), {}, r"the same extent.*\(2, 4, 4\) and \(2, 4, 5\)"),
        ((4,), (4,), {}, "another conditioner, as MLP"),
        ((0, 4, 4), (1, 4, 4), {}, "every entry of in_shape must be an integer >= 1, got 0"),
        ((2, 4, 4), (2, 4, 4), {"kernel_size": 4}, "kernel_size must be odd"),
    ],
)
def test_what_is_no_image_is_refused(in_shape, out_shape, more, words):
    with pytest.raises(ValueError, match=f"^ConvNet: .*{words}"):
        ConvNet(in_shape, out_shape, 1, **more)
