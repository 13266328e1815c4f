"""The models that the tests compare: one or more of each family, tiny, every tensor random."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = 320
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
BERT = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 6}  # slopes of no power of two
WINDOW = {"sliding_window": 7}  # shorter than the texts
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# name: (class of transformers, its config)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2_untied": ("GPT2LMHeadModel", GPT2 | {"n_inner": 40, "tie_word_embeddings": False}),
    "llama": ("LlamaForCausalLM", LLAMA | {"rope_theta": 500_000.0}),
    "llama_tied": ("LlamaForCausalLM", LLAMA | {"head_dim": 12, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", LLAMA | WINDOW),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen2_window": ("Qwen2ForCausalLM", LLAMA | WINDOW | {"use_sliding_window": True, "max_window_layers": 0}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 16}),
    "bloom": ("BloomForCausalLM", BLOOM),
    "bert": ("BertForMaskedLM", BERT),
    "mixtral": ("MixtralForCausalLM", LLAMA | EXPERTS),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        LLAMA | {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe_renormalized": (
        "Qwen3MoeForCausalLM",
        LLAMA
        | WINDOW
        | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 3}
        | {"norm_topk_prob": True, "use_sliding_window": True},
    ),
}
# Positions from 32 on are beyond what each was trained on.
ROPE: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 24,
        "mscale": 0.8,
        "mscale_all_dim": 0.5,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def stretched(kind: str) -> tuple[str, dict[str, Any]]:
    """A Llama with a scaled rope."""
    length = 32 if kind == "dynamic" else 128
    scaled = {"max_position_embeddings": length, "rope_parameters": ROPE[kind] | {"rope_theta": 10_000.0}}
    return "LlamaForCausalLM", LLAMA | scaled


def make(architecture: str, config: Mapping[str, Any], dtype: str = "float32", seed: int = 0):
    """The model of transformers, in evaluation mode. Norms are near one, the rest has a standard deviation of 0.15."""
    kind = getattr(transformers, architecture)
    settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attn_implementation": "eager"}
    model = kind(kind.config_class(**settings | dict(config))).eval()
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            values = generator.normal(float(is_norm), 0.15, parameter.shape).astype(np.float32)
            # The parameters alone change their dtype, as when a model is loaded: frequencies stay float32.
            parameter.data = torch.from_numpy(values).to(getattr(torch, dtype))
    return model


def save(model, folder: Path, tokenizer=None, **options: Any) -> Path:
    """Writes the directory of a model, with jaxllm's tokenizer where one is given."""
    model.save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save(folder)
    return folder
