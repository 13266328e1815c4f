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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxllm.layout import zero
from jaxllm.layout.layers import Layer, LayerSums, cut_at_layers, run_each
from jaxllm.layout.layout import Layout, constrain, pin, use_layout
from jaxllm.layout.rules import RESIDUAL_AXES as RESIDUAL
from jaxllm.layout.schedule_buffers import assign_buffers
from jaxllm.layout.schedules import Action, Schedule, make_schedule
from jaxllm.layout.scope import path_name, tensor_scope
from jaxllm.layout.stages import Stages, collect, deal, make_stages
from jaxllm.layout.vocabulary import weight_dtype

Tree = Any
LossFunction = Callable[[Tree, Tree], tuple[Array, Array, Any]]  # (weights, microbatch) -> model/head.py: Loss


class PipelineSums(NamedTuple):
    """Sums over the microbatches. The gradients, float32 or as accumulated, lie where gradients are accumulated."""

    total: Float[Array, ""]
    weight: Float[Array, ""]
    gradients: Tree  # None for a schedule of forwards alone
    executed: Int[Array, "stage action"]  # how often each stage really did each action
    statistics: Tree  # of the layers, [layers, …]; None where they have none


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
) -> PipelineSums:
    """Sums loss and gradients over microbatches by a schedule.

    Args:
      layout: with more than one stage.
      loss: a function of (weights in `compute`, microbatch) that runs its layers by `run_layers`, once. What the layers
        close over (positions, segments, dropout) may depend on the microbatch, not on anything that is trained.
      params, axes: the float32 master weights and their logical axes; a leading "layers" marks those of the layers.
      batch: a tree of arrays [batch, …]; microbatch m has the rows m, m + M, m + 2M, …
      scale: multiplies the loss that is differentiated.
      schedule: default the layout's.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(params)
    names, leaves = [path_name(path) for path, _ in paths], [leaf for _, leaf in paths]
    leaf_axes = tree.flatten_up_to(axes)
    in_layers = [a[:1] == ("layers",) for a in leaf_axes]
    num_layers = next(w.shape[0] for w, layered in zip(leaves, in_layers, strict=True) if layered)
    table = make_schedule(schedule or layout.schedule, layout.num_stages, num_microbatches, layout.virtual_stages)
    stages = make_stages(num_layers, layout.num_stages, layout.virtual_stages, layout.stage_layers)

    def enter(name: str, w: Array, a: tuple, layered: bool) -> Array:
        with tensor_scope(name, a):
            w = zero.cast_at_rest(layout, w, a, weight_dtype(a, compute))
            if layered:
                return deal(layout, stages, w, a)
            return pin(w, layout, zero.step_spec(layout.inside("pipeline"), a, w.shape))

    def leave(name: str, g: Array, a: tuple, layered: bool) -> Array:
        with tensor_scope(name, a):
            return collect(layout, stages, g, a) if layered else g

    entered = [enter(*leaf) for leaf in zip(names, leaves, leaf_axes, in_layers, strict=True)]
    specs = [zero.step_spec(layout.inside("pipeline"), a, w.shape) for w, a in zip(leaves, leaf_axes, strict=True)]
    once = zero.reduced_once(layout, specs)
    executor = _Executor(
        layout.inside("pipeline", *once), table, stages, loss, tree, names, leaf_axes, in_layers, accumulate
    )
    microbatches = jax.tree.map(lambda x: _split(x, num_microbatches), batch)
    over_stages = [P("pipeline") if layered else P() for layered in in_layers]
    has_gradients = executor.has_gradients
    run = jax.shard_map(
        executor.run,
        mesh=layout.mesh,
        in_specs=(over_stages, P(once or None), P()),
        out_specs=(P(), P(), over_stages if has_gradients else None, P("pipeline"), P("pipeline")),
        axis_names={"pipeline", *once},
        check_vma=False,
    )
    total, weight, gradients, executed, statistics = run(entered, microbatches, jnp.asarray(scale, jnp.float32))
    if has_gradients:
        gradients = tree.unflatten([leave(*leaf) for leaf in zip(names, gradients, leaf_axes, in_layers, strict=True)])
    statistics = jax.tree.map(lambda a: collect(layout, stages, a, ("layers", *[None] * (a.ndim - 3))), statistics)
    return PipelineSums(total, weight, gradients, executed, statistics)


def _split(x: Array, num_microbatches: int) -> Array:
    """[batch, …] as [rows, microbatch, …]: nothing moves and nothing is copied."""
    x = x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:])
    return constrain(x, "batch", *[None] * (x.ndim - 1))


class _Carry(NamedTuple):
    """What a device takes from tick to tick."""

    inputs: Float[Array, "slot batch length embed"]
    gradients: Float[Array, "slot batch length embed"]  # those of outputs, waiting for their backward pass
    activation: Float[Array, "batch length embed"]  # to send to the next stage
    gradient: Float[Array, "batch length embed"]  # to send to the stage before
    weight_gradients: list[Array] | None
    total: Float[Array, ""]
    weight: Float[Array, ""]
    executed: Int[Array, "action"]
    statistics: Tree  # sums of this device's layers, [virtual stage, place, …]


class _Task(NamedTuple):
    """A row of the table, on one device."""

    action: Array
    microbatch: Array
    virtual_stage: Array
    input_slot: Array
    input_arrival: Array
    gradient_slot: Array
    gradient_arrival: Array


class _Reached(Exception):
    """Leaves a loss function where it reaches its layers, with a value from there."""


@dataclasses.dataclass(frozen=True)
class _Executor:
    layout: Layout  # as seen inside the region
    table: Schedule
    stages: Stages
    loss: LossFunction
    tree: Any
    names: list[str]
    axes: list[tuple]
    in_layers: list[bool]
    accumulate: jnp.dtype

    @property
    def once(self) -> tuple[str, ...]:
        """The mesh axes over which gradients are summed at the end."""
        return tuple(axis for axis in self.layout.mesh.axis_names if axis in self.layout.manual - {"pipeline"})

    @property
    def has_gradients(self) -> bool:
        return bool((self.table.action > Action.FORWARD).any())

    def run(self, weights: list[Array], microbatches: Tree, scale: Array):
        """One device's part of the region."""
        with use_layout(self.layout):
            weights = [w[0] if layered else w for w, layered in zip(weights, self.in_layers, strict=True)]
            stage = jax.lax.axis_index("pipeline")
            buffers = assign_buffers(self.table)
            columns = (self.table.action, self.table.microbatch, self.table.virtual_stage, *buffers[:4])
            start = self._start(weights, microbatches, buffers.num_inputs, buffers.num_gradients)

            def tick(carry: _Carry, row: list[Array]) -> tuple[_Carry, None]:
                task = _Task(*(column[stage] for column in row))
                here = _Here(self, weights, microbatches, scale, stage, task)
                return self._exchange(here.act(carry), task), None

            end, _ = jax.lax.scan(tick, start, [jnp.asarray(column, jnp.int32) for column in columns])
            everywhere = ("pipeline", *self.once)
            with tensor_scope("loss", ("batch", "length", "layers")):
                total, weight = jax.lax.psum((end.total, end.weight), everywhere)
            gradients = end.weight_gradients
            if gradients is not None:

                def summed(g: Array, _: tuple, layered: bool) -> Array:
                    return zero.sum_once(g[None], self.once) if layered else zero.sum_once(g, everywhere)

                gradients = self.each(summed, gradients)
            statistics = jax.tree.map(lambda a: zero.sum_once(a[None], self.once), end.statistics)
            return total, weight, gradients, end.executed[None], statistics

    def each(self, f: Callable[[Array, tuple, bool], Array], leaves: list[Array]) -> list[Array]:
        """`f(leaf, its axes, is it of the layers)` on each weight or gradient, in its scope."""
        results = []
        for leaf, name, axes, layered in zip(leaves, self.names, self.axes, self.in_layers, strict=True):
            with tensor_scope(name, axes):
                results.append(f(leaf, axes, layered))
        return results

    def _start(self, weights: list[Array], microbatches: Tree, num_inputs: int, num_gradients: int) -> _Carry:
        first = jax.tree.map(lambda a: a[:, 0], microbatches)
        chunk, numbers = self.chunk(weights, 0), jnp.asarray(self.stages.numbers[0, 0])
        x = jax.eval_shape(lambda: self.before(chunk, first))
        sums = jax.eval_shape(lambda x: self.through(chunk, first, x, numbers)[1], x)
        statistics = sums and jax.tree.map(
            lambda a: jnp.zeros((self.table.num_virtual_stages, *a.shape), a.dtype), sums.statistics
        )
        accumulators = [jnp.zeros(w.shape, self.accumulate) for w in weights] if self.has_gradients else None
        start = _Carry(
            inputs=jnp.zeros((max(num_inputs, 1), *x.shape), x.dtype),
            gradients=jnp.zeros((max(num_gradients, 1), *x.shape), x.dtype),
            activation=jnp.zeros(x.shape, x.dtype),
            gradient=jnp.zeros(x.shape, x.dtype),
            weight_gradients=accumulators,
            total=jnp.zeros((), jnp.float32),
            weight=jnp.zeros((), jnp.float32),
            executed=jnp.zeros(len(Action), jnp.int32),
            statistics=statistics,
        )
        return self.place(start)

    def place(self, carry: _Carry) -> _Carry:
        """Everything where it lives: the branches of a condition must agree on that."""
        slots = P(None, *self.layout.spec(RESIDUAL))
        sums = carry.weight_gradients
        if sums is not None:
            sums = self.each(lambda g, axes, _: pin(g, self.layout, self._accumulator_spec(g, axes)), sums)
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

    def _exchange(self, carry: _Carry, task: _Task) -> _Carry:
        """The end of a tick: everybody sends to both neighbours and keeps what the table says has arrived."""
        number = self.table.num_stages
        onward = [(i, (i + 1) % number) for i in range(number)]
        activation = jax.lax.ppermute(carry.activation, "pipeline", onward)
        carry = carry._replace(inputs=_store(carry.inputs, activation, task.input_arrival))
        if not self.has_gradients:
            return carry
        gradient = jax.lax.ppermute(carry.gradient, "pipeline", [(to, sender) for sender, to in onward])
        return carry._replace(gradients=_store(carry.gradients, gradient, task.gradient_arrival))

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

    def after(self, weights: list[Array], microbatch: Tree, x: Array) -> tuple[Array, Array]:
        """The loss, from what leaves the last layer, and its weight. What layers add to it is not in it."""
        with cut_at_layers(lambda layer, _, per_layer: (x, None)):
            return self.loss(self.tree.unflatten(weights), microbatch)[:2]

    def _until_layers(self, weights: list[Array], microbatch: Tree, at_layers: Callable) -> Any:
        def leave(*stack):
            raise _Reached(at_layers(*stack))

        try:
            with cut_at_layers(leave):
                self.loss(self.tree.unflatten(weights), microbatch)
        except _Reached as reached:
            return reached.args[0]
        raise TypeError("the loss function never runs its layers, so a pipeline has nothing to cut")


