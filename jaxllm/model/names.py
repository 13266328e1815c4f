"""Every parameter knows its path in the model, so that what is computed with it can be named after it."""

from flax import nnx


def name_parameters(model: nnx.Module) -> None:
    """Writes into each parameter of a whole model its path: "layers.attention.query.kernel"."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param):
            node.set_metadata(name=".".join(map(str, path)))


def name_of(parameter: nnx.Param) -> str:
    """The path of a parameter; "" in a module that stands alone."""
    return parameter.get_metadata().get("name", "")
