"""The train state: one canonical form, whatever the layout (DESIGN: "One state, one truth")."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxllm.layout import zero
from jaxllm.layout.at_rest import fitted, shape_at_rest
from jaxllm.layout.layout import Layout, as_dtype
from jaxllm.layout.scope import joined, like, without
from jaxllm.model.actor_critic import started_run
from jaxllm.model.spec import ModelSpec
from jaxllm.train.optimizer import map_param_leaves
from jaxllm.train.reference import held_reference

Params = dict[str, Any]  # nested by attribute name, e.g. params["layers"]["attention"]["query"]["kernel"]
FIRST_LOSS_SCALE = (
    2.0**15
)  # float16; halved after an overflow, doubled after 2,000 good steps (Micikevicius et al. 2018)

WHOLE = P()


class TrainState(NamedTuple):
    """Everything a step reads and writes on the devices. The data iterator's state is saved beside it."""

    step: Int[Array, ""]  # batches consumed
    # float32 master weights of what is trained; those of the layers stacked as [layers, …] (layout/at_rest.py)
    params: Params
    optimizer: Any  # optax state; moments have the shapes of the params
    nonfinite: Int[Array, ""]  # steps without an update: not finite, or a spike that is to be skipped
    loss_scale: Float[Array, ""]  # 1 unless compute is float16
    scale_age: Int[Array, ""]  # steps since the loss scale last changed
    constants: Params  # an adapter's parameters that are not trained, float32; mostly {}
    frozen: Params  # the model that an adapter is for, as it is held (model/frozen.py); in no checkpoint
    reference: Params  # what the run is held against (train/reference.py); mostly {}; in no checkpoint

    @property
    def own(self) -> Params:
        """The parameters that belong to the run: not those of a model that it trains an adapter for."""
        return joined(self.params, self.constants)

    @property
    def held(self) -> Params:
        """What a step computes with and does not train."""
        return joined(self.constants, self.frozen)


def new_state(
    spec: ModelSpec, optimizer: optax.GradientTransformation, seed: int, compute: str = "bfloat16", reference: str = ""
) -> TrainState:
    """The state at step 0 of a random model. Traceable; `init_state` runs it on the devices of a layout."""
    return state_of(spec.init(seed), spec, optimizer, compute, reference)


def state_of(
    params: Params,
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    compute: str = "bfloat16",
    reference: str = "",
) -> TrainState:
    """The state at step 0 of a run that starts from `params`, float32, an adapter's among them. Traceable.

    Args:
      reference: its kind (train/reference.py); it is the model that the run starts from.
    """
    count = jnp.zeros((), jnp.int32)
    scale = jnp.float32(FIRST_LOSS_SCALE if compute == "float16" else 1)
    trained, frozen = spec.trained(params), spec.frozen(params, as_dtype(compute))
    refers_to = held_reference(reference, spec, params, as_dtype(compute))
    own = (spec.constants(params), frozen, refers_to)
    return TrainState(count, trained, optimizer.init(trained), count, scale, count, *own)


def abstract_state(
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    compute: str = "bfloat16",
    reference: str = "",
) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s with their shardings: what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda: new_state(spec, optimizer, 0, compute, reference))
    return place_state(shapes, spec, optimizer, layout, compute)


def place_state(
    shapes: TrainState,
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    compute: str = "bfloat16",
) -> TrainState:
    """The state's shapes with their shardings under `layout`, whose mesh may be an `AbstractMesh`."""

    def whole(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(layout.mesh, WHOLE))

    def moment(leaf: jax.ShapeDtypeStruct, param: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*param.shape[:1], *leaf.shape[1:]), leaf.dtype, sharding=param.sharding)

    held = spec.held_axes(as_dtype(compute))
    axes = {"params": spec.trained_axes, "reference": like(spec.axes, shapes.reference)}
    axes |= {name: like(held, getattr(shapes, name)) for name in ("constants", "frozen")}
    parts = {name: spread(getattr(shapes, name), of_part, layout) for name, of_part in axes.items()}
    moments = map_param_leaves(optimizer, moment, shapes.optimizer, parts["params"], transform_non_params=whole)
    placed = jax.tree.map(whole, shapes._replace(optimizer=None, **dict.fromkeys(parts)))
    return placed._replace(optimizer=moments, **parts)


