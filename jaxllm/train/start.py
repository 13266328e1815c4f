"""What a run derives from its config and tells at its start."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxllm.data.config import DataConfig
from jaxllm.layout.layout import Layout
from jaxllm.layout.schedule_check import report
from jaxllm.layout.schedules import make_schedule
from jaxllm.layout.stages import make_stages
from jaxllm.model.attention_check import check_backend
from jaxllm.model.spec import ModelSpec
from jaxllm.train.config import Config
from jaxllm.train.flops import flops_per_token, peak_flops
from jaxllm.train.optimizer import decay_table, flat_paths
from jaxllm.train.source import Source
from jaxllm.train.state import TrainState, bytes_per_device


def data_config(config: Config, stored: Mapping[str, Any] | None, workdir: Path) -> DataConfig:
    """The data group; a resumed run takes the tokenizer it has, chat template included: none is trained again."""
    tokenizer = workdir / "tokenizer"
    if stored is not None and tokenizer.exists():
        return dataclasses.replace(config.data, tokenizer=str(tokenizer), chat_template="")
    return config.data


def describe_run(config: Config, spec: ModelSpec, layout: Layout, abstract: TrainState, source: Source) -> list[str]:
    """Lines to print at the start: everything that is derived, counted from the trees and the mesh in use.

    Raises:
      UserError: an attention backend that differs from the reference.
    """
    device = jax.devices()[0]
    mesh = " x ".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items() if size > 1) or "one device"
    tokens = config.data.batch_size * source.length
    microbatches = config.layout.num_microbatches
    state, params = bytes_per_device(abstract), bytes_per_device(abstract.params)
    frozen, reference = bytes_per_device(abstract.held), bytes_per_device(abstract.reference)
    peak = peak_flops(device)
    return [
        f"model: {spec.num_parameters:,} parameters, {spec.num_embedding_parameters:,} of them only looked up"
        + (f"; {spec.num_active_parameters:,} at work for a token" if spec.config.num_experts else ""),
        *_adapter_lines(spec, abstract),
        *_decay_lines(config, spec),
        f"devices: {layout.mesh.size} x {device.device_kind}, {mesh}, ZeRO {layout.zero_stage}",
        *_pipeline_lines(layout, spec),
        f"bytes a device at rest: {state:,} ({params:,} of parameters, "
        + (f"{frozen:,} frozen, " if frozen else "")
        + (f"{reference:,} of the reference, " if reference else "")
        + "the rest optimizer)",
        f"{check_backend(layout, spec.config, config.precision.compute)}; compute in {config.precision.compute}",
        f"tokens a step: {tokens:,} = {config.data.batch_size} sequences x {source.length}"
        + (f", in {microbatches} microbatches" if microbatches > 1 else ""),
        f"run: {config.train.steps:,} steps, {config.train.steps * tokens:,} tokens, "
        f"{source.epochs(config.train.steps):.2f} epochs",
        f"FLOPs a token: {flops_per_token(spec, source.length):.4g} = "
        f"{'4 N + 2 trained' if spec.is_adapted else '6 N'} + 12 layers heads head_dim length; "
        + (f"MFU against {peak / 1e12:,.0f} TFLOP/s a device" if peak else "no peak known for this device, so no MFU"),
    ]


def _adapter_lines(spec: ModelSpec, abstract: TrainState) -> list[str]:
    """What is trained, and how the rest is held: its bytes in all."""
    if not spec.is_adapted:
        return []
    trained, base = spec.num_trained_parameters, spec.num_parameters - spec.num_trained_parameters
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract.held))
    config = spec.adapter
    of = f" of {config.places} virtual tokens" if config.places else f" of rank {config.rank}, scale {config.scale:g}"
    return [
        f"adapter: {config.kind}{of}: {trained:,} parameters are trained, {trained / spec.num_parameters:.3%} of all",
        f"frozen: {base:,} parameters in {held:,} bytes, {held / base:.3f} a parameter",
    ]


def _pipeline_lines(layout: Layout, spec: ModelSpec) -> list[str]:
    """The layers of each stage, and what the schedule costs where a backward pass takes three forward passes' time.

    Three, because a stage keeps its input alone and computes the rest of a microbatch again.
    """
    if layout.num_stages == 1:
        return []
    microbatches, virtual = layout.num_microbatches, layout.virtual_stages
    stages = make_stages(spec.config.num_layers, layout.num_stages, virtual, layout.stage_layers)
    table = make_schedule(layout.schedule, layout.num_stages, microbatches, virtual)
    cost = report(table, forward=1, backward_input=2, backward_weight=1)
    return [
        f"pipeline: {layout.num_stages} stages"
        + (f" x {virtual} virtual ones" if virtual > 1 else "")
        + f" of {','.join(map(str, stages.counts))} layers, {layout.schedule}, {microbatches} microbatches, "
        f"{table.num_ticks} ticks, bubble {cost.bubble:.1%}, at most {cost.num_inputs} inputs of a stage kept"
    ]


def _decay_lines(config: Config, spec: ModelSpec) -> list[str]:
    table = decay_table(config.optimizer, spec.trained_axes)
    shapes = {path: list(leaf.shape) for path, leaf in flat_paths(spec.trained(spec.shapes)).items()}
    width = max(map(len, table))
    head = (
        f"weight decay {config.optimizer.weight_decay:g} (config.optimizer.decay_mask={config.optimizer.decay_mask}):"
    )
    return [head, *(f"  {path:<{width}}  {'decayed' if on else '-':<7}  {shapes[path]}" for path, on in table.items())]
