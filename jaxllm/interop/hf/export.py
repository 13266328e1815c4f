"""From a WORKDIR to a Hugging Face directory, a tensor at a time, read back before it gets its name."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial as bind
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.data.tokenizer import Tokenizer, load_tokenizer
from jaxllm.data.tokenizer_files import CONFIG_FILE, GENERATION_FILE, JSON_FILE, MODEL_FILE, TOKEN_IDS
from jaxllm.errors import UserError
from jaxllm.generate.run import restore_for_use
from jaxllm.interop.hf.config import ReadConfig, read_json, write_model
from jaxllm.interop.hf.files import DTYPES, NewTensor, write_tensors
from jaxllm.interop.hf.load import SOURCE_FILE, TOKENIZER_FILES, open_weights, write_json
from jaxllm.interop.hf.tensors import FileTensor, file_tensors, pieces_of
from jaxllm.interop.hf.whole import whole_or_nothing
from jaxllm.interop.merge import merged_params
from jaxllm.layout.layout import as_dtype, make_layout
from jaxllm.layout.scope import path_name
from jaxllm.model.spec import ModelSpec, model_spec
from jaxllm.train.checks import check_for_use
from jaxllm.train.config import Config
from jaxllm.train.initial import ORIGIN

Params = Mapping[str, jax.Array]  # by path


class Origin(NamedTuple):
    """What a WORKDIR knows of the Hugging Face directory that it came from."""

    keys: dict[str, Any] | None  # of its config.json
    dtype: str  # of most tensors
    others: dict[str, str]  # name: dtype
    folder: str = ""  # where it was
    parameter_hash: str = ""  # of the parameters that came from there

    def dtype_of(self, name: str) -> str:
        """The dtype of a tensor."""
        return self.others.get(name, self.dtype)


def export_run(
    workdir: Path, folder: Path, config: Config, dtype: str | None, max_shard_size: int, say: Callable[[str], None]
) -> None:
    """Writes the model of WORKDIR's newest checkpoint as a Hugging Face directory, and verifies what was written.

    An adapter is merged with its base.

    Args:
      config: the run's, with the layout to read it in.
      dtype: of all tensors; default: what they had where they came from, float32 where they were trained here.
      max_shard_size: bytes of a file.

    Raises:
      UserError: no checkpoint, a model that no family describes, or a value that does not fit into the dtype.
    """
    check_for_use(config, jax.device_count())
    origin = read_origin(workdir)
    if dtype:
        origin = origin._replace(dtype=dtype, others={})
    spec = _spec(config, workdir)
    family, keys = write_model(spec.config, origin.keys)
    pieces = pieces_of(family.rows, spec)
    with whole_or_nothing(folder) as partial:
        params = _restore(config, spec, workdir, say)
        tensors = {
            name: _new_tensor(name, tensor, params, as_dtype(origin.dtype_of(name)))
            for name, tensor in file_tensors(pieces).items()
        }
        write_tensors(partial, tensors, max_shard_size)
        ids = _copy_tokenizer(workdir, partial)
        keys |= {key: value for key, value in ids.items() if not origin.keys}
        write_json(partial / "config.json", keys | {"torch_dtype": origin.dtype, "dtype": origin.dtype})
        _verify(partial, ReadConfig(family, spec.config, keys), spec, params, origin)
    say(f"{folder}: {family.architecture}, {spec.num_parameters:,} parameters as {origin.dtype}, read back and equal")


def read_origin(workdir: Path) -> Origin:
    """What is known of the directory that the model in `workdir`, or its first ancestor, came from."""
    folder = workdir / ORIGIN
    if not (folder / "config.json").is_file():
        return Origin(None, "float32", {})
    dtypes = read_json(folder / "dtypes.json")
    source = read_json(folder / SOURCE_FILE) if (folder / SOURCE_FILE).is_file() else {}
    return Origin(read_json(folder / "config.json"), dtypes["dtype"], dtypes["others"], **source)


def _spec(config: Config, workdir: Path) -> ModelSpec:
    size = config.model.vocab_size or load_tokenizer(workdir / "tokenizer").vocab_size
    return model_spec(config.model.resolved(size))


def _restore(config: Config, spec: ModelSpec, workdir: Path, say: Callable[[str], None]) -> dict[str, jax.Array]:
    """The float32 parameters by path, spread over the devices."""
    if config.adapter.kind != "none":
        params = merged_params(workdir, config, say)
    else:
        _, params = restore_for_use(workdir, config, spec, make_layout(config.mesh, config.layout), say)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {path_name(path): leaf for path, leaf in leaves}


def _new_tensor(name: str, tensor: FileTensor, params: Params, dtype: np.dtype) -> NewTensor:
    cast = bind(_cast, name=name, dtype=dtype)
    return NewTensor(tensor.shape, dtype, lambda: as_in_file(tensor, params, cast, dtype))


def as_in_file(
    tensor: FileTensor, params: Params, cast: Callable[[np.ndarray], np.ndarray] = np.asarray, dtype: Any = np.float32
) -> np.ndarray:
    """A tensor of the file, on the host, made of `params`, or of anything of their shapes."""
    made = np.empty(tensor.shape, dtype)
    for piece, index in tensor.pieces:
        for slices, part in parts(params[piece.row.path], index):
            piece.write(made, slices, cast(part))
    return made


def parts(leaf: jax.Array, index: tuple[int, ...]) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """The devices' parts of leaf[index], one after another on the host: (slices of leaf[index], values)."""
    for shard in leaf.addressable_shards:
        bounds = [slice(*s.indices(size)) for s, size in zip(shard.index, leaf.shape, strict=True)]
        counted, inner = bounds[: len(index)], tuple(bounds[len(index) :])
        if shard.replica_id == 0 and all(s.start <= i < s.stop for i, s in zip(index, counted, strict=True)):
            local = tuple(i - s.start for i, s in zip(index, counted, strict=True))
            yield inner, np.asarray(_pick(shard.data, local) if index else shard.data)


