"""Seconds of a step: a roofline for each class of operation, put together as the schedule does.

A matrix product takes the longer of its arithmetic at the card's sustained rate, less what tiles and waves leave idle,
and its memory traffic. Attention runs at a part of that rate, elementwise work at a part of the memory's. A collective
moves its bytes along a ring through the slower of the node's links and the network cards of its members. A pipeline
fills, runs and drains (or, in lock step, ends each tick with its slowest stage). What the trainer runs under the
computation is taken off, up to what there is of it.
"""

import math
from typing import NamedTuple

import numpy as np

from jaxllm.layout.named import is_named
from jaxllm.layout.schedules import Action, make_schedule
from jaxllm.plan.clusters import GIGA, Cluster
from jaxllm.plan.job import Job
from jaxllm.plan.practice import CONSTANTS, Constants
from jaxllm.plan.work import (
    Attention,
    Message,
    Product,
    data_messages,
    end_work,
    layer_work,
    most_weights,
    stage_message,
    weights,
)

TILE = (128, 256)  # of a matrix product's result, that one multiprocessor makes at a time
OPTIMIZER_BYTES = 28  # a weight: gradient, weight and two moments read; weight and moments written


class Pass(NamedTuple):
    """Seconds of one pass through something, by what they are spent on."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0  # exposed communication inside a layer
    experts: float = 0.0
    context: float = 0.0
    host: float = 0.0  # the device waits for the host

    @property
    def total(self) -> float:
        return sum(self)

    def times(self, factor: float) -> "Pass":
        return Pass(*(factor * part for part in self))

    def plus(self, *others: "Pass") -> "Pass":
        return Pass(*(sum(parts) for parts in zip(self, *others, strict=True)))


class StepTime(NamedTuple):
    """Seconds of a step on the critical path, by what they are spent on."""

    products: float
    attention: float
    memory: float
    tensor: float
    experts: float
    context: float
    host: float
    stages: float  # between stages of a pipeline
    data: float  # ZeRO's gathers and the reduction of gradients
    bubble: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(self)


def product_seconds(product: Product, job: Job, constants: Constants = CONSTANTS) -> float:
    """One matrix product."""
    gpu = job.cluster.gpu
    rate = gpu.peak_flops(job.compute) * gpu.matmul_efficiency * _filled(product, gpu.multiprocessors)
    moved = job.itemsize * (product.m * product.k + product.k * product.n + product.m * product.n)
    return max(product.flops / rate, _moving(moved, job, constants))


def _filled(product: Product, multiprocessors: int) -> float:
    """The part of the tiles of the last wave, and of the last tile, that is work (NVIDIA's matmul guide)."""
    tiles = math.ceil(product.m / TILE[0]) * math.ceil(product.n / TILE[1])
    in_waves = math.ceil(tiles / multiprocessors) * multiprocessors
    return product.m * product.n / (in_waves * TILE[0] * TILE[1])


def _moving(count: float, job: Job, constants: Constants) -> float:
    return count / (job.cluster.gpu.memory_bandwidth * GIGA * constants.memory_efficiency)


def attention_seconds(attention: Attention, job: Job, constants: Constants) -> tuple[float, float]:
    """Forward and backward."""
    gpu = job.cluster.gpu
    rate = gpu.peak_flops(job.compute) * gpu.matmul_efficiency
    if not attention.scores:
        rate *= job.practice.attention_speed
        forward = attention.flops / (rate * constants.flash_forward)
        slower = 1.5 if job.practice.deterministic else 1.0
        return forward, slower * 2.5 * attention.flops / (rate * constants.flash_backward)  # 5 products for 2
    size = job.itemsize
    # Written by the first product, read and written by the softmax (and by dropout, with its mask), read by the second.
    passes = 4 * size + job.practice.dropout * (2 * size + 1)
    forward = attention.flops / (rate * constants.batched_products) + _moving(attention.scores * passes, job, constants)
    products = 2 * attention.flops / (rate * constants.batched_products)
    return forward, products + _moving(attention.scores * (passes + 2 * size), job, constants)


def message_seconds(message: Message, job: Job, constants: Constants = CONSTANTS) -> float:
    """A collective along one mesh axis, alone on the wires."""
    size = job.mesh[message.axis]
    if size == 1:
        return 0.0
    bandwidth = axis_bandwidth(message.axis, job, constants)
    crosses = job.crosses_nodes(message.axis)
    latency = constants.network_latency if crosses else constants.latency
    if message.kind == "permute":
        return message.bytes / bandwidth + latency
    rounds = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}[message.kind]
    hops = math.log2(size)  # trees and rings of NCCL: the number of steps grows slowly
    return rounds * (size - 1) / size * message.bytes / bandwidth + latency * (1 + hops)


