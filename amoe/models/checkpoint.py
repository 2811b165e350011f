"""The safetensors files of a checkpoint directory as one mapping from tensor names to tensors, read on demand."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from amoe.errors import CheckpointError
from amoe.models.config import read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Half precision can be read (it converts without loss to float32), but nothing runs in it.
BYTES_PER_ELEMENT = {"F32": 4, "BF16": 2, "F16": 2}
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def checkpoint_digest(path: str | Path) -> int:
    """A number that tells checkpoints apart, another training of the same model as well, in milliseconds: workers on
    several hosts must have read the same. Never 0.

    It goes over config.json, the index, and the names, sizes and headers of the weight files with samples of what they
    hold: a difference in a few tensors may stay unseen.
    """
    directory, digest = Path(path), 0
    for name in ("config.json", INDEX):
        if (file := directory / name).is_file():
            digest = zlib.crc32(file.read_bytes(), zlib.crc32(name.encode(), digest))
    for file in sorted(directory.glob("*.safetensors")):
        digest = _add_samples(file, zlib.crc32(f"{file.name} {file.stat().st_size}".encode(), digest))
    return digest or 1


def _add_samples(file: Path, digest: int) -> int:
    """From the beginning, where the header is, to the end."""
    size = file.stat().st_size
    with file.open("rb", buffering=0) as stream:
        for index in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            digest = zlib.crc32(stream.read(_SAMPLE_BYTES), digest)
    return digest


class Checkpoint:
    """Tensors by name, in one file, or in several with or without an index.

    Raises:
        CheckpointError: on construction, if there are no files, the index is wrong, or a file that it names is missing;
            later, if a file is damaged or a tensor is not where it should be. The message names the file or tensor.
    """

    def __init__(self, path: str | Path) -> None:
        self.directory = Path(path)
        self._handles: dict[Path, Any] = {}
        self._file_of = self._find()

    def _find(self) -> dict[str, Path]:
        single, index = self.directory / SINGLE, self.directory / INDEX
        if single.exists():  # as transformers does: the whole file wins over an index
            return dict.fromkeys(self._open(single).keys(), single)
        if index.exists():
            return self._read_index(index)
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.directory}: no *.safetensors file")
        found: dict[str, Path] = {}
        for file in files:
            for name in self._open(file).keys():  # noqa: SIM118 - a handle is not a mapping
                if name in found:
                    raise CheckpointError(f"{file}: tensor {name} is in {found[name].name} too, and there is no index")
                found[name] = file
        return found

    def _read_index(self, index: Path) -> dict[str, Path]:
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map is missing or empty")
        names = list(weight_map.values())
        for name in names:
            if not isinstance(name, str) or os.path.basename(name) != name:
                raise CheckpointError(f"{index}: weight_map names {name!r}, which is not a file of this directory")
        files = {name: self.directory / name for name in set(names)}  # few, and there are thousands of tensors
        for file in files.values():
            if not file.is_file():
                raise CheckpointError(f"{file}: missing, but {INDEX} names it")
        return {name: files[file] for name, file in weight_map.items()}

    def _open(self, file: Path) -> Any:  # safetensors exports no type for its handles
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: damaged, truncated or not a safetensors file: {error}") from None
        return self._handles[file]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def file(self, name: str) -> Path:
        """The file of a tensor."""
        if name not in self._file_of:
            raise CheckpointError(f"{self.directory}: tensor {name} is missing")
        return self._file_of[name]

    def _slice(self, name: str) -> Any:
        file = self.file(name)
        try:
            return self._open(file).get_slice(name)
        except SafetensorError:
            raise CheckpointError(f"{file}: tensor {name} is missing, but {INDEX} says that it is here") from None

    def check(self, name: str, shape: tuple[int, ...]) -> int:
        """Check that a tensor is there, has this shape and a dtype that can be read. Reads no data.

        Returns:
            bytes per element.
        """
        header = self._slice(name)
        found = tuple(header.get_shape())
        if found != shape:
            raise CheckpointError(f"{self.file(name)}: tensor {name} has shape {list(found)}, expected {list(shape)}")
        dtype = header.get_dtype()
        if dtype not in BYTES_PER_ELEMENT:
            known = ", ".join(BYTES_PER_ELEMENT)
            raise CheckpointError(f"{self.file(name)}: tensor {name} has dtype {dtype}, supported are {known}")
        return BYTES_PER_ELEMENT[dtype]

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """A tensor on the CPU, or row `row` of its first dimension: [shape[1], ...]."""
        if row is None:
            return self._open(self.file(name)).get_tensor(name)
        return self._slice(name)[row : row + 1][0]
