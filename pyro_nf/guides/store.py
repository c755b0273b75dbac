"""A guide's flow in Pyro's param store, which knows parameters only: fixed tensors go by name."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn

from pyro_nf.guides.joint_flow import JointFlow, with_part_names
from pyro_nf.transforms.affine import with_unit_triangles


def store_key(name: str, key: str = "") -> str:
    """The key in the store of a tensor of the flow of that name."""
    return param_with_module_name(name, key)


def tensors_by_key(flow: JointFlow, name: str) -> dict[str, Tensor]:
    """What the store holds, or would hold, of a flow.

    Args:
        flow: The flow.
        name: What the store calls it.
    """
    tensors: dict[str, Tensor] = dict(flow.named_parameters()) | flow.fixed_tensors()
    return {store_key(name, key): tensor for key, tensor in tensors.items()}


def stored(name: str) -> tuple[dict[str, Tensor], bool]:
    """What the store holds of a flow, after its keys of an older version have been made new.

    Args:
        name: What the store calls the flow.

    Returns:
        The tensors by their keys, and whether version 0.1 has put them there.
    """
    store, start = pyro.get_param_store(), store_key(name)
    mine = {key: store[key] for key in list(store) if key.startswith(start)}
    named = with_part_names(mine, start)
    renewed = with_unit_triangles(named)
    for key in mine.keys() - renewed.keys():
        del store[key]
    for key in renewed.keys() - mine.keys():
        store[key] = renewed[key].detach()
    return renewed, named.keys() != mine.keys()


def take_stored(flow: JointFlow, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copies what the store holds into a flow.

    Args:
        flow: The flow.
        name: What the store calls it.
        tensors: What :func:`stored` returned.

    Raises:
        ValueError: If it is of another model or flow; nothing is changed then.
    """
    mine = {k: t for k, t in tensors_by_key(flow, name).items() if k in tensors}
    for key, tensor in mine.items():
        if tensors[key].shape != tensor.shape:
            raise ValueError(
                f"AutoFlow: Pyro's param store holds {key!r} of shape "
                f"{tuple(tensors[key].shape)}, but this guide needs {tuple(tensor.shape)}: it is "
                "of another model or flow; call pyro.clear_param_store() first."
            )
    with torch.no_grad():
        for key, tensor in mine.items():
            tensor.copy_(tensors[key])  # the values only: two guides share no tensor


def put_into_store(flow: JointFlow, name: str) -> None:
    """Makes the store hold this flow's tensors, not those of another one of its name.

    Args:
        flow: The flow.
        name: What the store calls it.
    """
    store = pyro.get_param_store()
    for key, tensor in tensors_by_key(flow, name).items():
        if isinstance(tensor, nn.Parameter):
            if key in store and store[key] is not tensor:
                del store[key]
        elif key not in store or not torch.equal(store[key], tensor):
            if key in store:
                del store[key]
            store[key] = tensor.clone()  # not a pyro.param statement: nobody is to learn it
