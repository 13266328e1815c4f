"""What a family of models is: how its config.json and its tensors stand beside ours."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxllm.errors import UserError
from jaxllm.interop.hf.tensors import Row
from jaxllm.model.config import ModelConfig

Keys = Mapping[str, Any]  # of a config.json
Fields = dict[str, Any]  # of a ModelConfig

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


class Codec(NamedTuple):
    """Keys that are not one to one with fields: functions in both directions."""

    read: Callable[[Keys], Fields]  # raises a UserError on what is not computed here
    write: Callable[[ModelConfig], Fields]
    keys: tuple[str, ...]  # all that it reads or writes


@dataclass(frozen=True)
class Family:
    """The models of one architecture."""

    architecture: str  # "LlamaForCausalLM"
    model_type: str
    prefix: str  # of the names of the base model's tensors; files may leave it out
    rows: tuple[Row, ...]
    fields: Mapping[str, str]  # key of config.json: field of ModelConfig; null in the one is 0 in the other
    constants: Mapping[str, Any]  # fields that have one value in the whole family
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what transformers takes where a key is left out
    computed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # key: the values that are computed here
    written: Mapping[str, Any] = field(default_factory=dict)  # keys that are always written
    codecs: tuple[Codec, ...] = ()
    other_names: Mapping[str, str] = field(default_factory=dict)  # older spelling of a key: the key
    renamed: Mapping[str, str] = field(default_factory=dict)  # older end of a tensor's name: what it is now
    buffers: str = r"$^"  # names of tensors that are no parameters, a pattern
    left_out: str = r"$^"  # parameters of other heads, a pattern
    head: str = "lm_head.weight"  # the name of the head; where it is tied, of a copy that some files have
    head_bias: str = ""  # likewise, of its bias
    held: tuple[Row, ...] = ()  # matrices that transformers holds otherwise than the files: PEFT's names are of these
    also: tuple[str, ...] = ()  # other architectures with the same tensors

    def read(self, keys: Keys) -> ModelConfig:
        """The resolved model of a config.json.

        Raises:
          UserError: a key is missing or has a value that is not computed here.
        """
        keys = dict(self.defaults) | {self.other_names.get(key, key): value for key, value in keys.items()}
        for key, values in self.computed.items():
            if key in keys and keys[key] not in values:
                raise not_computed(key, keys[key], f"only {json.dumps(values[0])} is")
        found: Fields = {}
        for key, name in self.fields.items():
            if key not in keys:
                raise UserError(f"the key {key} is missing.")
            found[name] = _typed(key, keys[key], getattr(ModelConfig(), name))
        for codec in self.codecs:
            found |= codec.read(keys)
        return ModelConfig(**dict(self.constants) | found).resolved()

    def write(self, model: ModelConfig) -> Fields:
        """The keys of config.json for a resolved model. They may not say all of it: read them, and compare."""
        keys = {key: getattr(model, name) for key, name in self.fields.items()}
        keys |= {key: None for key, name in self.fields.items() if name == "sliding_window" and not keys[key]}
        for codec in self.codecs:
            keys |= codec.write(model)
        return {"architectures": [self.architecture], "model_type": self.model_type, **self.written, **keys}

    @property
    def known_keys(self) -> set[str]:
        """Every key that says something of the model."""
        keys = {*self.fields, *self.other_names, *self.written, "architectures", "model_type"}
        return keys.union(*(codec.keys for codec in self.codecs))


def not_computed(key: str, value: Any, way_out: str) -> UserError:
    """The refusal of a value that would make another model."""
    return UserError(f"{key}={json.dumps(value)} is not computed here; {way_out}.")


def _typed(key: str, value: Any, default: Any) -> Any:
    """A value as the type of the field; null is "derived" or "none", which is 0."""
    if value is None and not isinstance(default, (bool, str)):
        return type(default)(0)
    fits = isinstance(value, (int, float) if isinstance(default, float) else type(default))
    if not fits or isinstance(value, bool) != isinstance(default, bool):
        raise UserError(f"{key}={json.dumps(value)} must be a {type(default).__name__}.")
    return type(default)(value)


def activation(key: str) -> Codec:
    """The activation, under the name `key`."""

    def read(keys: Keys) -> Fields:
        if keys.get(key) not in ACTIVATIONS:
            raise not_computed(key, keys.get(key), f"one of {', '.join(ACTIVATIONS)} is")
        return {"activation": ACTIVATIONS[keys[key]]}

    def write(model: ModelConfig) -> Fields:
        names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        return {key: names[model.activation]}

    return Codec(read, write, (key,))


def _read_window(keys: Keys) -> Fields:
    """Qwen's switch, and its kinds of layers: all see a window, or none does."""
    layers, window = keys["num_hidden_layers"], keys.get("sliding_window") or 0
    types = keys.get("layer_types")
    if types is None:
        windowed = layers - keys.get("max_window_layers", 28) if keys.get("use_sliding_window") and window else 0
        windowed = max(windowed, 0)
        types = ["full_attention"] * (layers - windowed) + ["sliding_attention"] * windowed
    if set(types) not in ({"full_attention"}, {"sliding_attention"}):
        way_out = "layers that are all full_attention or all sliding_attention are"
        raise not_computed("layer_types", sorted(set(types)), way_out)
    return {"sliding_window": window if types[0] == "sliding_attention" else 0}


def _write_window(model: ModelConfig) -> Fields:
    kind = "sliding_attention" if model.sliding_window else "full_attention"
    return {
        "use_sliding_window": bool(model.sliding_window),
        "sliding_window": model.sliding_window or None,
        "max_window_layers": 0 if model.sliding_window else model.num_layers,
        "layer_types": [kind] * model.num_layers,
    }


def _read_switch(keys: Keys) -> Fields:
    return {"sliding_window": (keys.get("sliding_window") or 0) if keys.get("use_sliding_window") else 0}


def _write_switch(model: ModelConfig) -> Fields:
    return {"use_sliding_window": bool(model.sliding_window), "sliding_window": model.sliding_window or None}


WINDOW_BY_LAYER = Codec(
    _read_window, _write_window, ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
)
WINDOW_SWITCH = Codec(_read_switch, _write_switch, ("use_sliding_window", "sliding_window"))


def _read_balance_loss(keys: Keys) -> Fields:
    """transformers adds the loss only where it is asked for the router's logits."""
    return {"router_balance_loss": float(keys["router_aux_loss_coef"]) if keys.get("output_router_logits") else 0.0}


def _write_balance_loss(model: ModelConfig) -> Fields:
    weight = model.router_balance_loss
    return {"output_router_logits": weight > 0} | ({"router_aux_loss_coef": weight} if weight else {})


BALANCE_LOSS = Codec(_read_balance_loss, _write_balance_loss, ("output_router_logits", "router_aux_loss_coef"))
