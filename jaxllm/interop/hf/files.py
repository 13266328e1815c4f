"""Safetensors files of a directory: what is in them, slices of it, and new ones, a tensor at a time.

Nothing else is ever opened for weights: a pickle can run code.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxllm.errors import UserError
from jaxllm.interop.hf.config import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin", "tf_model.h5", "flax_model*.msgpack")
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    name: str  # as the file has it
    shape: tuple[int, ...]
    dtype: str  # as the format writes it: F32, BF16, …

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        """A part of it. The file is mapped for this read alone, so that what was read does not stay in memory."""
        with safe_open(self.file, framework="np") as opened:
            return opened.get_slice(self.name)[slices]


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the directory, from the headers of its files.

    Raises:
      UserError: no safetensors files, a file that is missing or truncated, or one tensor in two files.
    """
    return tensors_of(_files(folder))


def tensors_of(files: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor of these files, from their headers. Raises as `find_tensors`."""
    tensors: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118  it is no dict
                    part = opened.get_slice(name)
                    if name in tensors:
                        raise UserError(f"{file}: the tensor {name} is in {tensors[name].file.name} too.")
                    tensors[name] = Stored(file, name, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} is not a whole safetensors file ({error}). Fetch it again: it may be truncated."
            ) from None
    return tensors


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{folder / INDEX}: has no weight_map of tensors to files.")
        files = sorted(set(names.values()))
        for name in files:
            if Path(name).name != name or not (folder / name).is_file():
                tensor = next(tensor for tensor, file in names.items() if file == name)
                raise UserError(f"{folder / INDEX} puts {tensor} into {name}, but there is no such file. Fetch it.")
        return [folder / name for name in files]
    refuse_pickles(folder)
    raise UserError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX} is there.")


def refuse_pickles(folder: Path) -> None:
    """Says of a directory without safetensors that its weights are in a pickle, where they are."""
    pickles = sorted({path.name for pattern in PICKLES for path in folder.glob(pattern)})
    if pickles:
        raise UserError(
            f"{folder / pickles[0]} is not opened: a pickle can run code, so weights are read from safetensors only.\n"
            "Convert it in Python, where you trust it: model.save_pretrained(DIR, safe_serialization=True)."
        )


class NewTensor(NamedTuple):
    """A tensor to write."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]  # of that shape and dtype, C-contiguous

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_tensors(folder: Path, tensors: Mapping[str, NewTensor], max_shard_size: int) -> None:
    """Writes model.safetensors or, above `max_shard_size` bytes, shards with an index. One tensor at a time is made."""
    shards = _shards(tensors, max_shard_size)
    if len(shards) == 1:
        write_file(folder / WEIGHTS, shards[0], tensors)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, names, tensors)
        weight_map |= dict.fromkeys(names, file)
    metadata = {
        "total_size": sum(tensor.size for tensor in tensors.values()),
        "total_parameters": sum(tensor.size // tensor.dtype.itemsize for tensor in tensors.values()),
    }
    content = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, NewTensor], max_shard_size: int) -> list[list[str]]:
    """The names of each file, in order: as many as fit, one at least."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.size > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.size
    return shards


def write_file(file: Path, names: Iterable[str], tensors: Mapping[str, NewTensor]) -> None:
    """Writes some of the tensors to one file.

    The format: 8 bytes, the length of a JSON header padded to 8, the header, the data end to end.

    Wider types first, then by name: in the order of the format's own writer.
    """
    names = sorted(names, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        place = [offset, offset := offset + tensor.size]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            opened.write(tensors[name].make().view(np.uint8).data)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "1024"; units are powers of 1000, as transformers counts them.

    Raises:
      UserError: another form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--max_shard_size {text}: write a size such as 5GB or 500MB.")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
