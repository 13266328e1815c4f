"""Runs a schedule: one executor for every table, in one SPMD program.

A pipeline is gradient accumulation with more than one stage. The table (layout/schedules.py) says what each device does
at each tick; a `lax.switch` does that and nothing else, so an idle device computes nothing. Every tick ends with two
`ppermute`s: activations to the next stage, their gradients to the one before. What a stage keeps of a microbatch is its
input; the backward pass computes the rest again. The region is manual over `pipeline` (and over the mesh axes along
which gradients are summed once a step, layout/zero.py): the others are the compiler's affair, as without a pipeline.

The loss function is cut at its layers (layout/layers.py): what comes before them runs on the first stage, what comes
after on the last. The last stage has no use for a forward pass of its own, since its backward pass begins with one: so
its forward action only takes the input in, which pays for the head.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxllm.layout import zero
from jaxllm.layout.layers import Layer, LayerSums, cut_at_layers, run_each
from jaxllm.layout.layout import Layout, constrain, pin, use_layout
from jaxllm.layout.pipeline_tasks import Carry, Here, Task, store
from jaxllm.layout.rules import RESIDUAL_AXES as RESIDUAL
from jaxllm.layout.schedule_buffers import assign_buffers
from jaxllm.layout.schedules import Action, Schedule, make_schedule
from jaxllm.layout.scope import NOTHING, Frozen, joined, map_leaves, path_name, tensor_scope
from jaxllm.layout.stages import Stages, collect, deal, make_stages, num_layers_of
from jaxllm.layout.vocabulary import weight_dtype

Tree = Any
LossFunction = Callable[[Tree, Tree], Any]  # (weights, microbatch) -> model/head.py: Loss


class PipelineSums(NamedTuple):
    """Sums over the microbatches. The gradients, float32 or as accumulated, lie where gradients are accumulated."""

    total: Float[Array, ""]
    weight: Float[Array, ""]
    gradients: Tree  # None for a schedule of forwards alone
    executed: Int[Array, "stage action"]  # how often each stage really did each action
    statistics: Tree  # of the layers, [layers, …]; None where they have none
    metrics: Tree  # of the loss; None where it has none
    rows: Tree  # what the loss says of each row, [batch, …], where that was asked for


def run_pipeline(
    layout: Layout,
    loss: LossFunction,
    params: Tree,
    axes: Tree,
    batch: Tree,
    *,
    num_microbatches: int,
    compute: jnp.dtype,
    accumulate: jnp.dtype = jnp.float32,
    scale: Float[Array, ""] | float = 1.0,
    schedule: str | None = None,
    frozen: Frozen = NOTHING,
    keeps_rows: bool = False,
) -> PipelineSums:
    """Sums loss and gradients over microbatches by a schedule.

    Args:
      layout: with more than one stage.
      loss: a function of (weights in `compute`, microbatch) that runs its layers by `run_layers`, once. What the layers
        close over (positions, segments, dropout) may depend on the microbatch; on what is trained only beside `frozen`
        weights, where that is little: each stage then has gradients of all of it that belongs to no layer.
      params, axes: the float32 master weights and their logical axes; a leading "layers" marks those of the layers.
      batch: a tree of arrays [batch, …]; microbatch m has the rows m, m + M, m + 2M, …
      scale: multiplies the loss that is differentiated.
      schedule: default the layout's.
      frozen: further weights, as they are held, that have no gradients.
      keeps_rows: return `Loss.rows` of all microbatches; for a schedule of forwards alone.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(joined(params, frozen.weights))
    names, leaves = [path_name(path) for path, _ in paths], [leaf for _, leaf in paths]
    leaf_axes = tree.flatten_up_to(joined(axes, frozen.axes))
    trained = set(map_leaves(lambda w, _: w, params, axes))
    is_trained = [name in trained for name in names]
    in_layers = [a[:1] == ("layers",) for a in leaf_axes]
    at_rest = next(w.shape[0] for w, layered in zip(leaves, in_layers, strict=True) if layered)
    num_layers = num_layers_of(at_rest, layout.num_stages, layout.stage_layers)
    table = make_schedule(schedule or layout.schedule, layout.num_stages, num_microbatches, layout.virtual_stages)
    stages = make_stages(num_layers, layout.num_stages, layout.virtual_stages, layout.stage_layers)

    def enter(name: str, w: Array, a: tuple, layered: bool, trains: bool) -> Array:
        with tensor_scope(name, a):
            w = zero.cast_at_rest(layout, w, a, weight_dtype(a, compute) if trains else w.dtype)
            if layered:
                return deal(layout, stages, w, a)
            return pin(w, layout, zero.step_spec(layout.inside("pipeline"), a, w.shape))

    def leave(name: str, g: Array, a: tuple, layered: bool) -> Array:
        with tensor_scope(name, a):
            return collect(layout, stages, g) if layered else g

    entered = [enter(*leaf) for leaf in zip(names, leaves, leaf_axes, in_layers, is_trained, strict=True)]
    specs = [zero.step_spec(layout.inside("pipeline"), a, w.shape) for w, a in zip(leaves, leaf_axes, strict=True)]
    once = zero.reduced_once(layout, specs)
    executor = Executor(
        layout=layout.inside("pipeline", *once),
        table=table,
        stages=stages,
        loss=loss,
        tree=tree,
        names=names,
        axes=leaf_axes,
        in_layers=in_layers,
        is_trained=is_trained,
        shares_ends=bool(frozen.weights),
        accumulate=accumulate,
        keeps_rows=keeps_rows,
    )
    microbatches = jax.tree.map(lambda x: _split(x, num_microbatches), batch)
    over_stages = [P("pipeline") if layered else P() for layered in in_layers]
    of_trained = lambda values: list(itertools.compress(values, is_trained))  # noqa: E731
    has_gradients = executor.has_gradients
    run = jax.shard_map(
        executor.run,
        mesh=layout.mesh,
        in_specs=(over_stages, P(once or None), P()),
        out_specs=PipelineSums(
            total=P(),
            weight=P(),
            gradients=of_trained(over_stages) if has_gradients else None,
            executed=P("pipeline"),
            statistics=P("pipeline"),
            metrics=P(),
            rows=P(once or None),
        ),
        axis_names={"pipeline", *once},
        check_vma=False,
    )
    sums = run(entered, microbatches, jnp.asarray(scale, jnp.float32))
    gradients = sums.gradients
    if has_gradients:
        placed = zip(of_trained(names), gradients, of_trained(leaf_axes), of_trained(in_layers), strict=True)
        gradients = jax.tree.unflatten(jax.tree.structure(params), [leave(*leaf) for leaf in placed])
    statistics = jax.tree.map(lambda a: collect(layout, stages, a)[:num_layers], sums.statistics)
    rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), sums.rows)
    return sums._replace(gradients=gradients, statistics=statistics, rows=rows)