def axis_bandwidth(axis: str, job: Job, constants: Constants = CONSTANTS) -> float:
    """Bytes a second that a device sends along a mesh axis: the links inside a node; outside, the network cards of all
    members in the node together, since each ring goes out by another."""
    links = _links(job.cluster, constants)
    if not job.crosses_nodes(axis):
        return links
    cards = job.in_node(axis) * job.cluster.network_bandwidth * GIGA * constants.network_efficiency
    return min(links, cards)


def _links(cluster: Cluster, constants: Constants) -> float:
    return cluster.gpu.link_bandwidth * GIGA * constants.link_efficiency


def layer_passes(job: Job, constants: Constants = CONSTANTS) -> tuple[Pass, Pass]:
    """Forward, and backward with what it computes again, of one layer and microbatch."""
    work, practice = layer_work(job), job.practice
    forward_products = sum(product_seconds(p, job, constants) for p in work.products)
    attention, attention_back = attention_seconds(work.attention, job, constants)
    elementwise = work.moved_bytes * practice.eager_passes
    memory = _moving(elementwise, job, constants)
    sent = {axis: 0.0 for axis in ("model", "expert", "context")}
    for message in work.messages:
        sent[message.axis] += message_seconds(message, job, constants)
        if practice.copies_gathered and message.kind == "all-gather" and message.axis == "model":
            sent["model"] += _moving(2 * message.bytes, job, constants)
    tensor = sent["model"] * (1 - practice.hides_tensor)
    forward = Pass(forward_products, attention, memory, tensor, sent["expert"], sent["context"])
    # Of a product's two gradients, that of a frozen weight is not computed.
    by_input = sum(product_seconds(Product(p.name, p.m, p.n, p.k), job, constants) for p in work.products)
    by_weight = sum(product_seconds(Product(p.name, p.k, p.m, p.n), job, constants) for p in work.products)
    trained = 1.0 if job.trained == 1 else 0.0
    summing = weights(job).layer + weights(job).experts
    moved = 1.6 * elementwise + trained * practice.accumulation_bytes * summing * (job.num_microbatches > 1)
    # Sequence parallelism gathers once more for the gradient of the weights (Korthikanti et al. 2022, section 4.2.2).
    again = 1.5 if job.layout.sequence_parallel else 1.0
    backward = Pass(
        by_input + trained * by_weight,
        attention_back,
        _moving(moved, job, constants),
        again * tensor,
        sent["expert"],
        2 * sent["context"],
        practice.host_seconds,
    )
    return forward, backward.plus(_recomputed(job, forward))


def _recomputed(job: Job, forward: Pass) -> Pass:
    products, attention, memory = job.recomputes
    again = Pass(
        products * forward.products,
        attention * forward.attention,
        memory * forward.memory,
        products * forward.tensor,
        products * forward.experts,
        attention * forward.context,
    )
    return again.plus(forward.times(job.stage_recomputes))


def end_passes(job: Job, constants: Constants = CONSTANTS) -> tuple[Pass, Pass]:
    """Of the embedding and of the head, forward and backward together, for one microbatch."""
    work = end_work(job)
    head = 0.0
    for p in work.products:
        forward = product_seconds(p, job, constants)
        head += forward * (2 if job.practice.chunked_loss else 1)
        head += product_seconds(Product(p.name, p.m, p.n, p.k), job, constants)
        head += product_seconds(Product(p.name, p.k, p.m, p.n), job, constants) * (job.trained == 1)
    loss = _moving(work.moved_bytes, job, constants)
    return Pass(memory=_moving(work.lookup_bytes, job, constants)), Pass(products=head, memory=loss)


