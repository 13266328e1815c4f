"""The train state: one canonical form, whatever the layout (DESIGN: "One state, one truth")."""

from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

Params = dict[str, Any]  # nested by attribute name, e.g. params["layers"]["attention"]["query"]["kernel"]


class TrainState(NamedTuple):
    """Everything a step reads and writes on the devices. The data iterator's state is saved beside it."""

    step: Int[Array, ""]  # optimizer steps taken
    params: Params  # float32 master weights; those of the layers stacked as [layers, …]
    optimizer: Any  # optax state; moments have the shapes of the params
    nonfinite: Int[Array, ""]  # steps skipped because the gradient was not finite
    loss_scale: Float[Array, ""]  # 1 unless compute is float16
    scale_age: Int[Array, ""]  # steps since the loss scale last changed
