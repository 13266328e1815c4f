"""What one device does for one microbatch: products, attention, memory traffic and messages, counted from the model.

Counts follow the modules (model/, layout/vocabulary.py), sizes the layout. Forward passes are listed; the backward pass
is derived from them in plan/time.py.
"""

import math
from typing import NamedTuple

from jaxllm.plan.job import Job


class Product(NamedTuple):
    """A matrix product [m, k] x [k, n] on one device."""

    name: str
    m: float
    k: float
    n: float

    @property
    def flops(self) -> float:
        return 2 * self.m * self.k * self.n


class Attention(NamedTuple):
    """Self-attention of one microbatch on one device."""

    flops: float  # forward, as computed: half of the full square where a flash kernel skips what no token sees
    scores: float  # elements of the [length, length] scores that are written; 0 in a flash kernel


class Message(NamedTuple):
    """A collective of one microbatch or of a step, on one device."""

    name: str
    kind: str  # all-reduce | all-gather | reduce-scatter | all-to-all | permute
    axis: str
    bytes: float  # of the whole: the result of a gather, the operand of a reduction, what a permute sends


class LayerWork(NamedTuple):
    """The forward pass of one layer."""

    products: tuple[Product, ...]
    attention: Attention
    moved_bytes: float  # read and written by everything else: norms, residual, activation, rotation
    messages: tuple[Message, ...]

    @property
    def flops(self) -> float:
        return sum(product.flops for product in self.products) + self.attention.flops


def layer_work(job: Job) -> LayerWork:
    """Of one layer of the model."""
    model, tensor, tokens = job.model, job.tensor, job.tokens
    heads, kv_heads = model.num_heads / tensor, max(model.num_kv_heads / tensor, 1)
    embed, head_dim, size = model.embed_dim, model.head_dim, job.itemsize
    products = [
        Product("query, key, value", tokens, embed, (heads + 2 * kv_heads) * head_dim),
        Product("attention's output", tokens, heads * head_dim, embed),
    ]
    ups = 2 if model.gated_mlp else 1
    hidden = model.mlp_dim / tensor
    routed = tokens * (model.experts_per_token if model.num_experts else 1)
    products += [
        Product("mlp, in", routed, embed, ups * hidden),
        Product("mlp, out", routed, hidden, embed),
    ]
    if model.num_experts:
        products.append(Product("router", tokens, embed, model.num_experts))
    return LayerWork(
        tuple(products), _attention(job, heads), _moved(job, heads, kv_heads, routed), _messages(job, size)
    )


def _attention(job: Job, heads: float) -> Attention:
    model = job.model
    seen = min(job.length, model.sliding_window or job.length)
    square = job.tokens * seen * heads
    # A flash kernel skips what no token sees; attention in blocks of queries a little less; whole scores nothing.
    skips = 0.5 if job.practice.flash else 0.56 if not job.practice.keeps_scores else 1.0
    causal = skips if model.causal and not model.sliding_window else 1.0
    return Attention(4 * square * model.head_dim * causal, 0 if job.practice.flash else square * causal)


def _moved(job: Job, heads: float, kv_heads: float, routed: float) -> float:
    """Bytes of a layer's elementwise work, each operand read and each result written once, fused as compilers do."""
    model, size = job.model, job.itemsize
    residual = job.tokens * model.embed_dim / (job.tensor if job.layout.sequence_parallel else 1)
    norms = 2 * 2 * residual
    additions = 2 * (3 if job.practice.dropout else 2) * residual + job.practice.dropout * 2 * 0.5 * residual
    activation = (3 if model.gated_mlp else 2) * routed * model.mlp_dim / job.tensor
    rotation = 2 * job.tokens * (heads + kv_heads) * model.head_dim * (model.positions == "rope")
    # Tokens to experts and back: gathered, scattered and weighted.
    dispatch = 4 * routed * model.embed_dim * bool(model.num_experts)
    return size * (norms + additions + activation + rotation + dispatch)


def _messages(job: Job, size: int) -> tuple[Message, ...]:
    model, tokens = job.model, job.tokens
    found = []
    whole = tokens * model.embed_dim * size
    if job.tensor > 1:
        kinds = ("all-gather", "reduce-scatter") if job.layout.sequence_parallel else ("all-reduce",)
        for block in ("attention", "mlp"):
            found += [Message(f"residual stream, {block}", kind, "model", whole) for kind in kinds]
    if model.num_experts and job.mesh["expert"] > 1:
        routed = tokens * model.experts_per_token * model.embed_dim * size
        found += [Message(f"tokens, {way} experts", "all-to-all", "expert", routed) for way in ("to", "from")]
    if job.mesh["context"] > 1:
        keys = job.tokens * 2 * model.num_kv_heads / job.tensor * model.head_dim * size
        found.append(Message("keys and values", "all-gather", "context", keys * job.mesh["context"]))
    return tuple(found)


