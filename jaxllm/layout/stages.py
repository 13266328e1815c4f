"""Which layers each pipeline stage holds, and the deal that brings them there.

The state keeps layers stacked as [layers, …] in their own order, whatever the layout. A pipeline of P devices with v
virtual stages has P x v positions in the order of the model; position p lies on device p mod P. Where that order is not
the canonical one (virtual stages, uneven counts) the weights of a step are dealt once before it, and their gradients
collected once after it, each layer from the stage where it rests to the one that computes with it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from jaxllm.errors import UserError
from jaxllm.layout import zero
from jaxllm.layout.layout import Axes, Layout, pin


class Stages(NamedTuple):
    """The layers of each stage."""

    counts: tuple[int, ...]  # layers of each position, in the order of the model
    numbers: np.ndarray  # [stage, virtual stage, place] -> number of the layer, -1 where a stage holds fewer

    @property
    def is_canonical(self) -> bool:
        """True where device s holds the s-th run of equally many layers: nothing has to be dealt."""
        return np.array_equal(self.numbers.ravel(), np.arange(self.numbers.size))

    @property
    def places(self) -> np.ndarray:
        """[layer] -> its index in the flattened `numbers`."""
        flat = self.numbers.ravel()
        return np.argsort(np.where(flat < 0, flat.size, flat), kind="stable")[: (flat >= 0).sum()]


def make_stages(num_layers: int, num_stages: int, num_virtual_stages: int = 1, stage_layers: str = "") -> Stages:
    """The stages that `config.layout.stage_layers` describes.

    Args:
      stage_layers: "" as many layers at every position; "light_ends" one fewer at the first and the last, which hold
        the embedding and the head (BLOOM: 70 layers on 12 stages are 5, ten times 6, 5); or a list, "5,6,6,5".

    Raises:
      UserError: layers that cannot be dealt so, with lists that can.
    """
    positions = num_stages * num_virtual_stages
    counts = _counts(num_layers, positions, stage_layers)
    starts = np.concatenate([[0], np.cumsum(counts)])
    numbers = np.full((num_stages, num_virtual_stages, max(counts)), -1, np.int32)
    for position, count in enumerate(counts):
        virtual, stage = divmod(position, num_stages)
        numbers[stage, virtual, :count] = np.arange(starts[position], starts[position] + count)
    return Stages(counts, numbers)


def _counts(num_layers: int, positions: int, stage_layers: str) -> tuple[int, ...]:
    name = f"config.layout.stage_layers={stage_layers!r}"
    if num_layers < positions:
        raise UserError(
            f"config.model.num_layers={num_layers} is less than the {positions} stages of the pipeline. "
            f"Choose --config.mesh.pipeline (x config.layout.virtual_stages) of at most {num_layers}."
        )
    nearest = ",".join(map(str, _nearly_even(num_layers, positions)))
    if not stage_layers:
        if num_layers % positions:
            raise UserError(
                f"config.model.num_layers={num_layers} is not divisible by the {positions} stages of the pipeline. "
                f"Say how many layers each holds: --config.layout.stage_layers={nearest}"
            )
        return (num_layers // positions,) * positions
    if stage_layers == "light_ends":
        if positions < 2 or (num_layers + 2) % positions or num_layers + 2 < 2 * positions:
            raise UserError(
                f"{name}: with one layer less at both ends, {num_layers} layers + 2 are not divisible by the "
                f"{positions} stages. Nearest: --config.layout.stage_layers={nearest}"
            )
        inner = (num_layers + 2) // positions
        return (inner - 1, *[inner] * (positions - 2), inner - 1)
    try:
        counts = tuple(int(count) for count in stage_layers.split(","))
    except ValueError:
        raise UserError(f"{name} must be '', 'light_ends' or the layers of each stage, as '5,6,6,5'.") from None
    if len(counts) != positions or sum(counts) != num_layers or min(counts) < 1:
        raise UserError(
            f"{name} must be {positions} counts of at least 1 that add up to config.model.num_layers={num_layers} "
            f"(these are {len(counts)}, {sum(counts)} in all): say {nearest}."
        )
    return counts


def _nearly_even(num_layers: int, positions: int) -> list[int]:
    """Counts that differ by at most one; the ends, which hold embedding and head, are the first to get fewer."""
    least, more = divmod(num_layers, positions)
    light_first = [0, positions - 1, *range(1, positions - 1)][: positions - more] if positions > 1 else []
    return [least + (position not in light_first) * (more > 0) for position in range(positions)]


def num_layers_of(at_rest: int, num_stages: int, stage_layers: str) -> int:
    """The layers of a model whose weights have this length at rest (layout/at_rest.py)."""
    if stage_layers == "light_ends":
        return at_rest - 2 if num_stages > 2 else at_rest
    return sum(map(int, stage_layers.split(","))) if stage_layers else at_rest


def deal(layout: Layout, stages: Stages, w: Float[Array, "layers ..."], axes: Axes) -> Array:
    """A stacked weight, as long as at rest, as [stage, virtual stage, place, …], the first axis over `pipeline`."""
    shape = (*stages.numbers.shape, *w.shape[1:])
    if not stages.is_canonical:
        w = _taken(layout, w, stages.numbers.ravel())
    return pin(w.reshape(shape), layout, dealt_spec(layout, axes, w.shape))


def collect(layout: Layout, stages: Stages, g: Float[Array, "stage virtual place ..."]) -> Array:
    """The gradient of a dealt weight as that of the stacked one, [layers, …], as long as at rest."""
    flat = g.reshape(stages.numbers.size, *g.shape[3:])
    if stages.is_canonical:
        return flat
    empty = -len(stages.places) % layout.num_stages
    return _taken(layout, flat, np.concatenate([stages.places, np.full(empty, -1)]))


def dealt_spec(layout: Layout, axes: Axes, shape: tuple[int, ...]) -> P:
    """Where a dealt weight of stacked `shape` lies: over `pipeline`, and as the stage's own layout has it besides."""
    return P("pipeline", None, *zero.step_spec(layout.inside("pipeline"), axes, shape))


