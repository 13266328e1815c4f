"""The families as tables. A new one of known parts is a few lines here, and nothing in the model."""

from collections.abc import Iterable

from jaxllm.interop.hf.family import BALANCE_LOSS, WINDOW_BY_LAYER, WINDOW_SWITCH, Family, activation
from jaxllm.interop.hf.rope import rope
from jaxllm.interop.hf.tensors import Row


def _norm(path: str, name: str) -> tuple[Row, ...]:
    return Row(f"{path}.scale", f"{name}.weight", "embed"), Row(f"{path}.bias", f"{name}.bias", "embed")


def _linear(path: str, name: str, pattern: str, bias: str) -> tuple[Row, ...]:
    return Row(f"{path}.kernel", f"{name}.weight", pattern), Row(f"{path}.bias", f"{name}.bias", bias)


def _projections(names: Iterable[str]) -> tuple[Row, ...]:
    """Query, key and value as three matrices [out, in]."""
    rows: tuple[Row, ...] = ()
    for ours, heads, name in zip(("query", "key", "value"), ("heads", "kv_heads", "kv_heads"), names, strict=True):
        out = f"({heads} head_dim)"
        rows += _linear(f"layers.attention.{ours}", name, f"{out} embed", out)
    return rows


def _fused(name: str, pattern: str, bias: str) -> tuple[Row, ...]:
    """Query, key and value in one tensor."""
    rows: tuple[Row, ...] = ()
    for part, (ours, heads) in enumerate({"query": "heads", "key": "kv_heads", "value": "kv_heads"}.items()):
        for row in _linear(f"layers.attention.{ours}", name, pattern, bias):
            rows += (row._replace(pattern=row.pattern.replace("heads", heads), part=part, parts=3),)
    return rows


def _experts(block: str, names: dict[str, str]) -> tuple[Row, ...]:
    """A router and, by expert, the matrices [out, in] of gated ones; `names` of gate, up and down."""
    matrices = {"gate": "mlp embed", "up": "mlp embed", "down": "embed mlp"}
    return (
        Row("layers.mlp.router.kernel", f"{block}.gate.weight", "experts embed"),
        *(
            Row(f"layers.mlp.{ours}.kernel", f"{block}.experts.{{expert}}.{names[ours]}.weight", pattern)
            for ours, pattern in matrices.items()
        ),
    )


def _held_experts(block: str) -> tuple[Row, ...]:
    """As transformers 5 holds the same matrices: those of all experts in one parameter, gate and up side by side."""
    fused, pattern = f"{block}.experts.gate_up_proj", "experts (part mlp) embed"
    return (
        Row("layers.mlp.router.kernel", f"{block}.gate.weight", "experts embed"),
        Row("layers.mlp.gate.kernel", fused, pattern, part=0, parts=2),
        Row("layers.mlp.up.kernel", fused, pattern, part=1, parts=2),
        Row("layers.mlp.down.kernel", f"{block}.experts.down_proj", "experts embed mlp"),
    )