def init_state(
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    seed: int,
    compute: str = "bfloat16",
    reference: str = "",
) -> TrainState:
    """The state at step 0, made on the devices where it stays; its values depend on the seed alone."""
    abstract = abstract_state(spec, optimizer, layout, compute, reference)
    return _placed(lambda: new_state(spec, optimizer, seed, compute, reference), abstract)()


def init_state_from(
    base: Params,
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    seed: int = 0,
    compute: str = "bfloat16",
    prompt: Sequence[int] = (),
    adapter: Params | None = None,
    reference: str = "",
    critic: Params | None = None,
) -> TrainState:
    """The state at step 0 around the parameters of a model, which lie as `abstract_base` says and are given up.

    Args:
      prompt: the tokens of an adapter's text.
      adapter: its own parameters; default: it starts from `seed`, and from the model where its kind says so.
      reference: its kind (train/reference.py).
      critic: its own parameters, where the run has one.
    """
    abstract = abstract_state(spec, optimizer, layout, compute, reference)

    def make(base: Params, adapter: Params | None, critic: Params | None) -> TrainState:
        params = started_run(spec, fitted(base, like(spec.shapes, base)), seed, prompt, critic)
        if adapter is not None:
            params = joined(without(params, adapter), fitted(adapter, like(spec.shapes, adapter)))
        return state_of(params, spec, optimizer, compute, reference)

    given_up = () if spec.is_adapted else (0,)  # a base is held in another dtype: nothing of it can be used again
    return _placed(make, abstract, given_up)(base, adapter, critic)


def frozen_state(base: Params, spec: ModelSpec, layout: Layout, compute: str) -> Params:
    """`TrainState.frozen` of the parameters of a model, which lie as `abstract_base` says."""
    freeze = lambda base: spec.frozen(fitted(base, like(spec.shapes, base)), as_dtype(compute))  # noqa: E731
    shapes = jax.eval_shape(freeze, base)
    return _placed(freeze, spread(shapes, like(spec.held_axes(as_dtype(compute)), shapes), layout))(base)


def placed_reference(make: Callable[..., Params], abstract: TrainState, *params: Params) -> Params:
    """What `make(*params)` makes of parameters, where the reference of a state lies."""
    return _placed(make, abstract.reference)(*params)


def _placed(make: Callable[..., Any], abstract: Any, donated: Sequence[int] = ()) -> Callable[..., Any]:
    """The jitted function, its results where `abstract` has them and of those shapes."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    fit = lambda *arguments: fitted(make(*arguments), abstract)  # noqa: E731
    return jax.jit(fit, out_shardings=shardings, donate_argnums=donated)


def abstract_base(spec: ModelSpec, layout: Layout, scalar_head: bool = False) -> Params:
    """The float32 parameters of the language model, spread as a state is; with those of its scalar head if asked."""
    part = lambda tree: joined(spec.base(tree), spec.added(tree) if scalar_head else {})  # noqa: E731
    return spread(part(spec.shapes), part(spec.axes), layout)


def spread(shapes: Params, axes: Params, layout: Layout) -> Params:
    """Parameters' shapes as `jax.ShapeDtypeStruct`s that lie as those of a state do."""

    def place(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        shape = shape_at_rest(layout, axes, leaf.shape)
        sharding = NamedSharding(layout.mesh, zero.state_spec(layout, axes, shape))
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, axes)


def bytes_per_device(abstract: Any) -> int:
    """Bytes that one device holds of a tree of arrays or of `jax.ShapeDtypeStruct`s with shardings."""
    leaves = jax.tree.leaves(abstract)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
