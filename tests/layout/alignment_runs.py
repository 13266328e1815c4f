"""Steps of alignment on made-up batches, under any layout: what tests/layout/test_alignment.py compares."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxllm.data.batch import PairBatch
from jaxllm.layout.layout import Layout
from jaxllm.layout.mesh import one_at_a_time
from jaxllm.model.actor_critic import started_run
from jaxllm.model.adapter_config import NO_ADAPTER, AdapterConfig
from jaxllm.steps import STEPS
from jaxllm.steps.experience import Experience
from jaxllm.train.config import Config
from jaxllm.train.learner import spec_of
from jaxllm.train.optimizer import make_optimizer, make_schedule
from jaxllm.train.reference import reference_kind
from jaxllm.train.state import abstract_state, state_of
from jaxllm.train.train_step import make_train_step
from tests.layout.runs import FLOAT32, LLAMA, packed_batch

MODEL = dataclasses.replace(LLAMA, dropout=0.0, attention_dropout=0.0, z_loss=0.0)
LORA = AdapterConfig(kind="lora", rank=4)
NUM_TOKENS = MODEL.vocab_size - 3  # rows of the table that are no tokens
# The step, what it trains, and what of its config differs.
CASES: dict[str, tuple[str, AdapterConfig, dict[str, Any]]] = {
    "reward": ("reward", NO_ADAPTER, {}),
    "dpo": ("dpo", NO_ADAPTER, {}),
    "dpo_lora": ("dpo", LORA, {}),
    "ppo": ("ppo", NO_ADAPTER, {"entropy_weight": 0.01}),
    "ppo_lora": ("ppo", LORA, {}),
    "grpo": ("grpo", NO_ADAPTER, {"kl_weight": 0.04, "aggregation": "sequence_mean"}),
    "grpo_lora": ("grpo", LORA, {"kl_weight": 0.04}),
}


def config_of(case: str) -> Config:
    step, adapter, options = CASES[case]
    model = dataclasses.replace(MODEL, scalar_head=STEPS[step].scalar_head)
    group = dataclasses.replace(getattr(FLOAT32, step), **options)
    rollout = dataclasses.replace(FLOAT32.rollout, temperature=0.8)
    return dataclasses.replace(FLOAT32, train_step=step, adapter=adapter, model=model, rollout=rollout, **{step: group})


@functools.cache
def first_state(case: str):
    """Spec, optimizer and the first state, on the host; its trained weights are already off the reference's."""
    config = config_of(case)
    spec = spec_of(config)
    optimizer = make_optimizer(config.optimizer, 1000, spec.trained_axes)
    kind = reference_kind(STEPS[config.train_step], config)

    def make():
        params = started_run(spec, spec.base(spec.init(0)), 1)
        state = state_of(params, spec, optimizer, "float32", kind)
        moved = jax.tree.map(lambda w: w + 0.01 * jax.random.normal(jax.random.key(w.size), w.shape), state.params)
        return state._replace(params=moved)

    return config, spec, optimizer, kind, jax.device_get(jax.jit(make)())


def host_batch(case: str, number: int) -> Any:
    """Pairs: the two documents of a row, a margin here and there. Experience: one text a row."""
    _, spec, *_ = first_state(case)
    rows, random = packed_batch(spec, number), np.random.default_rng(number + 100)
    rows = rows._replace(tokens=np.minimum(rows.tokens, NUM_TOKENS - 1))
    shape = rows.tokens.shape
    if CASES[case][0] in ("reward", "dpo"):
        margins = np.where(rows.positions + rows.segment_ids == 1, random.random(shape), 0).astype(np.float32)
        return PairBatch(*rows, margins, np.zeros(shape, np.int32))
    said = (random.normal(size=shape).astype(np.float32) * rows.loss_mask for _ in range(5))
    return Experience(*rows, *said)


def run(case: str, layout: Layout, steps: int = 2) -> np.ndarray:
    """Loss, gradient norm and what else each step tells, [steps, metrics]."""
    config, spec, optimizer, kind, first = first_state(case)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(spec, optimizer, layout, "float32", kind))
    state = jax.device_put(first, shardings)
    schedule = make_schedule(config.optimizer, 1000)
    program = make_train_step(STEPS[config.train_step], spec, optimizer, schedule, config, layout, NUM_TOKENS)
    step = one_at_a_time(program)
    seen = []
    for number in range(steps):
        batch = jax.device_put(host_batch(case, number), layout.sharding("batch", None))
        state, metrics = step(state, batch)
        seen.append({name: float(value) for name, value in sorted(metrics.items())})
    return seen