_LLAMA_BLOCK = "model.layers.{layer}"
_LLAMA_AROUND_MLP = (
    Row("embedding.table", "model.embed_tokens.weight", "vocab embed"),
    *_norm("layers.attention_norm", f"{_LLAMA_BLOCK}.input_layernorm"),
    *_projections(f"{_LLAMA_BLOCK}.self_attn.{name}_proj" for name in "qkv"),
    Row("layers.attention.query_norm.scale", f"{_LLAMA_BLOCK}.self_attn.q_norm.weight", "head_dim"),
    Row("layers.attention.key_norm.scale", f"{_LLAMA_BLOCK}.self_attn.k_norm.weight", "head_dim"),
    Row("layers.attention.out.kernel", f"{_LLAMA_BLOCK}.self_attn.o_proj.weight", "embed (heads head_dim)"),
    *_norm("layers.mlp_norm", f"{_LLAMA_BLOCK}.post_attention_layernorm"),
    *_norm("final_norm", "model.norm"),
    Row("output.table", "lm_head.weight", "vocab embed"),
)
_LLAMA_ROWS = (
    *_LLAMA_AROUND_MLP,
    Row("layers.mlp.gate.kernel", f"{_LLAMA_BLOCK}.mlp.gate_proj.weight", "mlp embed"),
    Row("layers.mlp.up.kernel", f"{_LLAMA_BLOCK}.mlp.up_proj.weight", "mlp embed"),
    Row("layers.mlp.down.kernel", f"{_LLAMA_BLOCK}.mlp.down_proj.weight", "embed mlp"),
)
_GPT2_BLOCK = "transformer.h.{layer}"
_GPT2_ROWS = (  # Conv1D: [in, out]
    Row("embedding.table", "transformer.wte.weight", "vocab embed"),
    Row("position_embedding", "transformer.wpe.weight", "positions embed"),
    *_norm("layers.attention_norm", f"{_GPT2_BLOCK}.ln_1"),
    *_fused(f"{_GPT2_BLOCK}.attn.c_attn", "embed (part heads head_dim)", "(part heads head_dim)"),
    *_linear("layers.attention.out", f"{_GPT2_BLOCK}.attn.c_proj", "(heads head_dim) embed", "embed"),
    *_norm("layers.mlp_norm", f"{_GPT2_BLOCK}.ln_2"),
    *_linear("layers.mlp.up", f"{_GPT2_BLOCK}.mlp.c_fc", "embed mlp", "mlp"),
    *_linear("layers.mlp.down", f"{_GPT2_BLOCK}.mlp.c_proj", "mlp embed", "embed"),
    *_norm("final_norm", "transformer.ln_f"),
    Row("output.table", "lm_head.weight", "vocab embed"),
)
_BLOOM_ROWS = (
    Row("embedding.table", "transformer.word_embeddings.weight", "vocab embed"),
    *_norm("embedding_norm", "transformer.word_embeddings_layernorm"),
    *_norm("layers.attention_norm", f"{_GPT2_BLOCK}.input_layernorm"),
    *_fused(f"{_GPT2_BLOCK}.self_attention.query_key_value", "(heads part head_dim) embed", "(heads part head_dim)"),
    *_linear("layers.attention.out", f"{_GPT2_BLOCK}.self_attention.dense", "embed (heads head_dim)", "embed"),
    *_norm("layers.mlp_norm", f"{_GPT2_BLOCK}.post_attention_layernorm"),
    *_linear("layers.mlp.up", f"{_GPT2_BLOCK}.mlp.dense_h_to_4h", "mlp embed", "mlp"),
    *_linear("layers.mlp.down", f"{_GPT2_BLOCK}.mlp.dense_4h_to_h", "embed mlp", "embed"),
    *_norm("final_norm", "transformer.ln_f"),
    Row("output.table", "lm_head.weight", "vocab embed"),
)
_BERT_BLOCK, _BERT_HEAD = "bert.encoder.layer.{layer}", "cls.predictions"
_BERT_ROWS = (
    Row("embedding.table", "bert.embeddings.word_embeddings.weight", "vocab embed"),
    Row("position_embedding", "bert.embeddings.position_embeddings.weight", "positions embed"),
    Row("type_embedding", "bert.embeddings.token_type_embeddings.weight", "types embed"),
    *_norm("embedding_norm", "bert.embeddings.LayerNorm"),
    *_projections(f"{_BERT_BLOCK}.attention.self.{name}" for name in ("query", "key", "value")),
    *_linear("layers.attention.out", f"{_BERT_BLOCK}.attention.output.dense", "embed (heads head_dim)", "embed"),
    *_norm("layers.attention_norm", f"{_BERT_BLOCK}.attention.output.LayerNorm"),
    *_linear("layers.mlp.up", f"{_BERT_BLOCK}.intermediate.dense", "mlp embed", "mlp"),
    *_linear("layers.mlp.down", f"{_BERT_BLOCK}.output.dense", "embed mlp", "embed"),
    *_norm("layers.mlp_norm", f"{_BERT_BLOCK}.output.LayerNorm"),
    *_linear("head_transform.dense", f"{_BERT_HEAD}.transform.dense", "mlp embed", "mlp"),
    *_norm("head_transform.norm", f"{_BERT_HEAD}.transform.LayerNorm"),
    Row("head_bias.bias", f"{_BERT_HEAD}.bias", "vocab"),
    Row("output.table", f"{_BERT_HEAD}.decoder.weight", "vocab embed"),
)

