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
