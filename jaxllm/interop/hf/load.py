"""From a Hugging Face directory to a WORKDIR, each device's part of each parameter made from slices of the files."""

import dataclasses
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.data.tokenizer_files import CARRIED, FILES, GENERATION_FILE, JSON_FILE, MODEL_FILE, TOKEN_IDS
from jaxllm.errors import UserError
from jaxllm.generate.run import at_rest
from jaxllm.interop.hf.config import ReadConfig, read_model
from jaxllm.interop.hf.family import Family
from jaxllm.interop.hf.files import DTYPES, Stored, find_tensors
from jaxllm.interop.hf.tensors import Piece, file_tensors, pieces_of
from jaxllm.interop.hf.whole import whole_or_nothing
from jaxllm.layout.layout import Layout, make_layout
from jaxllm.layout.scope import path_name
from jaxllm.model.spec import ModelSpec, model_spec
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.checks import check_for_use
from jaxllm.train.config import Config, config_dict
from jaxllm.train.initial import ORIGIN

TOKENIZER_FILES = tuple(name for name in (*FILES, *CARRIED) if name != GENERATION_FILE)
SOURCE_FILE = "source.json"  # in ORIGIN: the folder that was read, and the hash of the parameters that it gave
COMPARED_AT_ONCE = 1 << 24  # elements
BYTES_IN_FLIGHT = 1 << 28  # of a save, at least: enough to keep a disk busy


class Directory(NamedTuple):
    """A Hugging Face directory whose names, shapes and dtypes were found right."""

    config: ReadConfig
    spec: ModelSpec
    pieces: dict[str, Piece]  # by path of the parameter
    tensors: dict[str, Stored]  # by the name that transformers writes
    left_out: list[str]  # parameters of heads that the model does not have

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        return self.tensors[name].read(slices)


def import_directory(folder: Path, workdir: Path, config: Config, say: Callable[[str], None]) -> None:
    """Writes the WORKDIR of the model in `folder`; `config` has the layout to read it in.

    Raises:
      UserError: the directory is no model that is computed here, or not whole; nothing is written then.
    """
    directory = open_directory(folder)
    for line in _remarks(directory):
        say(line)
    config = dataclasses.replace(config, model=directory.spec.config)
    check_for_use(config, jax.device_count())
    layout = make_layout(config.mesh, config.layout)
    with whole_or_nothing(workdir) as partial:
        if _copy_tokenizer(folder, partial / "tokenizer", directory.config.keys):
            tokenizer = dataclasses.replace(config.data, tokenizer=str(workdir / "tokenizer"))
            config = dataclasses.replace(config, data=tokenizer)
        else:
            say(
                f"{folder} has no {JSON_FILE} and no {MODEL_FILE}: put a tokenizer into {workdir / 'tokenizer'} before "
                "you use the model."
            )
        params = load_params(directory, layout)
        with Checkpoints(partial / "checkpoints", say=say, bytes_in_flight=in_flight(params)) as checkpoints:
            parameter_hash = checkpoints.save_params(params, config_dict(config))
        write_json(partial / "config.json", config_dict(config))
        _keep_origin(folder, partial / ORIGIN, directory, parameter_hash)
    spec = directory.spec
    say(f"{workdir}: {directory.config.family.architecture}, {spec.num_parameters:,} parameters as float32")


def open_directory(folder: Path) -> Directory:
    """Reads config.json and the headers of the weights, and holds one against the other.

    Raises:
      UserError: what is missing, unexpected, misshapen or of another dtype, by name.
    """
    if not folder.is_dir():
        raise UserError(f"--from hf:{folder}: no such folder. It is a local one; nothing is downloaded.")
    if not (folder / "config.json").is_file():
        raise UserError(f"--from hf:{folder}: there is no config.json in it, so it is no Hugging Face model.")
    config = read_model(folder / "config.json")
    spec = model_spec(config.model)
    pieces = pieces_of(config.family.rows, spec)
    if without := [path for path in spec.parameters if path not in pieces]:
        raise UserError(f"{config.family.architecture} has no tensor for {', '.join(without)}.")
    return open_weights(folder, config, spec, pieces)


def open_weights(folder: Path, config: ReadConfig, spec: ModelSpec, pieces: dict[str, Piece]) -> Directory:
    """The directory of a model that is known. Raises as `open_directory`."""
    family, expected = config.family, file_tensors(pieces)
    copies = _copies(family, pieces)
    tensors: dict[str, Stored] = {}
    left_out, unexpected, copied = [], [], {}
    for name, stored in find_tensors(folder).items():
        called = _name_today(name, family, expected)
        if called in expected and called not in tensors:
            tensors[called] = stored
        elif called in copies:
            copied[called] = stored
        elif re.fullmatch(family.left_out, name):
            left_out.append(name)
        elif not re.fullmatch(family.buffers, name):
            unexpected.append(name)
    _refuse_names(folder, family, [name for name in expected if name not in tensors], unexpected)
    for name, stored in tensors.items():
        if stored.shape != expected[name].shape:
            raise UserError(
                f"{stored.file}: {stored.name} is {list(stored.shape)}, but config.json makes it "
                f"{list(expected[name].shape)}."
            )
        if stored.dtype not in DTYPES:
            raise UserError(
                f"{stored.file}: {stored.name} is of type {stored.dtype}; {', '.join(DTYPES)} are read. "
                "Save the model in one of those."
            )
    for name, stored in copied.items():
        _check_copy(stored, tensors[copies[name]])
    return Directory(config, spec, pieces, tensors, left_out)


