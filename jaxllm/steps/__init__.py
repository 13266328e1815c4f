"""Train steps: a step is a loss and what it trains, one file each; `STEPS` has all of them by name."""

from typing import Any


def __getattr__(name: str) -> Any:
    """STEPS, when it is asked for: the config groups of this room are read without JAX."""
    if name == "STEPS":
        from jaxllm.steps.table import STEPS

        return STEPS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
