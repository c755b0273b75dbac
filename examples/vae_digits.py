"""A variational autoencoder of handwritten digits, with a standard normal and with a flow as prior.

    z ~ prior,  x_i ~ Binomial(16, p_i(z)) for each of the 64 pixels
    guide: z ~ Normal(m(x), s(x))

The draws of the guide, over all images, form clusters that a normal does not. A learnt prior
follows them, so that fewer nats are lost to the difference, and samples from it look like digits.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_nf as nf

PIXELS, LEVELS = 64, 16


class VAE(nn.Module):
    def __init__(self, prior: nn.Module, latent_dim: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.prior = prior
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, 2 * latent_dim)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, PIXELS)
        )

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", self.prior())
            pixels = dist.Binomial(LEVELS, logits=self.decoder(z), validate_args=False)
            pyro.sample("x", pixels.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, log_scale = self.encoder(x / LEVELS - 0.5).chunk(2, -1)
        with pyro.plate("images", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    @torch.no_grad()
    def draw(self, count: int) -> Tensor:
        return self.decoder(self.prior().sample((count,))).sigmoid()


def fit(vae: VAE, x: Tensor, epochs: int, batch_size: int = 100) -> None:
    steps = epochs * max(len(x) // batch_size, 1)
    optimizer = pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": 0.1 ** (1 / steps), "clip_norm": 10.0})
    svi = SVI(vae.model, vae.guide, optimizer, Trace_ELBO())
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch_size):
            svi.step(x[rows])


@torch.no_grad()
def negative_elbo(vae: VAE, x: Tensor, count_particles: int = 20) -> float:
    """In nats an image, averaged over draws of z."""
    elbo = Trace_ELBO(count_particles, max_plate_nesting=1, vectorize_particles=True)
    return elbo.loss(vae.model, vae.guide, x) / len(x)


def picture(draws: dict[str, Tensor], rows: int = 6) -> Figure:
    figure = Figure(figsize=(3.2 * len(draws), 3.5), dpi=150, layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    for panel, (name, images) in zip(
        figure.subplots(1, len(draws), squeeze=False)[0], draws.items(), strict=True
    ):
        tiles = nn.functional.pad(images[: rows * rows].reshape(rows, rows, 8, 8), (1, 1, 1, 1))
        tiles = tiles.permute(0, 2, 1, 3).reshape(10 * rows, 10 * rows)
        panel.imshow(tiles.numpy(), cmap="gray_r")
        panel.set_title(name, fontsize=11)
        panel.set_axis_off()
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Compare two priors of a VAE.")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="where the picture goes")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="one epoch, to see that it runs")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)

    pyro.set_rng_seed(options.seed)
    images = torch.from_numpy(load_digits().data).float()
    images = images[torch.randperm(len(images))]
    test, train = images[:297], images[297:]
    dim = options.latent_dim
    priors = {
        "standard normal prior": nf.flows.DiagonalNormal(dim),
        "flow prior": nf.flows.nsf(dim, count_layers=3, hidden_dims=(64,)),
    }
    loss, draws = {}, {"data": test / LEVELS}
    for name, prior in priors.items():
        pyro.set_rng_seed(options.seed)
        pyro.clear_param_store()
        vae = VAE(prior, dim)
        fit(vae, train, 1 if options.smoke else options.epochs)
        loss[name], draws[name] = negative_elbo(vae, test), vae.draw(36)
        print(f"{name:<22} test -ELBO {loss[name]:8.2f} nats an image")
    gain = loss["standard normal prior"] - loss["flow prior"]
    print(f"gain of the flow prior {gain:19.2f}")

    picture(draws).savefig(options.output / "vae_digits.png")
    print(f"Picture: {options.output / 'vae_digits.png'}")
    return loss


if __name__ == "__main__":
    main()
