"""What one stage of a pipeline does at one tick: the actions of a schedule, as functions of what a device carries."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.layout import zero
from jaxllm.layout.layers import LayerSums
from jaxllm.layout.layout import constrain, pin
from jaxllm.layout.rules import RESIDUAL_AXES as RESIDUAL
from jaxllm.layout.schedules import Action

if TYPE_CHECKING:
    from jaxllm.layout.pipeline import Executor

Tree = Any


class Carry(NamedTuple):
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
    metrics: Tree  # sums of the loss function
    rows: Tree  # what it says of each row, [rows, microbatch, …]; None where nobody asks


class Task(NamedTuple):
    """A row of the table, on one device."""

    action: Array
    microbatch: Array
    virtual_stage: Array
    input_slot: Array
    input_arrival: Array
    gradient_slot: Array
    gradient_arrival: Array


def store(slots: Array, x: Array, slot: Array) -> Array:
    """`slots` with x in `slot`, unless that is -1."""
    index = jnp.maximum(slot, 0)
    held = jax.lax.dynamic_index_in_dim(slots, index, 0, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(slots, jnp.where(slot >= 0, x, held), index, 0)


@dataclasses.dataclass(frozen=True)
class Here:
    """One device at one tick."""

    executor: "Executor"
    weights: list[Array]
    microbatches: Tree
    scale: Array
    stage: Array
    task: Task

    def act(self, carry: Carry) -> Carry:
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

    def _setting(self, carry: Carry) -> tuple[list[Array], Tree, Array]:
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

    def forward(self, carry: Carry) -> Carry:
        """Through the layers, but for the last stage, whose backward pass does that."""

        def middle() -> Array:
            chunk, microbatch, x = self._setting(carry)
            return constrain(self.executor.through(chunk, microbatch, x, self._numbers())[0], *RESIDUAL)

        return carry._replace(
            activation=jax.lax.cond(self._is_last, lambda: constrain(carry.activation, *RESIDUAL), middle)
        )

    def evaluate(self, carry: Carry) -> Carry:
        """Through the layers; the last stage goes on to the loss."""
        chunk, microbatch, x = self._setting(carry)
        y, sums = self.executor.through(chunk, microbatch, x, self._numbers())
        carry = self._count(carry, sums)

        def ending(carry: Carry) -> Carry:
            result = self.executor.after(chunk, microbatch, y)
            keep = lambda kept, new: jax.lax.dynamic_update_index_in_dim(kept, new, self.task.microbatch, 1)  # noqa: E731
            rows = carry.rows if carry.rows is None else jax.tree.map(keep, carry.rows, result.rows)
            return self._sum_loss(carry, result)._replace(rows=rows)

        return jax.lax.cond(self._is_last, ending, lambda carry: carry, carry)._replace(activation=y)

    def backward(self, carry: Carry) -> Carry:
        """Both gradients: of the input, to be sent, and of the weights."""
        chunk, microbatch, x = self._setting(carry)
        run = lambda layers, x: self.executor.through(self._with(chunk, layers), microbatch, x, self._numbers())  # noqa: E731
        (y, sums), pull = jax.vjp(run, self._layers(chunk), x)
        dy, carry = self._output_gradient(self._count(carry, sums), chunk, microbatch, y)
        d_layers, dx = pull((dy, self._sums_gradient(sums)))
        carry = self._add(carry, d_layers)
        return self._first(carry._replace(gradient=dx), chunk, microbatch, dx)

    def backward_input(self, carry: Carry) -> Carry:
        """The gradient of the input alone; the last stage keeps that of its output for `backward_weight`."""
        chunk, microbatch, x = self._setting(carry)
        (y, sums), pull = jax.vjp(lambda x: self.executor.through(chunk, microbatch, x, self._numbers()), x)
        dy, carry = self._output_gradient(self._count(carry, sums), chunk, microbatch, y)
        kept = store(carry.gradients, dy, jnp.where(self._is_last, self.task.gradient_slot, -1))
        (dx,) = pull((dy, self._sums_gradient(sums)))
        return self._first(carry._replace(gradient=dx, gradients=kept), chunk, microbatch, dx)

    def backward_weight(self, carry: Carry) -> Carry:
        """The gradient of the weights alone."""
        chunk, microbatch, x = self._setting(carry)
        run = lambda layers: self.executor.through(self._with(chunk, layers), microbatch, x, self._numbers())  # noqa: E731
        (_, sums), pull = jax.vjp(run, self._layers(chunk))
        dy = carry.gradients[jnp.maximum(self.task.gradient_slot, 0)]
        return self._add(carry, pull((dy, self._sums_gradient(sums)))[0])

    def _count(self, carry: Carry, sums: LayerSums | None) -> Carry:
        """What the layers add to the loss, and their statistics: once for each microbatch."""
        if sums is None:
            return carry
        add = lambda total, new: total.at[self.task.virtual_stage].add(new)  # noqa: E731
        statistics = jax.tree.map(add, carry.statistics, sums.statistics)
        return carry._replace(total=carry.total + sums.loss.sum(), statistics=statistics)

    def _sum_loss(self, carry: Carry, result: Any) -> Carry:
        """Adds what the loss function says of a microbatch."""
        metrics = jax.tree.map(jnp.add, carry.metrics, result.metrics)
        return carry._replace(total=carry.total + result.total, weight=carry.weight + result.weight, metrics=metrics)

    def _sums_gradient(self, sums: LayerSums | None) -> LayerSums | None:
        """That of the scaled loss with respect to what the layers sum."""
        if sums is None:
            return None
        zeros = jax.tree.map(jnp.zeros_like, sums)
        return zeros._replace(loss=jnp.full_like(sums.loss, self.scale))

    def _output_gradient(self, carry: Carry, chunk, microbatch, y: Array) -> tuple[Array, Carry]:
        """The gradient of this stage's output: what has arrived, or on the last stage that of the loss."""

        def of_loss(carry: Carry):
            def total(ends, y):
                result = self.executor.after(self._with(chunk, ends, layers=False), microbatch, y)
                return result.total, result

            total, pull, result = jax.vjp(total, self._layers(chunk, layers=False), y, has_aux=True)
            d_ends, dy = pull(self.scale.astype(total.dtype))
            return constrain(dy, *RESIDUAL), self._add(self._sum_loss(carry, result), d_ends, layers=False)

        def arrived(carry: Carry):
            dy = carry.gradients[jnp.maximum(self.task.gradient_slot, 0)]
            return constrain(dy, *RESIDUAL), self.executor.place(carry)

        return jax.lax.cond(self._is_last, of_loss, arrived, carry)

    def _first(self, carry: Carry, chunk, microbatch, dx: Array) -> Carry:
        """On the first stage the gradient goes on into what comes before the layers."""

        def embed(carry: Carry) -> Carry:
            run = lambda ends: self.executor.before(self._with(chunk, ends, layers=False), microbatch)  # noqa: E731
            _, pull = jax.vjp(run, self._layers(chunk, layers=False))
            return self._add(carry, pull(dx)[0], layers=False)

        return jax.lax.cond(self._is_first, embed, self.executor.place, carry)

    def _layers(self, chunk: list[Array], *, layers: bool = True) -> list[Array]:
        """The trained weights that the layers use, or those of the ends."""
        return list(itertools.compress(chunk, self._is_part(layers)))

    def _with(self, chunk: list[Array], part: list[Array], *, layers: bool = True) -> list[Array]:
        """`chunk` with that part of its weights replaced."""
        rest = iter(part)
        return [next(rest) if in_part else w for w, in_part in zip(chunk, self._is_part(layers), strict=True)]

    def _is_part(self, layers: bool) -> list[bool]:
        """Whether each weight is trained and one that the layers use, or one of the ends: where shared, it is both."""
        leaves = zip(self.executor.in_layers, self.executor.is_trained, strict=True)
        shared = layers and self.executor.shares_ends
        return [trained and (shared or layered == layers) for layered, trained in leaves]

    def _add(self, carry: Carry, gradients: list[Array], *, layers: bool = True) -> Carry:
        """`gradients` of that part of the trained weights added to the accumulators."""
        rest, layout = iter(gradients), self.executor.layout

        def add(total: Array, axes: tuple, layered: bool) -> Array:
            if layered != layers and not (layers and self.executor.shares_ends):
                return total
            g = next(rest)
            g = pin(g, layout, zero.gradient_spec(layout, axes, g.shape)).astype(total.dtype)
            return total.at[self.task.virtual_stage].add(g) if layered else total + g

        return self.executor.place(
            carry._replace(weight_gradients=self.executor.each_trained(add, carry.weight_gradients))
        )
