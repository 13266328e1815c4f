"""Attention and its gradients a second time: a softmax written out in float64 NumPy."""

import numpy as np


def naive(query, key, value, d_output, segments, keep=None, rate=0.0, *, causal=True, window=0, slopes=None):
    """The output and the gradients of query, key and value, in float64; `keep` is [batch, heads, queries, keys].

    `slopes` are those of ALiBi, one a head.
    """
    query, key, value, d_output = (np.asarray(a, np.float64) for a in (query, key, value, d_output))
    d_query, d_key, d_value, output = (np.zeros_like(a) for a in (query, key, value, query))
    shared_by = query.shape[2] // key.shape[2]
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            k = h // shared_by
            visible = np.array(
                [[_sees(t, s, causal, window) for s in range(query.shape[1])] for t in range(query.shape[1])]
            )
            if segments is not None:
                visible &= segments[b][:, None] == segments[b][None]
            logits = query[b, :, h] @ key[b, :, k].T / np.sqrt(query.shape[3])
            if slopes is not None:
                places = np.arange(query.shape[1])
                logits = logits - slopes[h] * np.abs(places[:, None] - places[None])
            exps = np.where(visible, np.exp(logits), 0)
            weights = exps / exps.sum(-1, keepdims=True)
            kept = np.ones_like(weights) if keep is None else keep[b, h] / (1 - rate)
            output[b, :, h] = (weights * kept) @ value[b, :, k]
            d_value[b, :, k] += (weights * kept).T @ d_output[b, :, h]
            d_weights = kept * (d_output[b, :, h] @ value[b, :, k].T)
            d_logits = weights * (d_weights - np.sum(weights * d_weights, -1, keepdims=True)) / np.sqrt(query.shape[3])
            d_query[b, :, h] = d_logits @ key[b, :, k]
            d_key[b, :, k] += d_logits.T @ query[b, :, h]
    return output, d_query, d_key, d_value


def _sees(query: int, key: int, causal: bool, window: int) -> bool:
    if causal and key > query:
        return False
    return not window or abs(query - key) < window


def assert_close(actual, expected, tolerance=2e-6):
    for name, a, e in zip(("output", "d_query", "d_key", "d_value"), actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max(), err_msg=name)
