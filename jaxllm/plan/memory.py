"""Bytes on a device, counted: what is at rest, and what a step needs besides at its fullest.

Activations are counted from the modules, as Korthikanti et al. 2022 (table 2) do for GPT: what each keeps for its
backward pass. How many microbatches are in flight on a stage is the schedule's affair. `jaxllm plan` compiles the step
and reads XLA's own figures; this is what `--search` ranks by, and what published runs are compared with.
"""

from typing import NamedTuple

from jaxllm.layout.vocabulary import LOGITS_BYTES
from jaxllm.layout.zero import SMALL
from jaxllm.plan.job import Job
from jaxllm.plan.work import stage_weights, weights


class Memory(NamedTuple):
    """Bytes on one device of the stage that needs most."""

    weights: float  # in the dtype of compute
    optimizer: float  # float32 master weights and moments
    gradients: float
    activations: float  # kept for the backward pass
    working: float  # of what is being computed: a layer, gathered weights, logits
    other: float  # what the allocator cannot use, the CUDA context

    @property
    def static(self) -> float:
        """What a step needs whatever the batch."""
        return self.weights + self.optimizer + self.gradients

    @property
    def total(self) -> float:
        return sum(self)


def memory(job: Job) -> Memory:
    """Of the stage that needs most: the first, the last, or the earliest of those with most layers."""
    layers = job.stage_layers
    asked = {0, layers.index(max(layers)), job.stages - 1}
    return max((stage_memory(job, stage) for stage in asked), key=lambda m: m.total)


def stage_memory(job: Job, stage: int) -> Memory:
    """Of one stage."""
    practice, zero = job.practice, job.layout.zero_stage
    held = stage_weights(job, stage) * job.models
    shards = job.mesh["data"]
    trained = held * job.trained
    optimizer = trained * practice.state_bytes / (shards if zero else 1)
    copy = held * practice.weight_bytes * (zero < 3)  # ZeRO 3 gathers from the master weights
    gradients = trained * practice.gradient_bytes / (shards if zero >= 2 else 1)
    if practice.microbatch_gradient and zero < 2 and job.num_microbatches > 1:
        gradients += trained * practice.weight_bytes
    kept = kept_bytes(job)
    layers = job.stage_layers[stage]
    activations, working = _in_flight(job, stage, layers, kept)
    working += _gathered(job) + _logits(job) * (stage == job.stages - 1)
    before = copy + optimizer + gradients + activations + working
    other = before * practice.reserve / (1 - practice.reserve) + practice.context_bytes
    return Memory(copy, optimizer, gradients, activations, working, other)


def _residual(job: Job) -> float:
    """Bytes of the residual stream of a microbatch where it rests between blocks."""
    split = job.tensor if job.layout.sequence_parallel else 1
    return job.tokens * job.model.embed_dim * job.itemsize / split


def full_bytes(job: Job) -> float:
    """What one layer keeps of a microbatch where nothing is computed again."""
    practice = job.practice
    return layer_bytes(job, practice.kept_residuals, practice.kept_hidden)


def layer_bytes(job: Job, residuals: float = 4, hidden_tensors: float = 0) -> float:
    """The activations of a layer: so many tensors of the residual and of the hidden units, and those of attention."""
    model, size, tensor = job.model, job.itemsize, job.tensor
    masks = job.practice.dropout * _residual(job)  # two, of a byte an element
    residual = residuals * _residual(job) + masks  # inputs of the norms, of attention and of the mlp
    heads = (2 * model.num_heads + 2 * max(model.num_kv_heads, tensor)) * model.head_dim / tensor
    routed = job.tokens * (model.experts_per_token if model.num_experts else 1)
    hidden = routed * (hidden_tensors or (3 if model.gated_mlp else 2)) * model.mlp_dim / tensor
    dispatched = 2 * routed * model.embed_dim * bool(model.num_experts)
    inside = size * (job.tokens * heads + hidden + dispatched)
    return residual + inside + _score_bytes(job)


def _score_bytes(job: Job) -> float:
    if job.practice.flash or not job.practice.keeps_scores:
        return 4 * job.tokens * job.model.num_heads / job.tensor
    each = job.itemsize + job.practice.dropout * (job.itemsize + 1)
    return each * job.tokens * job.length * job.model.num_heads / job.tensor


def kept_bytes(job: Job) -> float:
    """What one layer keeps of a microbatch under the remat policy."""
    products, attention, rest = job.recomputes
    if (products, attention, rest) == (0, 0, 0):
        return full_bytes(job)
    if attention and not products:
        return full_bytes(job) - _score_bytes(job)
    if products == 1:
        return _residual(job)
    model, size, tensor = job.model, job.itemsize, job.tensor
    ups = 2 if model.gated_mlp else 1
    outputs = (model.num_heads + 2 * max(model.num_kv_heads, tensor)) * model.head_dim / tensor
    outputs += (ups * model.mlp_dim / tensor) * (model.experts_per_token if model.num_experts else 1)
    of_products = size * job.tokens * outputs + _residual(job)  # that of the mlp is only added
    attended = size * job.tokens * model.num_heads * model.head_dim / tensor
    return _residual(job) + attended + (1 - products) * of_products


def _in_flight(job: Job, stage: int, layers: int, kept: float) -> tuple[float, float]:
    """Kept activations, and what the backward pass of one layer needs besides."""
    count, stages, virtual = job.num_microbatches, job.stages, job.layout.virtual_stages
    recomputes = any(job.recomputes)
    working = (1.5 if recomputes else 0.5) * layer_bytes(job)
    if stages == 1:
        return layers * kept, working
    live = count if job.layout.schedule == "gpipe" else min(stages - stage, count)
    if virtual > 1:
        live = min(stages * (1 + (stages - 1) / (stages * virtual)), count)
    if job.practice.stage_recomputes:
        slots = (2 * stages - 1 if job.layout.schedule == "1f1b_aligned" else live) * virtual + 3
        return slots * _residual(job) + layers / virtual * kept, working
    more = live * 2 * _residual(job) * job.practice.keeps_stage_output
    return live * layers * kept + more, working


def _gathered(job: Job) -> float:
    """Weights of the layers in use, where ZeRO 3 gathers them: one at work, one on its way; in the backward pass with
    their gradients."""
    if job.layout.zero_stage < 3 or job.mesh["data"] == 1:
        return 0.0
    each = weights(job)
    layer = each.layer + each.experts
    whole = each.table * each.tables if job.stages == 1 else each.table
    small = SMALL  # below it a weight is gathered once a step
    return job.practice.weight_bytes * (2 * layer + whole + small) + job.practice.gradient_bytes * layer


def _logits(job: Job) -> float:
    count = job.tokens * job.model.vocab_size / job.tensor
    if job.practice.chunked_loss:
        return min(count * job.practice.logit_bytes, 3 * LOGITS_BYTES)
    return count * job.practice.logit_bytes
