"""The one file format of the library: tensors and a JSON header in a safetensors file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

FORMAT_VERSION = 1
"""Raised by one whenever older versions of the library could misread a new file."""

_METADATA_KEY = "pyro_nf"


def save_tensors(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
) -> None:
    """Write named tensors and a JSON header to one safetensors file, all or nothing.

    The file is written beside its target under a temporary name, flushed to disk and then renamed:
    a crash at any moment leaves either the old file or the new one. Nothing is ever pickled.

    Args:
        path: The file to write; an existing one is replaced.
        kind: What the file holds, for example ``"flow"``; `load_tensors` asks for the same word.
        tensors: The tensors by name. They are copied, so views and shared storage are fine.
        header: Anything that JSON can hold.

    Raises:
        OSError: The directory does not exist or cannot be written.
        TypeError: The header holds something that JSON cannot.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "example.safetensors"
        >>> save_tensors(path, "example", {"weight": torch.ones(2)}, {"input_dim": 2})
        >>> load_tensors(path, "example")
        ({'weight': tensor([1., 1.])}, {'input_dim': 2})
    """
    path = Path(path)
    metadata = json.dumps({"kind": kind, "version": FORMAT_VERSION, "header": dict(header)})
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    content = safetensors.torch.save(copies, metadata={_METADATA_KEY: metadata})
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def load_tensors(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Args:
        path: The file to read.
        kind: What the file must hold.

    Returns:
        The tensors by name, on the CPU, and the header.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated or corrupt, was not written by this library, holds
            something else than ``kind``, or was written by a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: there is no file {str(path)!r}. Check the path.")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            content = json.loads(metadata[_METADATA_KEY])
            written_kind, version = content["kind"], content["version"]
            if version > FORMAT_VERSION:
                raise ValueError(
                    f"load: {str(path)!r} has format version {version}, this version of pyro_nf "
                    f"reads up to {FORMAT_VERSION}. Upgrade pyro_nf to read it."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"load: {str(path)!r} is truncated or corrupt ({error}). Use another copy of the file."
        ) from error
    except KeyError as error:
        raise ValueError(
            f"load: {str(path)!r} was not written by pyro_nf (no {error.args[0]!r} there). "
            "Use a file that pyro_nf saved."
        ) from error
    if written_kind != kind:
        raise ValueError(f"load: {str(path)!r} holds a {written_kind}, wanted a {kind}.")
    return tensors, content["header"]


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise now the error that writing ``path`` would raise later, after hours of work.

    Args:
        path: The file that will be written.

    Raises:
        OSError: The directory does not exist or cannot be written, or the path is a directory.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a directory; give the name of a file in it")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from error


def check_same_tensors(
    what: str, wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], source: str
) -> None:
    """Compare two sets of named tensors by name and shape.

    Args:
        what: Who asks, for the message.
        wanted: The tensors of the object to fill.
        got: The tensors that were read.
        source: Where they came from, for the message.

    Raises:
        ValueError: Names or shapes differ; the message lists them.
    """
    differences = [
        *(f"{name} is missing" for name in wanted if name not in got),
        *(f"{name} is not known here" for name in got if name not in wanted),
        *(
            f"{name} has shape {tuple(got[name].shape)}, wanted {tuple(wanted[name].shape)}"
            for name in wanted
            if name in got and got[name].shape != wanted[name].shape
        ),
    ]
    if differences:
        shown = "; ".join(differences[:_MOST_DIFFERENCES])
        more = len(differences) - _MOST_DIFFERENCES
        rest = f"; and {more} more" if more > 0 else ""
        raise ValueError(
            f"{what}: {source} is of another architecture: {shown}{rest}. "
            "Build the object with the arguments it had when the file was written."
        )


_MOST_DIFFERENCES = 8  # a message that lists hundreds of names helps nobody


def _cannot_write(path: Path, error: OSError) -> OSError:
    # OSError maps an errno to its subclass, so a PermissionError stays a PermissionError.
    reason = error.strerror or str(error)
    text = f"save: cannot write {str(path)!r}: {reason}. Choose a directory that can be written."
    return OSError(error.errno, text) if error.errno else OSError(text)
