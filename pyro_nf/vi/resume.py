"""How a fit recognises its checkpoint: what marks it, what it says, and what version 0.1 wrote."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_nf._storage import load_tensors, save_tensors
from pyro_nf.guides.joint_flow import JointFlow, has_part, modules_of_old, with_part_names
from pyro_nf.guides.recentre import Recentre
from pyro_nf.model.joint import LogJoint
from pyro_nf.train.randomness import own_randomness
from pyro_nf.train.saved.checkpoint import KIND, load_fit
from pyro_nf.train.saved.digest import architecture, digest
from pyro_nf.vi.objectives import ELBO, Objective
from pyro_nf.vi.recipe import PosteriorRecipe

# What a recipe says that a resumed fit may say differently: its budget, and what is chosen anyway.
_FREE = ("max_steps", "num_particles", "grace")
# The parts of a checkpoint that hold the tensors of the flow.
_OF_FLOW = ("module/", "best/", "average/")


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of the fit that wrote it.

    Attributes:
        path: The file.
        settings: The marks of the fit.
        tensors: Those of the guide's flow, by their names of now.
        is_old: Whether version 0.1 wrote it.
    """

    path: str | os.PathLike[str]
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    is_old: bool

    @classmethod
    def read(cls, path: str | os.PathLike[str] | None) -> Saved | None:
        """Reads a checkpoint, if there is one.

        Args:
            path: The file, or None.

        Raises:
            ValueError: If it is corrupt, or of a newer version.
        """
        if path is None or not os.path.exists(path):
            return None
        settings, tensors = load_fit(path)
        renamed = with_part_names(tensors)
        return cls(path, settings, renamed, renamed.keys() != tensors.keys())

    @property
    def count_components(self) -> int:
        """Components of the base of the guide."""
        return int(self.settings.get("count_components", 1))

    def recentring(self, joint: LogJoint) -> Recentre | None:
        """The recentring of the guide, if it has one.

        Args:
            joint: The log joint density, with the data of now.

        Raises:
            ValueError: If the guide has another number of coordinates.
        """
        if not has_part(self.tensors, "recentring"):
            return None
        precision, shift = (
            self.tensors[f"transform.recentring.{n}"] for n in ("precision", "shift")
        )
        if precision.shape != joint.init_loc.shape:
            raise ValueError(
                "fit_svi: the checkpoint is of another architecture: its guide has "
                f"{precision.numel()} unconstrained coordinates, the model {joint.latent_dim}. "
                "Resume with the model and the arguments that it had, or give another file."
            )
        return Recentre(joint, precision, shift)

    def renew(self, flow: JointFlow, settings: Mapping[str, Any]) -> None:
        """Writes a file of version 0.1 anew, with the names and marks of now.

        Its marks of network and objective have the names of modules and files of then. They count
        as the same if the network is made of the same classes, and the objective is of the same
        class.

        Args:
            flow: The flow of the guide that goes on.
            settings: The marks of the fit that goes on.
        """
        if not self.is_old:
            return
        tensors, header = load_tensors(self.path, KIND)
        for part in _OF_FLOW:
            tensors = with_part_names(tensors, part)
        marks = header["settings"]
        if marks.get("network") == digest([f"{n}: {kind}" for n, kind in modules_of_old(flow)]):
            marks["network"] = architecture(flow)
        now = settings["objective"]
        if str(marks.get("objective")).split()[0] == now.split()[0]:
            marks["objective"] = now
        marks["recipe"] = {}  # there was only one
        save_tensors(self.path, KIND, tensors, header)


def settings_of(
    joint: LogJoint, count_components: int, recipe: PosteriorRecipe, objective: Objective | None
) -> dict[str, Any]:
    """What must be the same when a fit is resumed, the data aside.

    Args:
        joint: The log joint density.
        count_components: Of the base.
        recipe: The settings, with the particles that were chosen.
        objective: None for the ELBO.
    """
    changes = {name: value for name, value in recipe.changes().items() if name not in _FREE}
    return {
        "sites": {name: list(site.shape) for name, site in joint.sites.items()},
        "count_components": count_components,
        "num_particles": recipe.num_particles,
        "objective": digest(objective or ELBO()),
        "recipe": changes,
    }


def marks_of(joint: LogJoint) -> dict[str, Any]:
    """What tells a model and its data from others: its arguments, what it observes, its density.

    A model that draws a subsample of its own shows other data in each run; then the arguments alone
    are compared.

    Args:
        joint: The log joint density.
    """
    marks: dict[str, Any] = {f"args[{i}]": digest(value) for i, value in enumerate(joint.args)}
    marks |= {f"kwargs[{name!r}]": digest(value) for name, value in joint.kwargs.items()}
    if joint.is_random:
        return marks
    z = torch.zeros_like(joint.init_loc)
    with torch.no_grad(), own_randomness(seed=0), pyro.validation_enabled(False), poutine.block():
        conditioned = poutine.condition(joint.model, joint.unpack(z))
        trace = poutine.trace(conditioned).get_trace(*joint.args, **joint.kwargs)
        density = float(joint.log_prob(z.unsqueeze(0)))
    nodes: dict[str, Any] = dict(trace.nodes)
    for name, node in nodes.items():
        if node["type"] == "sample" and node["is_observed"] and name not in joint.sites:
            marks[f"observed {name!r}"] = digest(node["value"])
    return marks | ({"log density at 0": density} if math.isfinite(density) else {})
