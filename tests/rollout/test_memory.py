"""With LoRA the actor, its critic, its reference and the reward model share one frozen base."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxllm.data.batch import Batch
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import Layout, make_layout
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.spec import ModelSpec, model_spec
from jaxllm.rollout.judge import make_judge
from jaxllm.steps import STEPS
from jaxllm.steps.experience import Experience
from jaxllm.train.config import Config, PrecisionConfig
from jaxllm.train.learner import spec_of, step_options
from jaxllm.train.optimizer import make_optimizer, make_schedule
from jaxllm.train.reference import reference_kind
from jaxllm.train.state import TrainState, abstract_state, bytes_per_device, spread
from jaxllm.train.train_step import make_train_step
from tests.benchmarks.layout_memory import MODEL

LORA = AdapterConfig(kind="lora", rank=16)


def compiled(step: str, layout: Layout, batch: Any) -> tuple[Config, ModelSpec, TrainState, int]:
    """The config, spec and state of a step, and the bytes that it takes: the state and a batch."""
    config = Config(train_step=step, model=MODEL, adapter=LORA, precision=PrecisionConfig(compute="bfloat16"))
    spec = spec_of(config)
    optimizer = make_optimizer(config.optimizer, 1000, spec.trained_axes)
    state = abstract_state(spec, optimizer, layout, "bfloat16", reference_kind(STEPS[step], config))
    made = make_train_step(STEPS[step], spec, optimizer, make_schedule(config.optimizer, 1000), config, layout)
    size = made.trace(state, batch).lower().compile().memory_analysis().argument_size_in_bytes
    return config, spec, state, size


def test_four_models_in_the_memory_of_one():
    """1.1 billion parameters, rank 16, as compiled: what lies at rest is at most 1.15 times an SFT run's."""
    layout = make_layout(MeshConfig(data=1), LayoutConfig(remat="full"), devices=jax.devices()[:1])
    place = layout.sharding("batch", None)
    integers, mask = (jax.ShapeDtypeStruct((1, 128), dtype, sharding=place) for dtype in (np.int32, bool))
    rows = Batch(integers, integers, integers, mask)
    _, _, _, alone = compiled("lora", layout, rows)
    nothing = jax.ShapeDtypeStruct((1, 128), np.float32, sharding=place)
    config, spec, state, learning = compiled("ppo", layout, Experience(*rows, *[nothing] * 5))
    assert reference_kind(STEPS["ppo"], config) == "base" and not state.reference
    scorer = model_spec(dataclasses.replace(MODEL.resolved(), scalar_head=True), LORA)
    options = step_options(STEPS["ppo"], config, None)
    judge = make_judge(STEPS["ppo"], spec, config, layout, options, 1, scorer)
    own = spread(scorer.own(scorer.shapes), scorer.own(scorer.axes), layout)
    judging = judge.trace(state, own, {}, rows).lower().compile().memory_analysis().argument_size_in_bytes
    together = learning + bytes_per_device(own)
    print(f"SFT {alone:,} bytes at rest, PPO {together:,}: {together / alone:.3f}")
    assert alone > 2 * 1_137_772_544
    assert judging <= together <= 1.15 * alone
