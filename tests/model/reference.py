"""The transformer a second time: float64 NumPy with loops over rows and heads, written from the papers.

GPT-2: Radford et al. 2019 (pre-LayerNorm, learned positions, tied head), GELU of Hendrycks & Gimpel 2016.
Llama: Touvron et al. 2023 (RMSNorm, rotary embeddings of Su et al. 2021, SwiGLU of Shazeer 2020, no biases).
BERT: Devlin et al. 2019 and the code they released (post-LayerNorm, both directions, a transform before the head).
It shares no code with jaxllm: only the names of the parameter tree and the fields of the config.
"""

import math
from typing import Any

import numpy as np

Tree = dict[str, Any]


def hidden(params: Tree, config, tokens, positions, segments) -> np.ndarray:
    """[batch, length, embed]: the activations after the last norm, and after the transform of a head that has one."""
    rows = [_row(params, config, *row) for row in zip(tokens, positions, segments, strict=True)]
    return np.stack(rows)


def logits(params: Tree, config, activations: np.ndarray) -> np.ndarray:
    table = params["embedding"]["table"] if config.tied_head else params["output"]["table"]
    return activations @ table.T + (params["head_bias"]["bias"] if config.head_bias else 0)


def loss(params: Tree, config, tokens, positions, segments, counted) -> float:
    """Nats, summed over the counted tokens, each predicted at the position before it; with z-loss (PaLM, section 5)."""
    scores = logits(params, config, hidden(params, config, tokens, positions, segments))
    total = 0.0
    for row in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            if counted[row, t]:
                log_z = np.log(np.sum(np.exp(scores[row, t - 1])))
                total += log_z - scores[row, t - 1, tokens[row, t]] + config.z_loss * log_z**2
    return total


def masked_loss(params: Tree, config, tokens, targets, positions, segments, counted) -> float:
    """Nats, summed over the counted targets, each predicted where it stood."""
    scores = logits(params, config, hidden(params, config, tokens, positions, segments))
    places = zip(*np.nonzero(counted), strict=True)
    return sum(np.log(np.exp(scores[place]).sum()) - scores[place][targets[place]] for place in places)


def _row(params, config, tokens, positions, segments):
    x = params["embedding"]["table"][tokens]
    if config.positions == "learned":
        x = x + params["position_embedding"][positions]
    if config.token_types:
        x = x + params["type_embedding"][0]
    if config.embedding_norm:
        x = _norm(params["embedding_norm"], config, x)
    for number in range(config.num_layers):
        layer = _pick(params["layers"], number)
        if config.norm_position == "post":
            x = _norm(
                layer["attention_norm"], config, x + _attention(layer["attention"], config, x, positions, segments)
            )
            x = _norm(layer["mlp_norm"], config, x + _mlp(layer["mlp"], config, x))
            continue
        x = x + _attention(layer["attention"], config, _norm(layer["attention_norm"], config, x), positions, segments)
        x = x + _mlp(layer["mlp"], config, _norm(layer["mlp_norm"], config, x))
    if config.norm_position == "pre":
        x = _norm(params["final_norm"], config, x)
    if config.head_transform:
        x = ACTIVATIONS[config.activation](_linear(params["head_transform"]["dense"], x))
        x = _norm(params["head_transform"]["norm"], config, x)
    return x


def _pick(tree, number):
    return {k: _pick(v, number) for k, v in tree.items()} if isinstance(tree, dict) else tree[number]


def _norm(params, config, x):
    if config.norm == "rmsnorm":
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_epsilon) * params["scale"]
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + config.norm_epsilon) * params["scale"] + params["bias"]


def _linear(params, x):
    """[length, input] times a kernel [input, …]."""
    y = np.tensordot(x, params["kernel"], axes=1)
    return y + params["bias"] if "bias" in params else y


def _attention(params, config, x, positions, segments):
    query, key, value = (_linear(params[name], x) for name in ("query", "key", "value"))
    shared_by = config.num_heads // config.num_kv_heads
    total = np.zeros_like(x)
    for head in range(config.num_heads):
        q, k, v = query[:, head], key[:, head // shared_by], value[:, head // shared_by]
        if config.positions == "rope":
            q, k = _rotate(q, positions, config.rope_theta), _rotate(k, positions, config.rope_theta)
        for t in range(len(x)):
            ahead = t + 1 if config.causal else len(x)
            seen = [s for s in range(ahead) if segments[s] == segments[t]]
            scores = k[seen] @ q[t] / math.sqrt(config.head_dim)
            weights = np.exp(scores - scores.max())
            total[t] += (weights / weights.sum()) @ v[seen] @ params["out"]["kernel"][head]
    return total + params["out"]["bias"] if "bias" in params["out"] else total


def _rotate(x, positions, theta):
    """Pair (i, i + d/2) of the vector at position p as a complex number times exp(i p theta^(-2i/d))."""
    half = x.shape[1] // 2
    turn = np.exp(1j * np.outer(positions, theta ** (-np.arange(half) / half)))
    turned = (x[:, :half] + 1j * x[:, half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=1)


def _mlp(params, config, x):
    activate = ACTIVATIONS[config.activation]
    if config.gated_mlp:
        return _linear(params["down"], activate(_linear(params["gate"], x)) * _linear(params["up"], x))
    return _linear(params["down"], activate(_linear(params["up"], x)))


ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}
