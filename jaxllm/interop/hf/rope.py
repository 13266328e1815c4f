"""Rotary positions in a config.json: transformers 5 has `rope_parameters`, 4 has `rope_theta` and `rope_scaling`."""

import math
from collections.abc import Mapping
from typing import Any

from jaxllm.errors import UserError
from jaxllm.interop.hf.family import Codec, Fields, Keys, not_computed
from jaxllm.model.config import ModelConfig

# Of each kind: key -> field, beside rope_theta and factor.
NUMBERS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {},
    "dynamic": {},
    "yarn": {"beta_fast": "rope_beta_fast", "beta_slow": "rope_beta_slow", "attention_factor": "rope_attention_factor"},
    "llama3": {"low_freq_factor": "rope_low_frequency_factor", "high_freq_factor": "rope_high_frequency_factor"},
}
STRETCHES = ("yarn", "llama3")  # the kinds that know the length before they were stretched
# Said by one of the numbers above, or by the name of the kind, or the same in all models here.
SAID = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
MSCALE = {"mscale", "mscale_all_dim"}


def rope(default_theta: float = 10_000.0) -> Codec:
    """The codec of rope; `default_theta` where the file has none."""

    def read(keys: Keys) -> Fields:
        return _read(keys, default_theta)

    return Codec(read, _write, ("rope_parameters", "rope_theta", "rope_scaling", "max_position_embeddings"))


def _read(keys: Keys, default_theta: float) -> Fields:
    # As transformers 5: a rope_scaling beside it wins over rope_parameters; a theta inside wins over one outside.
    given = keys.get("rope_scaling") or keys.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise not_computed("rope_parameters", given, "one set for all layers is")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in NUMBERS:
        raise not_computed("rope_type", kind, f"one of {', '.join(NUMBERS)} is")
    for holder in (keys, given):
        if holder.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise not_computed("partial_rotary_factor", holder["partial_rotary_factor"], "only 1 is")
    if given.get("truncate") is False:
        raise not_computed("truncate", False, "the ramp of yarn begins and ends at whole frequencies")
    unknown = set(given) - SAID - set(NUMBERS[kind]) - {"partial_rotary_factor", "truncate"}
    unknown -= MSCALE if kind == "yarn" else set()
    if unknown:
        name = min(unknown)
        raise not_computed(f"{name} of rope_type {kind}", given[name], "leave it out if it changes nothing")
    theta = given.get("rope_theta") or keys.get("rope_theta") or default_theta
    length = keys.get("max_position_embeddings")
    if not isinstance(length, int):
        raise UserError("the key max_position_embeddings is missing, or no whole number.")
    if kind == "default":
        return {"max_length": length, "rope_theta": float(theta), "rope_scaling": "none"}
    return {"rope_theta": float(theta), "rope_scaling": kind} | _stretched(kind, given, keys, length)


def _stretched(kind: str, given: Keys, keys: Keys, length: int) -> Fields:
    """The fields of a context that was stretched."""
    original = keys.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or length
    factor = given.get("factor") or (length / original if kind == "yarn" else None)
    if not isinstance(factor, (int, float)) or factor < 1:
        raise not_computed("factor", factor, "a number of 1 or more is")
    fields: Fields = {"rope_factor": float(factor), "max_length": length}
    if kind == "dynamic":
        if original != length:
            raise not_computed("original_max_position_embeddings", original, "dynamic takes max_position_embeddings")
        # The file tells the length up to which nothing changes; ours is the longest text.
        fields |= {"rope_original_length": length, "max_length": round(length * factor)}
    if kind in STRETCHES:
        fields["rope_original_length"] = int(original)
        for key, name in NUMBERS[kind].items():
            if given.get(key) is not None:
                fields[name] = float(given[key])
    if kind == "yarn":
        fields["max_length"] = max(length, round(original * factor))  # Qwen's files keep the length before
        if not given.get("attention_factor") and given.get("mscale") and given.get("mscale_all_dim"):
            fields["rope_attention_factor"] = _mscale(factor, given["mscale"]) / _mscale(
                factor, given["mscale_all_dim"]
            )
    return fields


def _mscale(factor: float, weight: float) -> float:
    """DeepSeek's form of the attention factor (`get_mscale` in transformers)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _write(model: ModelConfig) -> Fields:
    kind = "default" if model.rope_scaling == "none" else model.rope_scaling
    parameters: dict[str, Any] = {"rope_type": kind}
    if kind != "default":
        parameters["factor"] = model.rope_factor
    if kind in STRETCHES:
        parameters["original_max_position_embeddings"] = model.rope_original_length
        parameters |= {key: value for key, name in NUMBERS[kind].items() if (value := getattr(model, name))}
    return {
        "max_position_embeddings": model.rope_original_length if kind == "dynamic" else model.max_length,
        "rope_parameters": parameters | {"rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,
        "rope_scaling": None if kind == "default" else parameters,
    }
