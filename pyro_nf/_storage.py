"""The one file format of the library: tensors and a JSON header in a safetensors file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

FORMAT_VERSION = 2
"""Raised by one whenever older versions of the library could misread a new file.

Version 2 brought the checksum; files of version 1 are read without one.
"""

_METADATA_KEY = "pyro_nf"
_CHECKSUM_KEY = "sha256"


def save_tensors(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
) -> None:
    """Write named tensors and a JSON header to one safetensors file, all or nothing.

    The file is written beside its target under a temporary name, flushed to disk and then renamed:
    a crash at any moment leaves either the old file or the new one, and who reads meanwhile reads
    the old one. A file that is replaced keeps its mode, and a symbolic link to it stays a link.
    Nothing is ever pickled.

    Args:
        path: The file to write; an existing one is replaced.
        kind: What the file holds, for example ``"flow"``; `load_tensors` asks for the same word.
        tensors: The tensors by name. They are copied, so views and shared storage are fine.
        header: Anything that `plain` takes.

    Raises:
        OSError: The directory does not exist or cannot be written, or the path is no file.
        TypeError: The header holds something that JSON cannot.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "example.safetensors"
        >>> save_tensors(path, "example", {"weight": torch.ones(2)}, {"input_dim": 2})
        >>> load_tensors(path, "example")
        ({'weight': tensor([1., 1.])}, {'input_dim': 2})
    """
    metadata = json.dumps({"kind": kind, "version": FORMAT_VERSION, "header": plain(dict(header))})
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    content = safetensors.torch.save(
        copies, metadata={_METADATA_KEY: metadata, _CHECKSUM_KEY: _checksum(metadata, copies)}
    )
    path = Path(path)
    try:
        with _beside(_target(path)) as (file, replace):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            replace()
    except OSError as error:
        raise _cannot_write(path, error) from error


def load_tensors(
    path: str | os.PathLike[str],
    kind: str,
    accept: Callable[[dict[str, Tensor], dict[str, Any]], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Args:
        path: The file to read.
        kind: What the file must hold.
        accept: Gets tensors of the same names, shapes and dtypes on the device ``meta``, and the
            header, before any memory is taken for data; it raises if the file shall not be read.

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
    with refuse_corrupt(path), safetensors.safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if _METADATA_KEY not in metadata:
            raise InvalidFile(
                f"load: {str(path)!r} was not written by pyro_nf (no {_METADATA_KEY!r} there). "
                "Use a file that pyro_nf saved."
            )
        content = json.loads(metadata[_METADATA_KEY])
        version, header = content["version"], content["header"]
        if type(version) is not int or version < 1 or not isinstance(header, dict):
            raise ValueError(f"it has version {version!r} and a {type(header).__name__} for header")
        if version > FORMAT_VERSION:
            raise InvalidFile(
                f"load: {str(path)!r} has format version {version}, this version of pyro_nf "
                f"reads up to {FORMAT_VERSION}. Upgrade pyro_nf to read it."
            )
        if content["kind"] != kind:
            raise InvalidFile(
                f"load: {str(path)!r} holds a {str(content['kind'])[:40]}, wanted a {kind}. "
                "Use another file."
            )
        names = list(file.keys())
        if accept is not None:
            accept({name: _on_meta(file.get_slice(name)) for name in names}, header)
        # copies: the file is mapped into memory, and may be changed under us
        tensors = {name: file.get_tensor(name).clone() for name in names}
        checksum = metadata.get(_CHECKSUM_KEY)
        if checksum is None and version == 1:
            return tensors, header
        if checksum != _checksum(metadata[_METADATA_KEY], tensors):
            raise ValueError("its checksum is of other content")
    return tensors, header


class InvalidFile(ValueError):
    """A file that cannot be used, with the whole reason."""


class OtherDtype(TypeError):
    """A file whose floating numbers have another dtype than the object to fill."""


@contextmanager
def refuse_corrupt(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever the content of a file leads to into one ``ValueError``.

    Args:
        path: The file, for the message.

    Raises:
        ValueError: Something inside failed that was not said by the library itself.
    """
    try:
        yield
    except (InvalidFile, OtherDtype):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:_LONGEST_REASON]}"
        raise InvalidFile(
            f"load: {str(path)!r} is truncated or corrupt ({reason}). Use another copy of the file."
        ) from error