@jax.jit
def _pick(x: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    """x[index]; compiled once for all layers."""
    for i in index:
        x = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    return x


def _cast(values: np.ndarray, *, name: str, dtype: np.dtype) -> np.ndarray:
    if dtype == values.dtype:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if dtype == np.float16 and np.isinf(cast).any() and not np.array_equal(np.isinf(cast), np.isinf(values)):
        raise UserError(
            f"--dtype float16: {name} has the value {np.abs(values).max():g}, and float16 ends at 65504. Use bfloat16."
        )
    return cast


def _copy_tokenizer(workdir: Path, folder: Path) -> dict[str, Any]:
    """Copies the tokenizer's files. Returns the ids of special tokens where generation_config.json had to be made."""
    source = workdir / "tokenizer"
    for name in [*TOKENIZER_FILES, GENERATION_FILE]:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (folder / MODEL_FILE).exists() and not any((folder / name).exists() for name in (JSON_FILE, CONFIG_FILE)):
        write_json(folder / CONFIG_FILE, _sentencepiece_config(load_tokenizer(source)))
    if (workdir / ORIGIN / GENERATION_FILE).is_file():
        shutil.copyfile(workdir / ORIGIN / GENERATION_FILE, folder / GENERATION_FILE)
    if (folder / GENERATION_FILE).exists() or not source.is_dir():
        return {}
    tokenizer = load_tokenizer(source)
    ids = dict(zip(TOKEN_IDS, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), strict=True))
    write_json(folder / GENERATION_FILE, {key: value for key, value in ids.items() if value is not None})
    return ids


def _sentencepiece_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json for a sentencepiece model alone, which transformers would read by the model's family."""
    names = {token: name for name, token in tokenizer.specials.items()}
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "mask": tokenizer.mask_id}
    special = {f"{kind}_token": names[token] for kind, token in ids.items() if token in names}
    rest = {"add_bos_token": tokenizer.bos_id is not None, "clean_up_tokenization_spaces": False}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **special, **rest}


def _verify(folder: Path, config: ReadConfig, spec: ModelSpec, params: Params, origin: Origin) -> None:
    """Reads the files as an import would, and compares names, shapes, dtypes and every bit."""
    directory = open_weights(folder, config, spec, pieces_of(config.family.rows, spec))
    for name, tensor in file_tensors(directory.pieces).items():
        dtype = as_dtype(origin.dtype_of(name))
        same = DTYPES[directory.tensors[name].dtype] == dtype
        for piece, index in tensor.pieces if same else ():
            layer = tuple(slice(i, i + 1) for i in index)
            for slices, part in parts(params[piece.row.path], index):
                found = piece.read((*layer, *slices), directory.read, np.dtype(np.float32)).reshape(part.shape)
                wanted = _cast(part, name=name, dtype=dtype).astype(np.float32)
                same = same and np.array_equal(found.view(np.uint32), wanted.view(np.uint32))
        if not same:
            raise RuntimeError(f"{name} was read back from {directory.tensors[name].file} as something else")
