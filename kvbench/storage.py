"""Files of arrays that are written whole or not at all, and refused when a single byte of them has changed.

A file is an ordinary safetensors file.  Its metadata has one entry, "kvbench", a JSON text:

    {"format": "kvbench.cache", "version": 1, "sha256": "<64 hexadecimal digits>", "content": ...}

The checksum is SHA-256 over every byte of the file, with its own 64 digits read as zeros: it covers names, dtypes,
shapes, metadata and padding of the header as well as the data.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets

import numpy as np
import safetensors
import safetensors.numpy

_ZEROS = b"0" * 64
# The metadata entry is JSON inside the header's JSON, so its quotes are escaped.
_CHECKSUM = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')


def write(path: str | os.PathLike, tensors: dict[str, np.ndarray], content, format: str, version: int) -> None:
    """Write `tensors` and the JSON-able `content` to `path` in one step.

    The file is completed and flushed to disk under another name in the same folder and then renamed: at every moment
    `path` is the old file (or absent) or the whole new one, whatever interrupts the call.
    """
    path = os.path.realpath(path)                       # a symbolic link keeps pointing at what it points at
    folder, name = os.path.split(path)
    about = {"format": format, "version": version, "sha256": _ZEROS.decode(), "content": content}
    partial = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.partial")
    try:
        safetensors.numpy.save_file(tensors, partial, {"kvbench": json.dumps(about, allow_nan=False)})
        with open(partial, "r+b") as file:
            header = _read_header(file)
            place = _CHECKSUM.search(header).start(1)
            file.seek(place)
            file.write(_checksum(partial, header, place).encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    _flush_folder(folder)


def read(path: str | os.PathLike, format: str, version: int) -> tuple[dict[str, np.ndarray], object]:
    """(tensors, content) of a file that `write` made; ValueError, with the path, for anything else."""
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            header = _read_header(file)
        about = json.loads(json.loads(header[8:])["__metadata__"]["kvbench"])
        found, found_version = about["format"], about["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path}: not a {format} file: its header is foreign, truncated or damaged") from None
    if found != format:
        raise ValueError(f"{path}: expected a {format} file, got {found!r}")
    if not isinstance(found_version, int) or found_version < 1:
        raise ValueError(f"{path}: damaged: expected a format version of 1 or more, got {found_version!r}")
    if found_version > version:
        raise ValueError(f"{path}: format version {found_version} is newer than this kvbench, which reads versions "
                         f"up to {version}: upgrade kvbench")
    recorded = _CHECKSUM.search(header)
    if recorded is None or recorded[1].decode() != _checksum(path, header, recorded.start(1)):
        raise ValueError(f"{path}: damaged: its checksum does not fit its bytes (truncated, or changed since)")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, about["content"]
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: not a valid safetensors file: {error}") from None


def _read_header(file) -> bytes:
    """The 8 bytes of the header's length (little endian) and the header itself."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:            # before reading: a damaged length must not allocate exabytes
        raise ValueError("no safetensors header")
    return prefix + file.read(length)


def _checksum(path: str, header: bytes, place: int) -> str:
    digest = hashlib.sha256(header[:place] + _ZEROS + header[place + len(_ZEROS):])
    with open(path, "rb") as file:
        file.seek(len(header))
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _flush_folder(folder: str) -> None:
    """Make the rename itself durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