def plain(value: Any, name: str = "header") -> Any:
    """A value as JSON gives it back: numbers of numpy and torch become Python's, tuples lists.

    Args:
        value: Numbers, strings, booleans, None, or mappings and sequences of them.
        name: What the value is, for the message.

    Raises:
        TypeError: There is something that JSON cannot hold.

    Example:
        >>> plain({"hidden_dims": (np.int64(8), 8), "bound": np.float32(0.5)})
        {'hidden_dims': [8, 8], 'bound': 0.5}
    """
    if value is None or isinstance(value, (bool, np.bool_)):
        return None if value is None else bool(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (np.ndarray, Tensor)):
        return plain(value.tolist(), name)
    if isinstance(value, Mapping):
        return {str(key): plain(part, f"{name}[{key!r}]") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part, f"{name}[{i}]") for i, part in enumerate(value)]
    raise TypeError(
        f"save: {name} is a {type(value).__name__}, wanted numbers, strings, or lists of them. "
        "Give what JSON can hold."
    )


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise now the error that writing ``path`` would raise later, after hours of work.

    Args:
        path: The file that will be written.

    Raises:
        OSError: The directory does not exist or cannot be written, or the path is no file.
    """
    path = Path(path)
    try:
        with _beside(_target(path)):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from error


def check_same_tensors(
    what: str, wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], source: str
) -> None:
    """Compare two sets of named tensors by name, shape and dtype.

    Args:
        what: Who asks, for the message.
        wanted: The tensors of the object to fill.
        got: The tensors that were read.
        source: Where they came from, for the message.

    Raises:
        ValueError: Names or shapes differ, or numbers of another kind are there (complex ones, or
            integers for floating numbers); the message lists them.
        TypeError: Only floating dtypes differ: filling the object would round, or seem to be more
            exact than the file.
    """
    both = [name for name in wanted if name in got]
    differences = [
        *(f"{name} is missing" for name in wanted if name not in got),
        *(f"{name} is not known here" for name in got if name not in wanted),
        *(
            f"{name} has shape {tuple(got[name].shape)}, wanted {tuple(wanted[name].shape)}"
            for name in both
            if got[name].shape != wanted[name].shape
        ),
        *(
            f"{name} has dtype {got[name].dtype}, wanted {wanted[name].dtype}"
            for name in both
            if got[name].dtype != wanted[name].dtype
            and not (got[name].is_floating_point() and wanted[name].is_floating_point())
        ),
    ]
    if differences:
        shown = "; ".join(differences[:_MOST_DIFFERENCES])
        more = len(differences) - _MOST_DIFFERENCES
        rest = f"; and {more} more" if more > 0 else ""
        raise InvalidFile(
            f"{what}: {source} is of another architecture: {shown}{rest}. "
            "Build the object with the arguments it had when the file was written."
        )
    for name in both:
        check_same_dtype(what, f"{name} of {source}", got[name], wanted[name])


def check_same_dtype(what: str, name: str, got: Tensor, wanted: Tensor) -> None:
    """Raise unless a floating tensor has the dtype of the one that it is to fill.

    Args:
        what: Who asks, for the message.
        name: The name of the tensor, for the message.
        got: The tensor that was read.
        wanted: The tensor to fill.

    Raises:
        TypeError: The dtypes differ.
    """
    if got.dtype != wanted.dtype and got.is_floating_point() and wanted.is_floating_point():
        raise OtherDtype(
            f"{what}: {name} has dtype {got.dtype}, wanted {wanted.dtype}, that of the object to "
            f"fill. Call .to({got.dtype}) on the object first, and .to({wanted.dtype}) afterwards."
        )


class Bounded(torch.utils._python_dispatch.TorchDispatchMode):
    """Inside, torch may make about as many numbers as some tensors hold, and no more.

    What a file says of itself may ask for far more memory and time than the file is large. The size
    of each result is found on the device ``meta``, which takes no memory, before it is made.

    Args:
        tensors: What the file holds.

    Raises:
        ValueError: From inside, when more is asked for.

    Example:
        >>> with Bounded({"weight": torch.empty(10)}):
        ...     torch.zeros(10**12)
        Traceback (most recent call last):
            ...
        ValueError: it asks for more memory than its 10 numbers need
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.held = sum(tensor.numel() for tensor in tensors.values())
        self.numbers_left = _NUMBERS_MADE * self.held + _FREE_NUMBERS
        self.calls_left = _CALLS * len(tensors) + _FREE_CALLS

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.calls_left -= 1
        self.numbers_left -= _numbers_made(func, args, kwargs)
        if self.numbers_left < 0:
            raise ValueError(f"it asks for more memory than its {self.held} numbers need")
        if self.calls_left < 0:
            raise ValueError("it asks for more layers than its tensors are")
        return func(*args, **kwargs)


