"""What can be said of `config.adapter` before anything is compiled."""

from jaxllm.errors import UserError
from jaxllm.model.spec import model_spec
from jaxllm.steps import STEPS
from jaxllm.train.config import Config


def check_adapter(config: Config) -> None:
    """Holds the adapter against the train step and the model.

    Raises:
      UserError: a step that trains none or another kind, no model to train it for, or layers that are not there.
    """
    adapter = config.adapter
    _check_kind(config)
    if adapter.kind == "none":
        if adapter.base_weights != "compute":
            raise UserError(
                f"config.adapter.base_weights={adapter.base_weights}: without an adapter (config.adapter.kind=none) "
                "every weight is trained, and none can be held so. "
                "Use --config.train_step=lora --config.adapter.kind=lora."
            )
        if adapter.init_from:
            raise UserError(
                f"config.adapter.init_from={adapter.init_from} goes on with an adapter, and config.adapter.kind=none. "
                f"Take that of the run: --config.adapter={adapter.init_from}."
            )
        return
    if not config.train.init_from:
        raise UserError(
            f"config.adapter.kind={adapter.kind} trains a few weights beside a model: say which one, "
            "--config.train.init_from=WORKDIR."
        )
    if adapter.base_weights == "nf4" and config.model.embed_dim % 2:
        raise UserError(
            f"config.adapter.base_weights=nf4 packs two weights to a byte, and config.model.embed_dim="
            f"{config.model.embed_dim} is odd. Use --config.adapter.base_weights=compute."
        )
    if adapter.places:
        _check_prompt(config)
    spec = model_spec(config.model.resolved(1), adapter)  # refuses targets that are not there
    if adapter.kind == "lora" and adapter.dropout and any("experts" in axes for axes in _of_adapter(spec)):
        raise UserError(
            f"config.adapter.dropout={adapter.dropout:g}: an adapter of experts has none, their matrices are merged "
            "for each step. Set it to 0, or leave mlp.gate, mlp.up and mlp.down out of config.adapter.targets."
        )


def _check_prompt(config: Config) -> None:
    adapter, length = config.adapter, config.data.length or config.model.max_length
    if adapter.places > length - 2:
        raise UserError(
            f"config.adapter.num_virtual_tokens={adapter.places} leave no room for text in a row of {length} tokens "
            f"(config.data.length, where that is 0 config.model.max_length). Set it to at most {length - 2}."
        )
    if adapter.kind == "prompt" and (adapter.prompt_init == "text") != bool(adapter.prompt_text):
        raise UserError(
            f"config.adapter.prompt_init={adapter.prompt_init} and config.adapter.prompt_text={adapter.prompt_text!r}: "
            "virtual tokens start as a text's with prompt_init=text and that text in prompt_text."
        )


def _of_adapter(spec) -> list[tuple[str, ...]]:
    return [tensor.axes for path, tensor in spec.parameters.items() if ".lora." in path]


def _check_kind(config: Config) -> None:
    step, kind = config.train_step, config.adapter.kind
    kinds = STEPS[step].adapters
    if kind in kinds:
        return
    fitting = [name for name, other in STEPS.items() if kind in other.adapters]
    raise UserError(
        f"config.train_step={step} does not go with config.adapter.kind={kind}: it trains "
        f"{_trained(kinds)}. "
        f"Use --config.adapter.kind={' or '.join(kinds)}, or --config.train_step={' or '.join(fitting)}."
    )


def _trained(kinds: tuple[str, ...]) -> str:
    """What a step that trains these kinds trains."""
    if kinds == ("none",):
        return "the whole model"
    return "the whole model or a LoRA" if "none" in kinds else "an adapter"
