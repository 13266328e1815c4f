"""How a trainer runs a step, as far as time and memory depend on it, and the constants of the time model.

The planner's own subject is JAXLLM. The others are there so that the model can be held against runs that were
published: what differs between trainers is what they do, each a field with its reason; what is the same for all are the
constants below and the cards' `matmul_efficiency` (clusters.toml).
"""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """The same for every run, card and trainer; fitted to the runs that tests/plan/published.toml marks `fit`."""

    memory_efficiency: float = 0.80  # of a card's bandwidth, by kernels that only move data
    flash_forward: float = 0.62  # of the rate of large products, by flash attention
    flash_backward: float = 0.55
    batched_products: float = 0.70  # of that rate, by the products of unfused attention: many and small
    link_efficiency: float = 0.75  # of the links of a node, by large collectives
    network_efficiency: float = 0.80  # of the network cards
    latency: float = 15e-6  # seconds before a collective moves anything
    network_latency: float = 30e-6  # of one that leaves the node


CONSTANTS = Constants()


@dataclass(frozen=True)
class Practice:
    """What a trainer does."""

    name: str
    flash: bool = True  # attention in one kernel; else its [length, length] scores are written and read
    attention_speed: float = 1.0  # of its flash attention, beside that of cuDNN or FlashAttention 2 and 3
    eager_passes: float = 1.0  # times elementwise work is read and written more often than where a compiler fuses it
    keeps_scores: bool = True  # for the backward pass, where there is no flash attention
    deterministic: bool = False  # the backward pass of attention adds in one order, which costs half as much again
    dropout: bool = False  # on scores and residual: one more mask and pass each
    # Bytes a weight that a microbatch moves to add its gradient to the sum: read the new, read and write the old.
    accumulation_bytes: float = 12
    state_bytes: float = 12  # a weight at rest, spread by ZeRO: float32 master weight, Adam's two moments
    weight_bytes: float = 2  # the copy that computes
    gradient_bytes: float = 4  # the sum, whole below ZeRO 2
    gradient_traffic: float = 4  # bytes a weight in the reduction of gradients
    gather_traffic: float = 2  # bytes a weight when ZeRO gathers weights
    hides_data: float = 0.0  # part of ZeRO's and data parallelism's traffic that runs under the computation at best
    hides_tensor: float = 0.0  # part of tensor parallelism's
    hides_pipeline: float = 0.0
    scatters_stages: bool = False  # a stage sends each of its `model` devices' part, gathered in the next node
    # What the backward pass computes again under `remat`: parts of (matrix products, attention, the rest) of a layer.
    recomputes: tuple[tuple[str, tuple[float, float, float]], ...] = (
        ("none", (0, 0, 0)),
        ("selective", (0, 0, 1)),
        ("full", (1, 1, 1)),
    )
    stage_recomputes: bool = False  # a pipeline's stage keeps its input alone and computes its layers again
    lockstep: bool = False  # all stages of a pipeline end a tick together
    # Tensors of a layer that the backward pass finds where nothing is computed again: of the residual's size (float32
    # ones twice) and of the mlp's hidden units; 0: as many as fused kernels need.
    kept_residuals: float = 4
    kept_hidden: float = 0
    microbatch_gradient: bool = False  # a microbatch's gradient is whole, in the dtype of compute, before it is added
    chunked_loss: bool = False  # the logits are never whole: computed in pieces, again in the backward pass
    copies_gathered: bool = False  # what tensor parallelism gathers is copied once more into the order of the sequence
    host_seconds: float = 0.0  # a layer and microbatch, forward and backward, that the device waits for the host
    logit_bytes: float = 10  # a logit, while the loss and its gradient are computed
    keeps_stage_output: bool = False  # of each microbatch in flight, and a stage's input beside that of its layers
    reserve: float = 0.0  # part of the memory that the allocator holds and cannot use
    context_bytes: float = 0.0  # that nvidia-smi counts besides: the CUDA context, NCCL


