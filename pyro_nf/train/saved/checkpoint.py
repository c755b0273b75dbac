"""The state of a fit in a file, so that it goes on elsewhere as if it had never stopped."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nf._storage import (
    InvalidFile,
    check_same_tensors,
    load_tensors,
    refuse_corrupt,
    save_tensors,
)

KIND = "training checkpoint"


@dataclass
class TrainingState:
    """All that decides how a fit goes on.

    Attributes:
        module: The state of the module.
        best: Its best state so far.
        average: The moving average of its parameters; empty if the fit has none.
        optimizers: For each optimiser, for each parameter by index, its named state.
        generators: The states of the random generators.
        values: What JSON can hold: history, settings, counters.
    """

    module: dict[str, Tensor]
    best: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizers: list[dict[int, dict[str, Any]]]
    generators: dict[str, Tensor]
    values: dict[str, Any]


def save_state(path: str | os.PathLike[str], state: TrainingState) -> None:
    """Write the state of a fit, all or nothing.

    Args:
        path: The file, replaced if it exists.
        state: What to write.

    Raises:
        OSError: If the directory does not exist or cannot be written.
    """
    tensors = {
        **{f"module/{name}": value for name, value in state.module.items()},
        **{f"best/{name}": value for name, value in state.best.items()},
        **{f"average/{name}": value for name, value in state.average.items()},
        **{f"generator/{name}": value for name, value in state.generators.items()},
    }
    scalars: list[list[Any]] = []
    for i, optimizer in enumerate(state.optimizers):
        for p, entries in optimizer.items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{i}/{p}/{name}"] = value
                else:
                    scalars.append([i, p, name, value])
    header = state.values | {"optimizers": len(state.optimizers), "optimizer_scalars": scalars}
    save_tensors(path, KIND, tensors, header)


def load_fit(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what is needed to build anew the module of the fit that wrote a checkpoint.

    Args:
        path: The file.

    Returns:
        The settings of the fit, and the tensors of its module by their names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, corrupt or of a newer version.
    """
    tensors, header = load_tensors(path, KIND)
    if not isinstance(header.get("settings"), dict):
        raise InvalidFile(
            f"load: {str(path)!r} is truncated or corrupt (no settings). Use another copy."
        )
    module = {k.removeprefix("module/"): t for k, t in tensors.items() if k.startswith("module/")}
    return header["settings"], module


def load_state(
    path: str | os.PathLike[str], module: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> TrainingState:
    """Read what `save_state` wrote, and make sure that it belongs to this fit.

    Args:
        path: The file.
        module: The state of the module that will go on, for its names and shapes.
        settings: The settings of the fit that will go on.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, corrupt, of a newer version, of another architecture
            or of a fit with other data or settings; the message lists what differs.
        TypeError: If the module has another dtype than the one that was trained.
    """
    tensors, header = load_tensors(path, KIND)
    with refuse_corrupt(path):
        return _read_state(f"the checkpoint {str(path)!r}", tensors, header, module, settings)


def _read_state(
    source: str,
    tensors: Mapping[str, Tensor],
    header: dict[str, Any],
    module: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> TrainingState:
    parts: dict[str, dict[str, Tensor]] = {
        part: {} for part in ("module", "best", "average", "generator")
    }
    optimizers: list[dict[int, dict[str, Any]]] = [{} for _ in range(header["optimizers"])]
    for key, value in tensors.items():
        part, name = key.split("/", 1)
        if part == "optimizer":
            i, p, name = name.split("/")
            optimizers[int(i)].setdefault(int(p), {})[name] = value
        else:
            parts[part][name] = value
    for i, p, name, scalar in header["optimizer_scalars"]:
        optimizers[i].setdefault(p, {})[name] = scalar

    check_same_tensors("train", module, parts["module"], source)
    check_same_tensors("train", module, parts["best"], source)
    known = {name: module[name] for name in parts["average"] if name in module}
    check_same_tensors("train", known, parts["average"], source)
    saved = header["settings"]
    unknown = [name for name in settings if name not in saved]
    if unknown and not saved.keys() - settings.keys():
        raise InvalidFile(
            f"train: {source} was written by an earlier version or another kind of fit, which kept "
            f"no record of {', '.join(unknown)}, so nobody can say whether it belongs to this fit. "
            "Resume with the version that wrote it, or give another file for a new fit."
        )
    different = [
        f"{name} was {saved.get(name)}, now {settings.get(name)}"
        for name in {**saved, **settings}
        if not _agree(saved.get(name), settings.get(name))
    ]
    if different:
        raise InvalidFile(
            f"train: {source} is of a fit with other data or settings: {'; '.join(different)}. "
            "Resume with the same, or give another file for a new fit."
        )
    device = next((value.device for value in module.values()), torch.device("cpu"))
    return TrainingState(
        module={name: value.to(device) for name, value in parts["module"].items()},
        best={name: value.to(device) for name, value in parts["best"].items()},
        average={name: value.to(device) for name, value in parts["average"].items()},
        optimizers=optimizers,
        generators=parts["generator"],
        values=header,
    )


def copied(module: nn.Module, device: str | None = None) -> dict[str, Tensor]:
    """A copy of a module's state.

    Args:
        module: The module.
        device: Where to; by default each tensor stays where it is.
    """
    tensors = {name: t for name, t in module.state_dict().items() if torch.is_tensor(t)}
    return {name: t.detach().to(device or t.device, copy=True) for name, t in tensors.items()}


def put_into(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a module a state."""
    module.load_state_dict(state, strict=False)


def _agree(saved: Any, now: Any) -> bool:
    """Whether two settings are the same; sums of floats differ a little by how they were added."""
    if isinstance(saved, float) and isinstance(now, float):
        return math.isclose(saved, now, rel_tol=_RELATIVE) or (saved != saved and now != now)
    return bool(saved == now)


_RELATIVE = 1e-4
