"""Published models as values for `config.model.update(...)`. Every function takes overrides by field name."""

from typing import Any


def gpt2(**overrides: Any) -> dict[str, Any]:
    """GPT-2, 124M (Radford et al. 2019). Dropout is left at 0: see `config.model.dropout`."""
    return {
        "num_layers": 12,
        "embed_dim": 768,
        "num_heads": 12,
        "num_kv_heads": 0,
        "head_dim": 0,
        "mlp_dim": 0,
        "max_length": 1024,
        "positions": "learned",
        "norm": "layernorm",
        "norm_epsilon": 1e-5,
        "activation": "gelu_tanh",
        "gated_mlp": False,
        "use_bias": True,
        "tied_head": True,
    } | overrides


def gpt2_medium(**overrides: Any) -> dict[str, Any]:
    """GPT-2, 355M."""
    return gpt2(num_layers=24, embed_dim=1024, num_heads=16) | overrides


def gpt2_large(**overrides: Any) -> dict[str, Any]:
    """GPT-2, 774M."""
    return gpt2(num_layers=36, embed_dim=1280, num_heads=20) | overrides


def gpt2_xl(**overrides: Any) -> dict[str, Any]:
    """GPT-2, 1.5B."""
    return gpt2(num_layers=48, embed_dim=1600, num_heads=25) | overrides


def llama2_7b(**overrides: Any) -> dict[str, Any]:
    """Llama 2 7B (Touvron et al. 2023)."""
    return {
        "num_layers": 32,
        "embed_dim": 4096,
        "num_heads": 32,
        "num_kv_heads": 0,
        "head_dim": 0,
        "mlp_dim": 11_008,
        "max_length": 4096,
        "positions": "rope",
        "rope_theta": 10_000.0,
        "norm": "rmsnorm",
        "norm_epsilon": 1e-5,
        "activation": "silu",
        "gated_mlp": True,
        "use_bias": False,
        "tied_head": False,
    } | overrides


def llama2_13b(**overrides: Any) -> dict[str, Any]:
    """Llama 2 13B."""
    return llama2_7b(num_layers=40, embed_dim=5120, num_heads=40, mlp_dim=13_824) | overrides


def llama2_70b(**overrides: Any) -> dict[str, Any]:
    """Llama 2 70B, with grouped queries."""
    return llama2_7b(num_layers=80, embed_dim=8192, num_heads=64, num_kv_heads=8, mlp_dim=28_672) | overrides


def llama3_8b(**overrides: Any) -> dict[str, Any]:
    """Llama 3 8B (Grattafiori et al. 2024)."""
    return llama2_7b(num_kv_heads=8, mlp_dim=14_336, max_length=8192, rope_theta=500_000.0) | overrides


def llama3_70b(**overrides: Any) -> dict[str, Any]:
    """Llama 3 70B."""
    return llama3_8b(num_layers=80, embed_dim=8192, num_heads=64, mlp_dim=28_672) | overrides


def llama31_8b(**overrides: Any) -> dict[str, Any]:
    """Llama 3.1 8B: Llama 3 stretched to 131,072 tokens."""
    scaled = {"max_length": 131_072, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_length": 8192}
    return llama3_8b(**scaled) | overrides


def mistral_7b(**overrides: Any) -> dict[str, Any]:
    """Mistral 7B v0.1 (Jiang et al. 2023): a window of 4,096 tokens."""
    return llama2_7b(num_kv_heads=8, mlp_dim=14_336, max_length=32_768, sliding_window=4096) | overrides


def qwen2_7b(**overrides: Any) -> dict[str, Any]:
    """Qwen2 7B (Yang et al. 2024): biases of query, key and value."""
    sizes = {"num_layers": 28, "embed_dim": 3584, "num_heads": 28, "num_kv_heads": 4, "mlp_dim": 18_944}
    rest = {"max_length": 32_768, "rope_theta": 1e6, "norm_epsilon": 1e-6, "qkv_bias": True}
    return llama2_7b(**sizes, **rest) | overrides


def qwen3_8b(**overrides: Any) -> dict[str, Any]:
    """Qwen3 8B (Yang et al. 2025): normalised queries and keys."""
    sizes = {"num_layers": 36, "embed_dim": 4096, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    rest = {"mlp_dim": 12_288, "max_length": 40_960, "rope_theta": 1e6, "norm_epsilon": 1e-6, "qk_norm": True}
    return llama2_7b(**sizes, **rest) | overrides


def bloom_560m(**overrides: Any) -> dict[str, Any]:
    """BLOOM 560M (Le Scao et al. 2022): ALiBi, a norm after the embedding."""
    sizes = {"num_layers": 24, "embed_dim": 1024, "num_heads": 16, "max_length": 2048}
    return gpt2(**sizes, positions="alibi", embedding_norm=True) | overrides


def bloom_176b(**overrides: Any) -> dict[str, Any]:
    """BLOOM 176B."""
    return bloom_560m(num_layers=70, embed_dim=14_336, num_heads=112) | overrides


def bert_base(**overrides: Any) -> dict[str, Any]:
    """BERT base (Devlin et al. 2019), with its head for masked tokens. Train it with `config.train_step = "mlm"`."""
    rest = {"causal": False, "norm_position": "post", "norm_epsilon": 1e-12, "embedding_norm": True}
    head = {"token_types": 2, "head_transform": True, "head_bias": True}
    return gpt2(max_length=512, activation="gelu", **rest, **head) | overrides


def bert_large(**overrides: Any) -> dict[str, Any]:
    """BERT large."""
    return bert_base(num_layers=24, embed_dim=1024, num_heads=16) | overrides


def mixtral_8x7b(**overrides: Any) -> dict[str, Any]:
    """Mixtral 8x7B (Jiang et al. 2024): two of eight experts a token. `router_balance_loss` as in its config file."""
    rest = {"max_length": 32_768, "rope_theta": 1e6, "router_balance_loss": 0.02}
    return mistral_7b(num_experts=8, experts_per_token=2, sliding_window=0, **rest) | overrides


def mixtral_8x22b(**overrides: Any) -> dict[str, Any]:
    """Mixtral 8x22B."""
    sizes = {"num_layers": 56, "embed_dim": 6144, "num_heads": 48, "mlp_dim": 16_384, "max_length": 65_536}
    return mixtral_8x7b(**sizes, router_balance_loss=0.001) | overrides


def qwen3_235b_a22b(**overrides: Any) -> dict[str, Any]:
    """Qwen3 235B-A22B (Yang et al. 2025): 8 of 128 experts a token."""
    sizes = {"num_layers": 94, "num_heads": 64, "num_kv_heads": 4, "mlp_dim": 1536}
    return qwen3_8b(num_experts=128, experts_per_token=8, router_balance_loss=0.001, **sizes) | overrides