_LLAMA_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tied_head",
}
_LLAMA_CONSTANTS = {"positions": "rope", "norm": "rmsnorm", "gated_mlp": True, "use_bias": False}
_LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_LLAMA_BUFFERS = r".*\.rotary_emb\.inv_freq"
_WINDOW = {"sliding_window": "sliding_window"}
_EXPERTS = {"num_experts_per_tok": "experts_per_token"}

LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    prefix="model.",
    rows=_LLAMA_ROWS,
    fields=_LLAMA_FIELDS,
    constants=_LLAMA_CONSTANTS,
    defaults=_LLAMA_DEFAULTS,
    computed={"attention_bias": (False,), "mlp_bias": (False,)},
    written={"attention_bias": False, "mlp_bias": False},
    codecs=(activation("hidden_act"), rope()),
    buffers=_LLAMA_BUFFERS,
    also=("LlamaModel",),
)
MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    prefix="model.",
    rows=_LLAMA_ROWS,
    fields=_LLAMA_FIELDS | _WINDOW,
    constants=_LLAMA_CONSTANTS,
    defaults=_LLAMA_DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096},
    codecs=(activation("hidden_act"), rope()),
    buffers=_LLAMA_BUFFERS,
    also=("MistralModel",),
)
QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    prefix="model.",
    rows=_LLAMA_ROWS,
    fields=_LLAMA_FIELDS,
    constants=_LLAMA_CONSTANTS | {"qkv_bias": True},
    defaults=_LLAMA_DEFAULTS,
    codecs=(activation("hidden_act"), rope(), WINDOW_BY_LAYER),
    buffers=_LLAMA_BUFFERS,
    also=("Qwen2Model",),
)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    prefix="model.",
    rows=_LLAMA_ROWS,
    fields=_LLAMA_FIELDS,
    constants=_LLAMA_CONSTANTS | {"qk_norm": True},
    defaults=_LLAMA_DEFAULTS | {"head_dim": 128},
    computed={"attention_bias": (False,)},
    written={"attention_bias": False},
    codecs=(activation("hidden_act"), rope(), WINDOW_BY_LAYER),
    buffers=_LLAMA_BUFFERS,
    also=("Qwen3Model",),
)
MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    prefix="model.",
    rows=_LLAMA_AROUND_MLP + _experts(f"{_LLAMA_BLOCK}.block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    fields=_LLAMA_FIELDS | _WINDOW | _EXPERTS | {"num_local_experts": "num_experts"},
    constants=_LLAMA_CONSTANTS | {"router_renormalize": True},
    defaults=_LLAMA_DEFAULTS
    | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "sliding_window": None}
    | {"num_experts_per_tok": 2, "num_local_experts": 8, "router_aux_loss_coef": 0.001},
    computed={"router_jitter_noise": (0.0,)},
    codecs=(activation("hidden_act"), rope(1e6), BALANCE_LOSS),
    other_names={"num_experts": "num_local_experts"},
    buffers=_LLAMA_BUFFERS,
    held=_held_experts(f"{_LLAMA_BLOCK}.mlp"),
)
QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    prefix="model.",
    rows=_LLAMA_AROUND_MLP
    + _experts(f"{_LLAMA_BLOCK}.mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    fields={key: name for key, name in _LLAMA_FIELDS.items() if key != "intermediate_size"}
    | _EXPERTS
    | {"moe_intermediate_size": "mlp_dim", "num_experts": "num_experts", "norm_topk_prob": "router_renormalize"},
    constants=_LLAMA_CONSTANTS | {"qk_norm": True},
    defaults=_LLAMA_DEFAULTS
    | {"num_key_value_heads": 4, "num_experts_per_tok": 8, "num_experts": 128, "moe_intermediate_size": 768}
    | {"norm_topk_prob": False, "router_aux_loss_coef": 0.001},
    computed={"attention_bias": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    written={"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    codecs=(activation("hidden_act"), rope(), WINDOW_SWITCH, BALANCE_LOSS),
    other_names={"num_local_experts": "num_experts"},
    buffers=_LLAMA_BUFFERS,
    held=_held_experts(f"{_LLAMA_BLOCK}.mlp"),
)
GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    prefix="transformer.",
    rows=_GPT2_ROWS,
    fields={
        "vocab_size": "vocab_size",
        "n_positions": "max_length",
        "n_embd": "embed_dim",
        "n_layer": "num_layers",
        "n_head": "num_heads",
        "n_inner": "mlp_dim",
        "layer_norm_epsilon": "norm_epsilon",
        "initializer_range": "init_std",
        "tie_word_embeddings": "tied_head",
    },
    constants={},
    defaults={"n_inner": None, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": True}
    | {"activation_function": "gelu_new", "vocab_size": 50257},
    computed={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    codecs=(activation("activation_function"),),
    other_names={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    buffers=r".*\.attn\.(bias|masked_bias)",
    also=("GPT2Model",),
)
BLOOM = Family(
    architecture="BloomForCausalLM",
    model_type="bloom",
    prefix="transformer.",
    rows=_BLOOM_ROWS,
    fields={
        "vocab_size": "vocab_size",
        "seq_length": "max_length",  # transformers does without: ALiBi has no longest text
        "hidden_size": "embed_dim",
        "n_layer": "num_layers",
        "n_head": "num_heads",
        "layer_norm_epsilon": "norm_epsilon",
        "initializer_range": "init_std",
        "tie_word_embeddings": "tied_head",
    },
    constants={"positions": "alibi", "embedding_norm": True},
    defaults={"seq_length": 2048, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": True},
    computed={"apply_residual_connection_post_layernorm": (False,)},
    other_names={"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    also=("BloomModel",),
)
BERT = Family(
    architecture="BertForMaskedLM",
    model_type="bert",
    prefix="bert.",
    rows=_BERT_ROWS,
    fields={
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_length",
        "hidden_size": "embed_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_dim",
        "type_vocab_size": "token_types",
        "layer_norm_eps": "norm_epsilon",
        "initializer_range": "init_std",
        "tie_word_embeddings": "tied_head",
    },
    constants={
        "causal": False,
        "norm_position": "post",
        "embedding_norm": True,
        "head_transform": True,
        "head_bias": True,
    },
    defaults={"type_vocab_size": 2, "layer_norm_eps": 1e-12, "initializer_range": 0.02, "tie_word_embeddings": True}
    | {"hidden_act": "gelu"},
    computed={"is_decoder": (False,), "add_cross_attention": (False,), "position_embedding_type": ("absolute",)},
    codecs=(activation("hidden_act"),),
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    buffers=r".*embeddings\.(position_ids|token_type_ids)",
    left_out=r"(bert\.)?pooler\..*|cls\.seq_relationship\..*",
    head=f"{_BERT_HEAD}.decoder.weight",
    head_bias=f"{_BERT_HEAD}.decoder.bias",
    also=("BertForPreTraining",),
)

# In the order in which a model that was trained here looks for the one that it is.
FAMILIES = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, BLOOM, BERT, MIXTRAL, QWEN3_MOE)
