"""An adapter and its base as one model without an adapter: a WORKDIR like that of an imported one."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import UserError
from jaxllm.generate.run import at_rest, restore_for_use
from jaxllm.interop.hf.load import in_flight, write_json
from jaxllm.interop.hf.whole import whole_or_nothing
from jaxllm.layout.layout import Layout, make_layout
from jaxllm.layout.scope import joined
from jaxllm.model.adapter_config import NO_ADAPTER
from jaxllm.model.frozen import thaw
from jaxllm.model.lora_trees import merged
from jaxllm.model.spec import ModelSpec, model_spec
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.checks import check_for_use
from jaxllm.train.config import Config, config_dict
from jaxllm.train.initial import carry_origin
from jaxllm.train.state import Params

MERGED_STEP = "sft"  # learns what the step lora does, in the whole model


def merge_run(workdir: Path, target: Path, config: Config, say: Callable[[str], None]) -> None:
    """Writes the model that the adapter in `workdir` makes of its base as the WORKDIR `target`.

    Args:
      config: the adapter's, with the layout to read it in.

    Raises:
      UserError: no adapter, one that cannot be merged, or one whose base is not there; nothing is written then.
    """
    if config.adapter.kind == "none":
        raise UserError(
            f"--from {workdir} --to {target}: a WORKDIR becomes another one where it holds an adapter, merged with its "
            "base. This one holds a whole model: --to hf:DIR."
        )
    check_for_use(config, jax.device_count())
    with whole_or_nothing(target) as partial:
        params = merged_params(workdir, config, say)
        written = dataclasses.replace(
            config,
            train_step=MERGED_STEP,
            adapter=NO_ADAPTER,
            data=dataclasses.replace(config.data, tokenizer=str(target / "tokenizer")),
            train=dataclasses.replace(config.train, init_from=""),
        )
        with Checkpoints(partial / "checkpoints", say=say, bytes_in_flight=in_flight(params)) as checkpoints:
            checkpoints.save_params(params, config_dict(written))
        write_json(partial / "config.json", config_dict(written))
        shutil.copytree(workdir / "tokenizer", partial / "tokenizer")
        carry_origin(str(workdir), partial)
    say(f"{target}: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters as float32")


def merged_params(workdir: Path, config: Config, say: Callable[[str], None]) -> Params:
    """The float32 parameters of the model that the adapter in `workdir` makes of its base, spread over the devices.

    Raises:
      UserError: no checkpoint, an adapter that adds tokens and no weights, or one whose base is not there.
    """
    if config.adapter.kind != "lora":
        raise UserError(
            f"--from {workdir} is an adapter of the kind {config.adapter.kind}, which adds tokens and changes no "
            "matrix: it cannot be merged. Keep it beside its base, or write it as PEFT does: --to peft:DIR."
        )
    layout = make_layout(config.mesh, config.layout)
    spec = adapted_spec(workdir, config)
    _, params = restore_for_use(workdir, config, spec, layout, say)
    if config.adapter.base_weights == "nf4":
        say("merged with the base as its 4 bits give it back: that is what the adapter was trained beside")
    return merge(spec, params, layout)


def adapted_spec(workdir: Path, config: Config) -> ModelSpec:
    """The spec of the run in `workdir`, with its adapter."""
    size = config.model.vocab_size or load_tokenizer(workdir / "tokenizer").vocab_size
    return model_spec(config.model.resolved(size), config.adapter)


def merge(spec: ModelSpec, params: Params, layout: Layout) -> Params:
    """The model without an adapter that computes what the adapted one does, in float32; `params` are given up."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, at_rest(model_spec(spec.config), layout))

    def merge(base: Params, own: Params) -> Params:
        computed_with = thaw(spec.frozen(base, jnp.float32), spec.base(spec.axes))
        return merged(spec, joined(computed_with, own))

    return jax.jit(merge, out_shardings=shardings, donate_argnums=0)(spec.base(params), spec.own(params))