# What this project does: XLA's latency-hiding scheduler runs ZeRO's gathers under the layers before them.
JAXLLM = Practice(
    "jaxllm",
    hides_data=0.7,
    stage_recomputes=True,
    lockstep=True,
    kept_residuals=10,  # norms in float32, as XLA keeps them; seen in compiled steps
    kept_hidden=6,
    microbatch_gradient=True,
    keeps_scores=False,
    chunked_loss=True,
)
# Megatron's `selective` computes attention again and keeps the rest (Korthikanti et al. 2022).
AGAIN_ATTENTION = (("none", (0, 0, 0)), ("selective", (0, 1, 0)), ("full", (1, 1, 1)))
# Narayanan et al. 2021, Korthikanti et al. 2022: fused softmax, float16 gradients, nothing under the computation.
MEGATRON_2021 = Practice(
    "Megatron-LM 2021",
    flash=False,
    dropout=True,
    accumulation_bytes=6,
    gradient_bytes=2,
    gradient_traffic=2,
    scatters_stages=True,
    recomputes=AGAIN_ATTENTION,
)
# BLOOM's trials in float16: ZeRO 1 of DeepSpeed's own optimizer.
MEGATRON_DEEPSPEED_FLOAT16 = dataclasses.replace(
    MEGATRON_2021,
    name="Megatron-DeepSpeed, float16",
    scatters_stages=False,
    state_bytes=16,  # and a float32 gradient of its shard, while it updates
    host_seconds=7e-3,  # fitted
    keeps_stage_output=True,
    context_bytes=3e9,
    reserve=0.05,
)
# BLOOM: BF16Optimizer keeps a float32 sum beside the bfloat16 gradients, and shards neither.
MEGATRON_DEEPSPEED = dataclasses.replace(
    MEGATRON_DEEPSPEED_FLOAT16,
    name="Megatron-DeepSpeed, bfloat16",
    accumulation_bytes=12,
    state_bytes=12,
    gradient_bytes=6,
    gradient_traffic=4,
    host_seconds=13e-3,  # it ran with CUDA_LAUNCH_BLOCKING=1; fitted
)
# Megatron-Core: TransformerEngine, gradients summed inside the products, gathers and reductions under the computation.
MEGATRON_CORE = Practice(
    "Megatron-Core",
    accumulation_bytes=8,
    hides_data=0.9,
    hides_tensor=0.6,
    hides_pipeline=0.8,
    scatters_stages=True,
    recomputes=AGAIN_ATTENTION,
)
# Its functional tests: deterministic kernels, no overlap asked for, dropout.
MEGATRON_CORE_TESTS = Practice(
    "Megatron-Core, functional tests",
    dropout=True,
    deterministic=True,
    accumulation_bytes=8,
    recomputes=AGAIN_ATTENTION,
)
# torchtitan: FSDP 2 with float32 shards; `selective` keeps every second product.
TORCHTITAN = Practice(
    "torchtitan",
    accumulation_bytes=0,
    hides_data=0.9,
    copies_gathered=True,
    logit_bytes=14,
    recomputes=(("none", (0, 0, 0)), ("selective", (0.5, 0, 1)), ("full", (1, 1, 1))),
    reserve=0.05,
)
# MaxText with `minimal_flash`: outputs of products and of attention are kept.
MAXTEXT = Practice(
    "MaxText",
    accumulation_bytes=0,
    hides_data=0.9,
)
# Composer's FSDP without a compiler; attention in Triton, which of Hopper's tensor cores used about half.
LLM_FOUNDRY = Practice(
    "llm-foundry",
    accumulation_bytes=0,
    gradient_traffic=2,
    hides_data=0.9,
    attention_speed=0.75,
    eager_passes=2.5,
    logit_bytes=14,
    reserve=0.05,
)
LLM_FOUNDRY_H100 = dataclasses.replace(LLM_FOUNDRY, name="llm-foundry, H100", attention_speed=0.5)
PRACTICES = {
    "jaxllm": JAXLLM,
    "megatron_2021": MEGATRON_2021,
    "megatron_deepspeed": MEGATRON_DEEPSPEED,
    "megatron_deepspeed_float16": MEGATRON_DEEPSPEED_FLOAT16,
    "megatron_core": MEGATRON_CORE,
    "megatron_core_tests": MEGATRON_CORE_TESTS,
    "torchtitan": TORCHTITAN,
    "maxtext": MAXTEXT,
    "llm_foundry": LLM_FOUNDRY,
    "llm_foundry_h100": LLM_FOUNDRY_H100,
}