# Building a flow makes each of its numbers several times over (empty, random, scaled, masked), and
# each of its tensors by several calls.
_NUMBERS_MADE, _FREE_NUMBERS = 10, 100_000
_CALLS, _FREE_CALLS = 30, 500


def _numbers_made(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many new numbers a call of torch makes, found without making them."""
    if all(returned.alias_info is not None for returned in func._schema.returns):
        return 0  # a view, or what is changed in place
    elsewhere = {k: v for k, v in kwargs.items() if k != "generator"}
    if any(argument.name == "device" for argument in func._schema.arguments):
        elsewhere["device"] = torch.device("meta")
    try:
        args, elsewhere = torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t.to("meta"), (args, elsewhere)
        )
        made = torch.utils._pytree.tree_leaves(func(*args, **elsewhere))
    except (RuntimeError, NotImplementedError):
        return 0  # the size depends on numbers, of which there are few by now
    return sum(tensor.numel() for tensor in made if isinstance(tensor, Tensor))


_MOST_DIFFERENCES = 8  # a message that lists hundreds of names helps nobody
_LONGEST_REASON = 200

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def _on_meta(part: Any) -> Tensor:
    dtype, shape = part.get_dtype(), part.get_shape()
    if dtype not in _DTYPES:
        raise ValueError(f"it holds numbers of kind {dtype}")
    if math.prod(shape) > 2**48:  # of nothing, as the data were found; torch may overflow
        raise ValueError(f"it holds a tensor of shape {tuple(shape)}")
    return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")


def _checksum(metadata: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the metadata and of every tensor's name, dtype, shape and bytes."""
    total = hashlib.sha256(metadata.encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        total.update(tensor_bytes(value))
    return total.hexdigest()


def tensor_bytes(value: Tensor) -> Any:
    """The bytes of a tensor's numbers, in the order of its indices, for a hash."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()  # one number has any stride


def _target(path: Path) -> Path:
    """Where to write: the end of a chain of symbolic links, which is a file or nothing."""
    target = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError("it is a directory; give the name of a file in it")
        if not stat.S_ISREG(mode):
            raise OSError("it is no regular file, and would be replaced by one")
    return target


@contextmanager
def _beside(target: Path) -> Iterator[tuple[Any, Callable[[], None]]]:
    """A temporary file beside the target, and a function that puts it in the target's place."""
    temporary = target.parent / f".pyro_nf-{secrets.token_hex(8)}"
    # the mode of a new file is what the umask leaves of this
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:

            def replace() -> None:
                with suppress(FileNotFoundError):
                    temporary.chmod(stat.S_IMODE(target.stat().st_mode))
                file.close()  # not every system replaces a file that is open
                os.replace(temporary, target)

            yield file, replace
    finally:
        temporary.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError) -> OSError:
    # OSError maps an errno to its subclass, so a PermissionError stays a PermissionError.
    reason = error.strerror or str(error)
    text = f"save: cannot write {str(path)!r}: {reason}. Choose a directory that can be written."
    return OSError(error.errno, text) if error.errno else OSError(text)