class EndWork(NamedTuple):
    """Before the layers and after them."""

    products: tuple[Product, ...]  # of the head, forward
    moved_bytes: float  # of the loss, forward and backward: passes over the logits
    lookup_bytes: float


def end_work(job: Job) -> EndWork:
    """The embedding and the head with its loss, for one microbatch."""
    model = job.model
    vocab = math.ceil(model.vocab_size / job.tensor)
    logits = job.tokens * vocab
    # float32 logits written and read by the maximum, the exponential and the gradient, and the bfloat16 ones beside.
    return EndWork(
        (Product("head", job.tokens, model.embed_dim, vocab),),
        22 * logits,
        3 * job.tokens * model.embed_dim * job.itemsize,
    )


class Weights(NamedTuple):
    """Parameters on one device, split by tensor and expert parallelism alone."""

    layer: float  # of one layer, experts left out
    experts: float  # of one layer
    table: float  # one table of the vocabulary
    tables: int  # 1 where embedding and head are tied


def weights(job: Job) -> Weights:
    """Counted from the sizes; small vectors (norms, biases) are left out: below 0.1 % of any model worth a plan."""
    model = job.model
    query = model.num_heads * model.head_dim * model.embed_dim
    attention = 2 * query + 2 * model.num_kv_heads * model.head_dim * model.embed_dim
    mlp = (3 if model.gated_mlp else 2) * model.embed_dim * model.mlp_dim
    experts = model.num_experts * mlp / (job.tensor * job.mesh["expert"])
    dense = attention + (0 if model.num_experts else mlp) + model.num_experts * model.embed_dim * job.tensor
    table = model.vocab_size * model.embed_dim / job.tensor
    return Weights(dense / job.tensor, experts, table, 1 if model.tied_head else 2)


def stage_weights(job: Job, stage: int) -> float:
    """Parameters of one device of a stage, before ZeRO: its layers, and the table at the ends."""
    each = weights(job)
    held = job.stage_layers[stage] * (each.layer + each.experts)
    if job.stages == 1:
        return held + each.tables * each.table
    return held + each.table * (stage in (0, job.stages - 1))


def most_weights(job: Job) -> float:
    """`stage_weights` of the stage that has most, of all models in training."""
    return max(stage_weights(job, stage) for stage in range(job.stages)) * job.models


def stage_message(job: Job) -> Message:
    """What a stage sends to the next at a time: the residual stream of a microbatch, or each device its part of it."""
    sent = job.tokens * job.model.embed_dim * job.itemsize
    parts = job.tensor if job.practice.scatters_stages or job.layout.sequence_parallel else 1
    return Message("between stages", "permute", "pipeline", sent / parts)


def data_messages(job: Job) -> list[Message]:
    """The traffic of ZeRO and data parallelism a step, of the stage with most weights (Rajbhandari et al. 2020)."""
    held = most_weights(job)
    zero, practice, found = job.layout.zero_stage, job.practice, []
    gradient, weight = held * job.trained * practice.gradient_traffic, held * practice.gather_traffic
    trained_weight = weight * job.trained
    if job.mesh["data"] > 1:
        if zero == 0:
            found.append(Message("gradients", "all-reduce", "data", gradient))
        elif zero == 1:
            found.append(Message("gradients", "reduce-scatter", "data", gradient))
            found.append(Message("weights", "all-gather", "data", trained_weight))
        else:
            times = job.num_microbatches
            found.append(Message("gradients", "reduce-scatter", "data", gradient * times))
            gathers = 1 if zero == 2 else 2 * times
            found.append(Message("weights", "all-gather", "data", (weight if zero == 3 else trained_weight) * gathers))
    if job.mesh["replica"] > 1:
        part = gradient / (job.mesh["data"] if zero else 1)
        found.append(Message("gradients", "all-reduce", "replica", part))
    if job.mesh["expert"] > 1 and zero < 2:
        dense = gradient * weights(job).layer / (weights(job).layer + weights(job).experts)
        found.append(Message("gradients", "all-reduce", "expert", dense))
    return found