def _store(slots: Array, x: Array, slot: Array) -> Array:
    """`slots` with x in `slot`, unless that is -1."""
    index = jnp.maximum(slot, 0)
    held = jax.lax.dynamic_index_in_dim(slots, index, 0, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(slots, jnp.where(slot >= 0, x, held), index, 0)


def _skipping(layer: Layer) -> Layer:
    """The layer, or nothing where its number is -1: this stage holds fewer than another."""

    def one(x: Array, number: Array, inputs: Tree) -> tuple[Array, LayerSums | None]:
        run = lambda: layer(x, number.astype(jnp.uint32), inputs)  # noqa: E731
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(run)[1])
        return jax.lax.cond(number >= 0, run, lambda: (x, nothing))

    return one


@dataclasses.dataclass(frozen=True)
class _Here:
    """One device at one tick."""

    executor: _Executor
    weights: list[Array]
    microbatches: Tree
    scale: Array
    stage: Array
    task: _Task

    def act(self, carry: _Carry) -> _Carry:
        """Does the task. Only the actions that the table has are compiled."""
        actions = sorted({Action.IDLE, *map(int, set(self.executor.table.action.ravel().tolist()))})
        branches = {
            Action.IDLE: lambda carry: carry,
            Action.FORWARD: self.forward if self.executor.has_gradients else self.evaluate,
            Action.BACKWARD: self.backward,
            Action.BACKWARD_INPUT: self.backward_input,
            Action.BACKWARD_WEIGHT: self.backward_weight,
        }

        def counted(action: Action) -> Callable:
            place = self.executor.place
            return lambda carry: place(branches[action](carry._replace(executed=carry.executed.at[action].add(1))))

        code = jnp.searchsorted(jnp.asarray(actions), self.task.action)
        return jax.lax.switch(code, [counted(Action(action)) for action in actions], carry)

    @property
    def _is_first(self) -> Array:
        return (self.stage == 0) & (self.task.virtual_stage == 0)

    @property
    def _is_last(self) -> Array:
        table = self.executor.table
        return (self.stage == table.num_stages - 1) & (self.task.virtual_stage == table.num_virtual_stages - 1)

    def _setting(self, carry: _Carry) -> tuple[list[Array], Tree, Array]:
        """Weights, microbatch and input of the task."""
        chunk = self.executor.chunk(self.weights, self.task.virtual_stage)
        microbatch = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, self.task.microbatch, 1, keepdims=False), self.microbatches
        )

        def embedded() -> Array:
            return constrain(self.executor.before(chunk, microbatch), *RESIDUAL)

        def stored() -> Array:
            return constrain(carry.inputs[jnp.maximum(self.task.input_slot, 0)], *RESIDUAL)

        return chunk, microbatch, jax.lax.cond(self._is_first, embedded, stored)

    def _numbers(self) -> Array:
        return jnp.asarray(self.executor.stages.numbers)[self.stage, self.task.virtual_stage]

    def forward(self, carry: _Carry) -> _Carry:
        """Through the layers, but for the last stage, whose backward pass does that."""

        def middle() -> Array:
            chunk, microbatch, x = self._setting(carry)
            return constrain(self.executor.through(chunk, microbatch, x, self._numbers())[0], *RESIDUAL)

        return carry._replace(
            activation=jax.lax.cond(self._is_last, lambda: constrain(carry.activation, *RESIDUAL), middle)
        )

    def evaluate(self, carry: _Carry) -> _Carry:
        """Through the layers; the last stage goes on to the loss."""
        chunk, microbatch, x = self._setting(carry)
        y, sums = self.executor.through(chunk, microbatch, x, self._numbers())
        carry = self._count(carry, sums)
        none = (jnp.zeros((), jnp.float32),) * 2
        total, weight = jax.lax.cond(self._is_last, lambda: self.executor.after(chunk, microbatch, y), lambda: none)
        return carry._replace(activation=y, total=carry.total + total, weight=carry.weight + weight)

    def backward(self, carry: _Carry) -> _Carry:
        """Both gradients: of the input, to be sent, and of the weights."""
        chunk, microbatch, x = self._setting(carry)
        run = lambda layers, x: self.executor.through(self._with(chunk, layers), microbatch, x, self._numbers())  # noqa: E731
        (y, sums), pull = jax.vjp(run, self._layers(chunk), x)
        dy, carry = self._output_gradient(self._count(carry, sums), chunk, microbatch, y)
        d_layers, dx = pull((dy, self._sums_gradient(sums)))
        carry = self._add(carry, d_layers)
        return self._first(carry._replace(gradient=dx), chunk, microbatch, dx)

    def backward_input(self, carry: _Carry) -> _Carry:
        """The gradient of the input alone; the last stage keeps that of its output for `backward_weight`."""
        chunk, microbatch, x = self._setting(carry)
        (y, sums), pull = jax.vjp(lambda x: self.executor.through(chunk, microbatch, x, self._numbers()), x)
        dy, carry = self._output_gradient(self._count(carry, sums), chunk, microbatch, y)
        kept = _store(carry.gradients, dy, jnp.where(self._is_last, self.task.gradient_slot, -1))
        (dx,) = pull((dy, self._sums_gradient(sums)))
        return self._first(carry._replace(gradient=dx, gradients=kept), chunk, microbatch, dx)

    def backward_weight(self, carry: _Carry) -> _Carry:
        """The gradient of the weights alone."""
        chunk, microbatch, x = self._setting(carry)
        run = lambda layers: self.executor.through(self._with(chunk, layers), microbatch, x, self._numbers())  # noqa: E731
        (_, sums), pull = jax.vjp(run, self._layers(chunk))
        dy = carry.gradients[jnp.maximum(self.task.gradient_slot, 0)]
        return self._add(carry, pull((dy, self._sums_gradient(sums)))[0])

    def _count(self, carry: _Carry, sums: LayerSums | None) -> _Carry:
        """What the layers add to the loss, and their statistics: once for each microbatch."""
        if sums is None:
            return carry
        add = lambda total, new: total.at[self.task.virtual_stage].add(new)  # noqa: E731
        statistics = jax.tree.map(add, carry.statistics, sums.statistics)
        return carry._replace(total=carry.total + sums.loss.sum(), statistics=statistics)

    def _sums_gradient(self, sums: LayerSums | None) -> LayerSums | None:
        """That of the scaled loss with respect to what the layers sum."""
        if sums is None:
            return None
        zeros = jax.tree.map(jnp.zeros_like, sums)
        return zeros._replace(loss=jnp.full_like(sums.loss, self.scale))

    def _output_gradient(self, carry: _Carry, chunk, microbatch, y: Array) -> tuple[Array, _Carry]:
        """The gradient of this stage's output: what has arrived, or on the last stage that of the loss."""

        def of_loss(carry: _Carry):
            def total(ends, y):
                return self.executor.after(self._with(chunk, ends, layers=False), microbatch, y)

            total, pull, weight = jax.vjp(total, self._layers(chunk, layers=False), y, has_aux=True)
            d_ends, dy = pull(self.scale.astype(total.dtype))
            carry = carry._replace(total=carry.total + total, weight=carry.weight + weight)
            return constrain(dy, *RESIDUAL), self._add(carry, d_ends, layers=False)

        def arrived(carry: _Carry):
            dy = carry.gradients[jnp.maximum(self.task.gradient_slot, 0)]
            return constrain(dy, *RESIDUAL), self.executor.place(carry)

        return jax.lax.cond(self._is_last, of_loss, arrived, carry)

    def _first(self, carry: _Carry, chunk, microbatch, dx: Array) -> _Carry:
        """On the first stage the gradient goes on into what comes before the layers."""

        def embed(carry: _Carry) -> _Carry:
            run = lambda ends: self.executor.before(self._with(chunk, ends, layers=False), microbatch)  # noqa: E731
            _, pull = jax.vjp(run, self._layers(chunk, layers=False))
            return self._add(carry, pull(dx)[0], layers=False)

        return jax.lax.cond(self._is_first, embed, self.executor.place, carry)

    def _layers(self, chunk: list[Array], *, layers: bool = True) -> list[Array]:
        """The weights of the layers, or those of the ends."""
        return [w for w, layered in zip(chunk, self.executor.in_layers, strict=True) if layered == layers]

    def _with(self, chunk: list[Array], part: list[Array], *, layers: bool = True) -> list[Array]:
        """`chunk` with that part of its weights replaced."""
        rest = iter(part)
        return [
            next(rest) if layered == layers else w for w, layered in zip(chunk, self.executor.in_layers, strict=True)
        ]

    def _add(self, carry: _Carry, gradients: list[Array], *, layers: bool = True) -> _Carry:
        """`gradients` of that part of the weights added to the accumulators."""
        rest, layout = iter(gradients), self.executor.layout

        def add(total: Array, axes: tuple, layered: bool) -> Array:
            if layered != layers:
                return total
            g = next(rest)
            g = pin(g, layout, zero.gradient_spec(layout, axes, g.shape)).astype(total.dtype)
            return total.at[self.task.virtual_stage].add(g) if layered else total + g

        return self.executor.place(carry._replace(weight_gradients=self.executor.each(add, carry.weight_gradients)))