def _split(x: Array, num_microbatches: int) -> Array:
    """[batch, …] as [rows, microbatch, …]: nothing moves and nothing is copied."""
    x = x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:])
    return constrain(x, "batch", *[None] * (x.ndim - 1))


class _Reached(Exception):
    """Leaves a loss function where it reaches its layers, with a value from there."""


@dataclasses.dataclass(frozen=True)
class Executor:
    layout: Layout  # as seen inside the region
    table: Schedule
    stages: Stages
    loss: LossFunction
    tree: Any
    names: list[str]
    axes: list[tuple]
    in_layers: list[bool]
    is_trained: list[bool]
    shares_ends: bool  # layers may close over trained weights that belong to no layer
    accumulate: jnp.dtype
    keeps_rows: bool

    @property
    def once(self) -> tuple[str, ...]:
        """The mesh axes over which gradients are summed at the end."""
        return tuple(axis for axis in self.layout.mesh.axis_names if axis in self.layout.manual - {"pipeline"})

    @property
    def has_gradients(self) -> bool:
        return bool((self.table.action > Action.FORWARD).any())

    def run(self, weights: list[Array], microbatches: Tree, scale: Array) -> PipelineSums:
        """One device's part of the region."""
        with use_layout(self.layout):
            weights = [w[0] if layered else w for w, layered in zip(weights, self.in_layers, strict=True)]
            stage = jax.lax.axis_index("pipeline")
            buffers = assign_buffers(self.table)
            columns = (self.table.action, self.table.microbatch, self.table.virtual_stage, *buffers[:4])
            start = self._start(weights, microbatches, buffers.num_inputs, buffers.num_gradients)

            def tick(carry: Carry, row: list[Array]) -> tuple[Carry, None]:
                task = Task(*(column[stage] for column in row))
                here = Here(self, weights, microbatches, scale, stage, task)
                return self._exchange(here.act(carry), task), None

            end, _ = jax.lax.scan(tick, start, [jnp.asarray(column, jnp.int32) for column in columns])
            everywhere = ("pipeline", *self.once)
            with tensor_scope("loss", ("batch", "length", "layers")):
                total, weight, metrics = jax.lax.psum((end.total, end.weight, end.metrics), everywhere)
                rows = jax.lax.psum(end.rows, "pipeline")
            gradients = end.weight_gradients
            if gradients is not None:

                def summed(g: Array, _: tuple, layered: bool) -> Array:
                    return zero.sum_once(g[None], self.once) if layered else zero.sum_once(g, everywhere)

                gradients = self.each_trained(summed, gradients)
            statistics = jax.tree.map(lambda a: zero.sum_once(a[None], self.once), end.statistics)
            return PipelineSums(total, weight, gradients, end.executed[None], statistics, metrics, rows)

    def of_trained(self, values: list) -> list:
        """Those of the trained weights, in their order."""
        return list(itertools.compress(values, self.is_trained))

    def each_trained(self, f: Callable[[Array, tuple, bool], Array], leaves: list[Array]) -> list[Array]:
        """`f(leaf, its axes, is it of the layers)` on each trained weight or its gradient, in its scope."""
        results = []
        for leaf, name, axes, layered in zip(
            leaves, *map(self.of_trained, (self.names, self.axes, self.in_layers)), strict=True
        ):
            with tensor_scope(name, axes):
                results.append(f(leaf, axes, layered))
        return results

    def _start(self, weights: list[Array], microbatches: Tree, num_inputs: int, num_gradients: int) -> Carry:
        first = jax.tree.map(lambda a: a[:, 0], microbatches)
        chunk, numbers = self.chunk(weights, 0), jnp.asarray(self.stages.numbers[0, 0])
        x = jax.eval_shape(lambda: self.before(chunk, first))
        sums = jax.eval_shape(lambda x: self.through(chunk, first, x, numbers)[1], x)
        statistics = sums and jax.tree.map(
            lambda a: jnp.zeros((self.table.num_virtual_stages, *a.shape), a.dtype), sums.statistics
        )
        zeros = [jnp.zeros(w.shape, self.accumulate) for w in self.of_trained(weights)]
        accumulators = zeros if self.has_gradients else None
        ending = jax.eval_shape(lambda x: self.after(chunk, first, x), x)
        nothing = lambda shapes: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)  # noqa: E731
        number = jax.tree.leaves(microbatches)[0].shape[1]
        rows = jax.tree.map(lambda a: jnp.zeros((a.shape[0], number, *a.shape[1:]), a.dtype), ending.rows)
        start = Carry(
            inputs=jnp.zeros((max(num_inputs, 1), *x.shape), x.dtype),
            gradients=jnp.zeros((max(num_gradients, 1), *x.shape), x.dtype),
            activation=jnp.zeros(x.shape, x.dtype),
            gradient=jnp.zeros(x.shape, x.dtype),
            weight_gradients=accumulators,
            total=jnp.zeros((), jnp.float32),
            weight=jnp.zeros((), jnp.float32),
            executed=jnp.zeros(len(Action), jnp.int32),
            statistics=statistics,
            metrics=nothing(ending.metrics),
            rows=rows if self.keeps_rows else None,
        )
        return self.place(start)

    def place(self, carry: Carry) -> Carry:
        """Everything where it lives: the branches of a condition must agree on that."""
        slots = P(None, *self.layout.spec(RESIDUAL))
        sums = carry.weight_gradients
        if sums is not None:
            sums = self.each_trained(lambda g, axes, _: pin(g, self.layout, self._accumulator_spec(g, axes)), sums)
        return carry._replace(
            inputs=pin(carry.inputs, self.layout, slots),
            gradients=pin(carry.gradients, self.layout, slots),
            activation=constrain(carry.activation, *RESIDUAL),
            gradient=constrain(carry.gradient, *RESIDUAL),
            weight_gradients=sums,
        )

    def _accumulator_spec(self, g: Array, axes: tuple) -> P:
        if axes[:1] == ("layers",):
            return P(None, *zero.gradient_spec(self.layout, axes, g.shape[1:]))
        return zero.gradient_spec(self.layout, axes, g.shape)

    def _exchange(self, carry: Carry, task: Task) -> Carry:
        """The end of a tick: everybody sends to both neighbours and keeps what the table says has arrived."""
        number = self.table.num_stages
        onward = [(i, (i + 1) % number) for i in range(number)]
        activation = jax.lax.ppermute(carry.activation, "pipeline", onward)
        carry = carry._replace(inputs=store(carry.inputs, activation, task.input_arrival))
        if not self.has_gradients:
            return carry
        gradient = jax.lax.ppermute(carry.gradient, "pipeline", [(to, sender) for sender, to in onward])
        return carry._replace(gradients=store(carry.gradients, gradient, task.gradient_arrival))

    def chunk(self, weights: list[Array], virtual_stage: Array | int) -> list[Array]:
        """The weights with those of one virtual stage's layers."""
        pick = lambda w: jax.lax.dynamic_index_in_dim(w, virtual_stage, 0, keepdims=False)  # noqa: E731
        return [pick(w) if layered else w for w, layered in zip(weights, self.in_layers, strict=True)]

    def before(self, weights: list[Array], microbatch: Tree) -> Array:
        """What enters the first layer."""
        return self._until_layers(weights, microbatch, lambda layer, x, per_layer: x)

    def through(
        self, weights: list[Array], microbatch: Tree, x: Array, numbers: Array
    ) -> tuple[Array, LayerSums | None]:
        """What the layers of one virtual stage make of x, and their sums, [place, …]."""

        def run(layer: Layer, _: Array, per_layer: Tree) -> tuple[Array, LayerSums | None]:
            if (self.stages.numbers < 0).any():
                layer = _skipping(layer)
            return run_each(layer, x, numbers, per_layer)

        return self._until_layers(weights, microbatch, run)

    def after(self, weights: list[Array], microbatch: Tree, x: Array) -> Any:
        """The `Loss`, from what leaves the last layer. What layers add to it is not in it."""
        with cut_at_layers(lambda layer, _, per_layer: (x, None)):
            return self.loss(self.tree.unflatten(weights), microbatch)

    def _until_layers(self, weights: list[Array], microbatch: Tree, at_layers: Callable) -> Any:
        def leave(*stack):
            raise _Reached(at_layers(*stack))

        try:
            with cut_at_layers(leave):
                self.loss(self.tree.unflatten(weights), microbatch)
        except _Reached as reached:
            return reached.args[0]
        raise TypeError("the loss function never runs its layers, so a pipeline has nothing to cut")


def _skipping(layer: Layer) -> Layer:
    """The layer, or nothing where its number is -1: this stage holds fewer than another."""

    def one(x: Array, number: Array, inputs: Tree) -> tuple[Array, LayerSums | None]:
        run = lambda: layer(x, number.astype(jnp.uint32), inputs)  # noqa: E731
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(run)[1])
        return jax.lax.cond(number >= 0, run, lambda: (x, nothing))

    return one
