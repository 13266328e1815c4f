"""Opens a run: the model of a WORKDIR's newest checkpoint, in the dtype of compute, on the devices that are here."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxllm.data.tokenizer import Tokenizer, load_tokenizer
from jaxllm.errors import UserError
from jaxllm.generate.decode import Weights
from jaxllm.layout import zero
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import Layout, as_dtype, make_layout
from jaxllm.layout.named import is_named
from jaxllm.layout.scope import joined, like
from jaxllm.model.attention_check import check_backend
from jaxllm.model.spec import ModelSpec, model_spec
from jaxllm.remote.copy import local_copy
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.checks import check_for_use
from jaxllm.train.config import Config, config_dict, read_config
from jaxllm.train.initial import restore_base
from jaxllm.train.state import spread


class Run(NamedTuple):
    """A trained model, ready to be used."""

    config: Config
    spec: ModelSpec
    weights: Weights  # in the dtype of compute
    layout: Layout
    tokenizer: Tokenizer
    step: int  # of the checkpoint


def refuse_bidirectional(run: Run, what: str) -> None:
    """Raises a UserError that says `what` a model does not do whose tokens see those after them."""
    if not run.spec.config.causal:
        raise UserError(f"config.model.causal=False: a model that sees what comes next {what}.")


def read_run_config(workdir: str | Path, flag: str = "--workdir") -> Config:
    """The config that the run in `workdir`, which the user gave as `flag`, was started with.

    A table of rules or a schedule in a Python file of the user's is the default one here: a run that somebody else made
    must not decide which file is executed. Named again by flag, it is taken.

    Raises:
      UserError: no such folder, or one that holds no run.
    """
    given, workdir = str(workdir), local_copy(workdir)
    file = workdir / "config.json"
    if given.startswith("hf:") or list(workdir.glob("*.safetensors*")):
        raise UserError(
            f"{flag} {given} is a Hugging Face directory. Import it first: jaxllm convert "
            f"--from hf:{given.removeprefix('hf:')} --to WORKDIR."
        )
    if not workdir.is_dir():
        raise UserError(f"{flag} {workdir}: no such folder. It is the one that `jaxllm train --workdir` wrote.")
    try:
        return _without_python(read_config(json.loads(file.read_text(encoding="utf-8"))), file)
    except FileNotFoundError:
        raise UserError(f"{flag} {workdir} holds no run: there is no config.json in it.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not JSON: {error.msg}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as the config of a run: {error}.") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _without_python(config: Config, file: Path) -> Config:
    usual, layout = LayoutConfig(), config.layout
    for field in ("rules", "schedule"):
        if is_named(name := getattr(layout, field)):
            other = getattr(usual, field)
            print(
                f"{file}: config.layout.{field}={name} is Python, which a stored config does not run; using {other}. "
                f"If you trust the file: --config.layout.{field}={name}",
                file=sys.stderr,
            )
            layout = dataclasses.replace(layout, **{field: other})
    return dataclasses.replace(config, layout=layout)


def layout_for_use(config: Config, num_devices: int) -> Config:
    """`config` with the layout that generation and evaluation take where the user asks for none.

    The weights are whole but for `model` (ZeRO 0), and the layers run in a loop: an unrolled step copies the cache to
    stack it. The run's mesh is kept where it fits the devices that are here, but what trained parts of sequences
    (`context`) or of the model (`pipeline`) takes rows of the batch (`data`). Where it does not fit, as much of `model`
    as divides the devices is kept, and `data` takes the rest.
    """
    sizes = dataclasses.asdict(config.mesh)
    given = math.prod(size for size in sizes.values() if size != -1)
    fits = num_devices % given == 0 if -1 in sizes.values() else num_devices == given
    folded = rows_only(config.mesh)
    mesh = folded if fits else MeshConfig(data=-1, model=math.gcd(abs(config.mesh.model), num_devices))
    layout = dataclasses.replace(config.layout, zero_stage=0, scan_layers=True)
    return dataclasses.replace(config, mesh=mesh, layout=layout)


def config_for_use(
    workdir: str | Path, change: Callable[[dict[str, Any]], Mapping[str, Any]], own_mesh: bool
) -> Config:
    """The config that the run in `workdir` is used with: its own in `layout_for_use`, then changed as the user asks.

    Args:
      change: lays the user's fields over a config in the form of `config_dict`.
      own_mesh: some of those are of the mesh, which then is the run's own where they leave it.

    Raises:
      UserError: no run there, an unknown field, or a layout that does not fit the devices.
    """
    stored, devices = read_run_config(workdir), jax.device_count()
    usual = layout_for_use(stored, devices)
    if own_mesh:
        usual = dataclasses.replace(usual, mesh=rows_only(stored.mesh))
    config = read_config(change(config_dict(usual)))
    check_for_use(config, devices)
    if config.mesh != rows_only(stored.mesh) and not own_mesh:
        shape = " ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(config.mesh).items() if size != 1)
        print(f"The run's mesh does not fit the {devices} devices here; using {shape}.", file=sys.stderr)
    return config


def rows_only(mesh: MeshConfig) -> MeshConfig:
    """The same devices with those along `context` and `pipeline` moved to `data`."""
    sizes = (mesh.data, mesh.context, mesh.pipeline)
    data = -1 if -1 in sizes else math.prod(sizes)
    return dataclasses.replace(mesh, data=data, context=1, pipeline=1)


def open_run(workdir: str | Path, config: Config | None = None, say: Callable[[str], None] | None = None) -> Run:
    """Restores the newest checkpoint of `workdir` that can be read.

    Args:
      config: the run's, with whatever is to be different; default `layout_for_use` of the run's own.
      say: takes messages about damaged checkpoints; default stderr.

    Raises:
      UserError: no run or no checkpoint there, one of another model, a layout that does not fit, or an attention
        backend that cannot run here or differs from the formula.
    """
    workdir = local_copy(workdir)
    if config is None:
        config = layout_for_use(read_run_config(workdir), jax.device_count())
    for axis in ("pipeline", "context"):
        if (size := getattr(config.mesh, axis)) != 1:
            raise UserError(
                f"config.mesh.{axis}={size}: generation and evaluation split the batch and the model's width only. "
                "Leave it at 1 and give the devices to data or model."
            )
    tokenizer = load_tokenizer(workdir / "tokenizer")
    # z-loss is a part of training, not of what a text costs; and no token is dropped because others are beside it.
    model = dataclasses.replace(config.model, z_loss=0.0, expert_dispatch="dropless")
    spec = model_spec(model.resolved(tokenizer.vocab_size), config.adapter)
    if spec.config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"{workdir / 'tokenizer'} has {tokenizer.vocab_size} pieces, but config.model.vocab_size="
            f"{spec.config.vocab_size}. Put the run's own tokenizer there."
        )
    layout = make_layout(config.mesh, config.layout)
    check_backend(layout, dataclasses.replace(spec.config, attention_dropout=0.0), config.precision.compute)
    step, params = restore_for_use(workdir, config, spec, layout, say or (lambda line: print(line, file=sys.stderr)))
    return Run(config, spec, cast_for_use(params, spec, layout, config.precision.compute), layout, tokenizer, step)


def restore_for_use(
    workdir: Path, config: Config, spec: ModelSpec, layout: Layout, say: Callable[[str], None]
) -> tuple[int, Weights]:
    """(step, float32 parameters) of a run's newest checkpoint; of an adapter's, with those of its base.

    Raises:
      UserError: no checkpoint, or an adapter whose base is not there.
    """
    abstract = at_rest(spec, layout)
    with Checkpoints(workdir / "checkpoints", say=say) as checkpoints:
        restored = checkpoints.restore_params(spec.own(abstract))
    if restored is None:
        raise UserError(f"{workdir} has no checkpoint yet. Train first: jaxllm train --workdir {workdir} …")
    step, params, run = restored
    if spec.is_adapted:
        params = joined(params, restore_base(workdir, config, run["base"], spec.base(abstract), say).params)
    return step, params


def at_rest(spec: ModelSpec, layout: Layout) -> Weights:
    """`jax.ShapeDtypeStruct`s of the float32 parameters, spread over the devices, so that they fit before the cast."""
    return spread(spec.shapes, spec.axes, dataclasses.replace(layout, zero_stage=max(layout.zero_stage, 1)))


def cast_for_use(params: Weights, spec: ModelSpec, layout: Layout, compute: str) -> Weights:
    """The parameters in the dtype `compute`, or as an adapter's base is held, where the layout computes with them."""
    dtype = as_dtype(compute)

    def cast(params: Weights) -> Weights:
        own = jax.tree.map(partial(zero.gather_for_step, layout, dtype=dtype), spec.own(params), spec.own(spec.axes))
        frozen = spec.frozen(params, dtype)
        if not frozen:
            return own
        place = lambda w, a: zero.gather_for_step(layout, w, a, w.dtype)  # noqa: E731
        return joined(own, jax.tree.map(place, frozen, like(spec.held_axes(dtype), frozen)))

    return jax.jit(cast)(params)