def _taken(layout: Layout, x: Float[Array, "rows ..."], sources: np.ndarray) -> Array:
    """Row i of the result is row `sources[i]` of x, zeros where that is -1; both lie in equal runs over `pipeline`.

    In as many permutes as a stage has rows to send or to get at most, a row from each stage that has one in each.
    """
    num_stages = layout.num_stages
    held, wanted = x.shape[0] // num_stages, len(sources) // num_stages
    moves = [(*divmod(row, held), *divmod(i, wanted)) for i, row in enumerate(sources.tolist()) if row >= 0]
    staying = np.full((num_stages, wanted), -1, np.int32)
    for sender, row, stage, place in moves:
        if sender == stage:
            staying[stage, place] = row
    rounds = _rounds([move for move in moves if move[0] != move[2]], num_stages)

    send, arrive = np.zeros((num_stages, len(rounds)), np.int32), np.full((num_stages, len(rounds)), -1, np.int32)
    for number, together in enumerate(rounds):
        for sender, row, receiver, place in together:
            send[sender, number], arrive[receiver, number] = row, place

    def on_stage(x: Array, staying: Array, send: Array, arrive: Array) -> Array:
        kept = (staying[0] >= 0).reshape(-1, *[1] * (x.ndim - 1))
        result = jnp.where(kept, jnp.take(x, jnp.maximum(staying[0], 0), axis=0), jnp.zeros((), x.dtype))
        for number, together in enumerate(rounds):
            sent = jax.lax.dynamic_index_in_dim(x, send[0, number], 0, keepdims=False)
            got = jax.lax.ppermute(sent, "pipeline", [(sender, receiver) for sender, _, receiver, _ in together])
            place = jnp.maximum(arrive[0, number], 0)
            there = jax.lax.dynamic_index_in_dim(result, place, 0, keepdims=False)
            got = jnp.where(arrive[0, number] >= 0, got, there)
            result = jax.lax.dynamic_update_index_in_dim(result, got, place, 0)
        return result

    # Each stage is given its rows of the tables: asked for its own number, XLA may not know it here.
    over_stages = {"in_specs": P("pipeline"), "out_specs": P("pipeline"), "axis_names": {"pipeline"}}
    run = jax.shard_map(on_stage, mesh=layout.mesh, check_vma=False, **over_stages)
    return run(x, jnp.asarray(staying), jnp.asarray(send), jnp.asarray(arrive))


Move = tuple[int, int, int, int]  # sender, its row, receiver, its place


def _rounds(moves: list[Move], num_stages: int) -> list[list[Move]]:
    """The moves in as few rounds as can be, in each of which a stage sends at most one row and gets at most one.

    A bipartite graph has as many disjoint matchings that cover it as its largest degree (Kőnig 1916): filled up to a
    regular one, each perfect matching leaves a regular one.
    """
    out, into = (np.bincount([move[side] for move in moves], minlength=num_stages) for side in (0, 2))
    degree = max(out.max(initial=0), into.max(initial=0))
    senders, receivers = (np.repeat(np.arange(num_stages), degree - count) for count in (out, into))
    left: dict[tuple[int, int], list[Move | None]] = {}
    for move in moves:
        left.setdefault((move[0], move[2]), []).append(move)
    for fill in zip(senders.tolist(), receivers.tolist(), strict=True):
        left.setdefault(fill, []).append(None)
    rounds = []
    for _ in range(degree):
        edges = np.array(list(left)).T
        graph = csr_array((np.ones(edges.shape[1]), edges), (num_stages, num_stages))
        matched = maximum_bipartite_matching(graph, perm_type="column")
        chosen = [left[sender, receiver].pop() for sender, receiver in enumerate(matched.tolist())]
        left = {edge: waiting for edge, waiting in left.items() if waiting}
        rounds.append([move for move in chosen if move is not None])
    return rounds