def step_time(job: Job, constants: Constants = CONSTANTS) -> StepTime:
    """Seconds of one step."""
    forward, backward = layer_passes(job, constants)
    if job.forwards:
        backward = backward.plus(forward.times(job.forwards))
    if job.models != 1:
        forward, backward = forward.times(job.models), backward.times(job.models)
    first, last = end_passes(job, constants)
    run, bubble, permutes = _run(job, forward, backward, first, last, constants)
    data = _data(job, run, constants)
    optimizer = _moving(OPTIMIZER_BYTES * job.trained * _state_elements(job), job, constants)
    return StepTime(*run, stages=permutes, data=data, bubble=bubble, optimizer=optimizer)


def _run(job: Job, forward: Pass, backward: Pass, first: Pass, last: Pass, constants: Constants):
    """The work of the busiest stage over all microbatches, the bubble, and the messages between stages."""
    layers, count, stages = job.stage_layers, job.num_microbatches, job.stages
    of_stage = [forward.plus(backward).times(number) for number in layers]
    of_stage[0] = of_stage[0].plus(first)
    of_stage[-1] = of_stage[-1].plus(last)
    busiest = max(of_stage, key=lambda p: p.total)
    work = busiest.times(count)
    if stages == 1:
        return work, 0.0, 0.0
    sent = message_seconds(stage_message(job), job, constants) * (1 - job.practice.hides_pipeline)
    virtual = job.layout.virtual_stages
    if job.practice.lockstep:
        ticks, exchanges = _lockstep(job, forward, backward, first, last)
        return work, max(ticks - work.total, 0.0), exchanges * sent
    fill = sum(p.total for p in of_stage) - busiest.total
    permutes = 2 * virtual * count * sent
    return work, (fill + 2 * (stages - 1) * sent) / virtual, permutes


def _lockstep(job: Job, forward: Pass, backward: Pass, first: Pass, last: Pass) -> tuple[float, int]:
    """Seconds of all ticks, each as long as its dearest action, and how many there are (layout/pipeline.py)."""
    count, stages = job.num_microbatches, job.stages
    # Few microbatches tell what many cost: ticks in the middle repeat. Of a schedule of the user's own who knows.
    few = count if is_named(job.layout.schedule) else min(count, 4 * stages)
    times = [_ticks(job, number, forward, backward, first, last) for number in {few, min(count, few + stages)}]
    if len(times) == 1:
        return times[0]
    (seconds, ticks), (more, more_ticks) = sorted(times)
    rest = (count - few) / stages
    return seconds + rest * (more - seconds), round(ticks + rest * (more_ticks - ticks))


def _ticks(job: Job, count: int, forward: Pass, backward: Pass, first: Pass, last: Pass) -> tuple[float, int]:
    virtual = job.layout.virtual_stages
    table = make_schedule(job.layout.schedule, job.stages, count, virtual)
    half = 0.5 * (backward.total - forward.total)  # an input's gradient, or a weight's, beside the layers once more
    layers = np.array(job.stage_layers) / virtual
    cost = np.zeros((len(Action), job.stages))
    cost[Action.FORWARD] = layers * forward.total
    cost[Action.BACKWARD] = layers * backward.total
    cost[Action.BACKWARD_INPUT] = cost[Action.BACKWARD_WEIGHT] = layers * (forward.total + half)
    cost[Action.FORWARD, 0] += first.total / virtual
    # The last stage's forward action only takes the input in: its backward one begins with the layers.
    cost[Action.FORWARD, -1] = 0
    cost[[Action.BACKWARD, Action.BACKWARD_INPUT], -1] += last.total / virtual
    actions = np.asarray(table.action)
    return float(cost[actions, np.arange(job.stages)].max(axis=1).sum()), len(actions)


def _data(job: Job, run: Pass, constants: Constants) -> float:
    """Exposed seconds of ZeRO's gathers and the reduction of gradients, of the stage with most weights."""
    seconds = sum(message_seconds(m, job, constants) for m in data_messages(job))
    hidden = min(seconds * job.practice.hides_data, 0.9 * (run.products + run.attention + run.memory))
    return seconds - hidden


def _state_elements(job: Job) -> float:
    return most_weights(job) / (job.mesh["data"] if job.layout.zero_stage else 1)