def _name_today(name: str, family: Family, expected: Iterable[str]) -> str:
    """The name with the base model's prefix, in today's spelling."""
    for old, new in family.renamed.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return family.prefix + name if family.prefix + name in expected else name


def _copies(family: Family, pieces: Mapping[str, Piece]) -> dict[str, str]:
    """Tensors that some files write a second time: the tied head, and its bias."""
    first = lambda path: next(pieces[path].names())[1]  # noqa: E731
    copies = {} if "output.table" in pieces else {family.head: first("embedding.table")}
    return copies | ({family.head_bias: first("head_bias.bias")} if family.head_bias else {})


def _refuse_names(folder: Path, family: Family, missing: list[str], unexpected: list[str]) -> None:
    what = f"{folder}: the config.json is that of a {family.architecture}"
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{what}, but its files have no tensor {missing[0]}{more}.")
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise UserError(f"{what}, which has no place for the tensor {unexpected[0]}{more} in its files.")


def _check_copy(copy: Stored, original: Stored) -> None:
    """Refuses a head that config.json says is tied and that is another matrix all the same."""
    same = copy.shape == original.shape
    rows = max(COMPARED_AT_ONCE // int(np.prod(original.shape[1:])), 1)
    for start in range(0, original.shape[0] if same else 0, rows):
        part = (slice(start, min(start + rows, original.shape[0])), *[slice(None)] * (len(original.shape) - 1))
        same = same and np.array_equal(copy.read(part), original.read(part))
    if not same:
        raise UserError(
            f"{copy.file}: {copy.name} differs from {original.name}, but config.json says that they are one "
            '("tie_word_embeddings": true). Set that to false if the head is a matrix of its own.'
        )


def load_params(directory: Directory, layout: Layout) -> dict[str, Any]:
    """The float32 parameters, spread over the devices; the host holds one device's part of one at a time."""

    def load(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        piece = directory.pieces[path_name(path)]
        return _assemble(leaf, lambda slices: piece.read(slices, directory.read, np.dtype(np.float32)))

    return jax.tree_util.tree_map_with_path(load, at_rest(directory.spec, layout))


def in_flight(params: dict[str, Any]) -> int:
    """Bytes to write at once: more than the largest part that a device has of a parameter."""
    parts = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params)]
    return max(BYTES_IN_FLIGHT, 2 * max(parts))


def _assemble(leaf: jax.ShapeDtypeStruct, read: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """As `jax.make_array_from_callback`, which would hold the parts of all devices on the host at once."""
    by_part: dict[tuple, list[jax.Device]] = {}
    for device, slices in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        by_part.setdefault(tuple((s.start, s.stop) for s in slices), []).append(device)
    arrays = []
    for bounds, devices in by_part.items():
        part = read(tuple(slice(*bound) for bound in bounds))
        arrays += [jax.block_until_ready(jax.device_put(part, device)) for device in devices]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def _remarks(directory: Directory) -> list[str]:
    lines = []
    if directory.config.keys.get("auto_map"):
        lines.append("auto_map is ignored: no code of the directory is run, the model is the one known here.")
    if directory.left_out:
        names = ", ".join(directory.left_out)
        lines.append(f"left out, since a {directory.config.family.architecture} does not have them: {names}")
    return lines


def _copy_tokenizer(folder: Path, to: Path, keys: Mapping[str, Any]) -> bool:
    """Copies the files of a tokenizer, and the special tokens that the model's own files name."""
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not {JSON_FILE, MODEL_FILE}.intersection(found):
        return False
    to.mkdir(parents=True)
    for name in [*found, GENERATION_FILE]:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)
    ids = {key: keys[key] for key in TOKEN_IDS if keys.get(key) is not None}
    if ids and not (to / GENERATION_FILE).exists():
        write_json(to / GENERATION_FILE, ids)
    return True


def _keep_origin(folder: Path, to: Path, directory: Directory, parameter_hash: str) -> None:
    """What an export gives back: keys of config.json that mean nothing here, the dtypes, and where it all was."""
    to.mkdir()
    for name in ("config.json", GENERATION_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)
    dtypes = {name: DTYPES[stored.dtype].name for name, stored in directory.tensors.items()}
    common = Counter(dtypes.values()).most_common(1)[0][0]
    others = {name: dtype for name, dtype in dtypes.items() if dtype != common}
    write_json(to / "dtypes.json", {"dtype": common, "others": others})
    write_json(to / SOURCE_FILE, {"folder": str(folder.absolute()), "parameter_hash": parameter_hash})


def write_json(file: Path, value: Any) -> None:
    """Writes an object as people read it."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
