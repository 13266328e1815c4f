"""The config group `config.model.*`: what the model computes, nothing about where."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. The defaults are a small GPT-2; presets are in model/presets.py."""

    num_layers: int = 4
    embed_dim: int = 256
    num_heads: int = 4
    num_kv_heads: int = 0  # 0: as many as num_heads (MHA); 1 is MQA, between is GQA
    head_dim: int = 0  # 0: embed_dim / num_heads
    mlp_dim: int = 0  # 0: 4 * embed_dim
    vocab_size: int = 0  # 0: the tokenizer's
    max_length: int = 1024  # the longest context, in tokens
    positions: str = "learned"  # learned | rope | none
    rope_theta: float = 10_000.0
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_epsilon: float = 1e-5
    activation: str = "gelu_tanh"  # gelu | gelu_tanh | silu | relu
    gated_mlp: bool = False  # down(activation(gate x) * up x); with silu this is SwiGLU
    use_bias: bool = True  # biases of all linear layers and of LayerNorm
    tied_head: bool = True  # the head is the transposed embedding
    dropout: float = 0.0  # on the embedding and on what each block adds to the residual
    attention_dropout: float = 0.0  # on the attention probabilities
    z_loss: float = 0.0  # weight of log(Z)^2 in the loss (PaLM uses 1e-4)
    init_std: float = 0.02

    def resolved(self, vocab_size: int = 0) -> "ModelConfig":
        """The same model with every 0 that stands for "derived" filled in; `vocab_size` is the tokenizer's."""
        return dataclasses.replace(
            self,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.embed_dim // self.num_heads,
            mlp_dim=self.mlp_dim or 4 * self.embed_dim,
            vocab_size=self.vocab_size or vocab_size,
        )
