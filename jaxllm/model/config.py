"""The config group `config.model.*`: what the model computes, nothing about where."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """A transformer. The defaults are a small GPT-2; presets are in model/presets.py."""

    num_layers: int = 4
    embed_dim: int = 256
    num_heads: int = 4
    num_kv_heads: int = 0  # 0: as many as num_heads (MHA); 1 is MQA, between is GQA
    head_dim: int = 0  # 0: embed_dim / num_heads
    mlp_dim: int = 0  # 0: 4 * embed_dim
    vocab_size: int = 0  # 0: the tokenizer's
    max_length: int = 1024  # the longest context, in tokens
    positions: str = "learned"  # learned | rope | alibi | none
    rope_theta: float = 10_000.0
    rope_scaling: str = "none"  # none | linear | dynamic | yarn | llama3: see model/rope.py
    rope_factor: float = 1.0  # how many times longer a context than rope_original_length
    rope_original_length: int = 0  # the longest context before scaling, in tokens; 0: max_length / rope_factor
    rope_low_frequency_factor: float = 1.0  # llama3
    rope_high_frequency_factor: float = 4.0  # llama3
    rope_beta_fast: float = 32.0  # yarn: turns in the original context above which a frequency is kept
    rope_beta_slow: float = 1.0  # yarn: turns below which it is divided by rope_factor
    rope_attention_factor: float = 0.0  # yarn: scales cosine and sine; 0: 0.1 ln(rope_factor) + 1
    causal: bool = True  # False: a token sees its whole document (BERT)
    sliding_window: int = 0  # tokens that a token sees at most, itself included; 0: all
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_position: str = "pre"  # pre: x + f(norm(x)), and one norm at the end | post: norm(x + f(x)) (BERT)
    norm_epsilon: float = 1e-5
    embedding_norm: bool = False  # a norm right after the embedding (BLOOM, BERT)
    qk_norm: bool = False  # RMSNorm of each head's query and key, before they are rotated (Qwen 3)
    activation: str = "gelu_tanh"  # gelu | gelu_tanh | silu | relu
    gated_mlp: bool = False  # down(activation(gate x) * up x); with silu this is SwiGLU
    num_experts: int = 0  # 0: a dense mlp; else so many, each of mlp_dim (model/moe.py)
    experts_per_token: int = 2
    router_renormalize: bool = True  # the probabilities of a token's experts add up to 1
    router_balance_loss: float = 0.0  # weight of the load-balancing loss, experts_per_token where all is even
    router_z_loss: float = 0.0  # weight of the square of the router's log(Z) (ST-MoE: 1e-3)
    expert_dispatch: str = "dropless"  # dropless | capacity: what is over an expert's share of a row is dropped
    capacity_factor: float = 1.25  # capacity: slots an expert has, as a multiple of an even share
    use_bias: bool = True  # biases of all linear layers but experts, and of LayerNorm
    qkv_bias: bool = False  # biases of query, key and value even without use_bias (Qwen 2)
    token_types: int = 0  # kinds of tokens with an embedding each (BERT: 2, the sentences of a pair)
    tied_head: bool = True  # the head is the transposed embedding
    head_transform: bool = False  # a linear layer, the activation and a norm before the head (BERT)
    head_bias: bool = False  # a bias for each token of the vocabulary
    scalar_head: bool = False  # besides, one number a token: a reward model's score, a critic's value
    dropout: float = 0.0  # on the embedding and on what each block adds to the residual
    attention_dropout: float = 0.0  # on the attention probabilities
    neftune_alpha: float = 0.0  # noise on the embeddings in training (model/dropout.py); 5 to 15 in the paper
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
            rope_original_length=self.rope_original_length or round(self.max_length / self.rope_factor),
        )


# What the use of a model does not depend on: noise, losses, and what training drops of the experts' work.
_TRAINING_ONLY = (
    "dropout",
    "attention_dropout",
    "neftune_alpha",
    "z_loss",
    "init_std",
    "router_balance_loss",
    "router_z_loss",
    "expert_dispatch",
    "capacity_factor",
)
_ROPE = {  # the fields that each kind of scaling reads
    "none": (),
    "linear": ("rope_factor",),
    "dynamic": ("rope_factor", "rope_original_length"),
    "yarn": ("rope_factor", "rope_original_length", "rope_beta_fast", "rope_beta_slow", "rope_attention_factor"),
    "llama3": ("rope_factor", "rope_original_length", "rope_low_frequency_factor", "rope_high_frequency_factor"),
}


def outputs_depend_on(model: ModelConfig) -> dict[str, Any]:
    """The fields of a resolved config that its outputs depend on, with their values."""
    fields = {name: value for name, value in dataclasses.asdict(model).items() if name not in _TRAINING_ONLY}
    rope = ("rope_theta", "rope_scaling", *_ROPE[model.rope_scaling]) if model.positions == "rope" else ()
    unread = [name for name in fields if name.startswith("rope_") and name not in rope]
    unread += ["max_length"] * (model.positions != "learned")
    unread += ["qkv_bias"] * model.use_bias
    unread += ["experts_per_token", "router_renormalize"] * (not model.num_experts)
    return {name: value for name, value in fields.items() if name not in unread}


def differing(first: ModelConfig, second: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """field -> (value in the first, in the second), of the fields that make two resolved models compute differently."""
    ours, theirs = dataclasses.asdict(first), dataclasses.asdict(second)
    names = outputs_depend_on(first) | outputs_depend_on(second)
    return {name: (ours[name], theirs[name]) for name in names if ours[name] != theirs[name]}
