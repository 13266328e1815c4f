"""A bitwise hash of a tree of arrays, computed on the devices, equal under every sharding and device count."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


def tree_hash(tree: Any) -> str:
    """The hash of all leaves of `tree`: 16 hexadecimal digits.

    It depends on the path, shape, position and bits of every element, and on nothing else: each element's bits are
    mixed with its position and the mixed words are summed modulo 2^32, a sum that has one value in any order. Two
    different mixes give 64 bits. It waits for the arrays; only 8 bytes leave the devices.
    """
    words = [int(word) for word in _hash_words(tree)]
    return f"{words[0]:08x}{words[1]:08x}"


@jax.jit
def _hash_words(tree: Any) -> UInt32[Array, "2"]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return sum((_hash_leaf(jax.tree_util.keystr(path), leaf) for path, leaf in leaves), jnp.zeros(2, jnp.uint32))


def _hash_leaf(path: str, leaf: jax.Array) -> UInt32[Array, "2"]:
    salt = zlib.crc32(f"{path} {leaf.shape} {leaf.dtype}".encode())
    word = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = (leaf.astype(word) if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, word)).astype(jnp.uint32)
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    first = _mix(bits ^ _mix(position + jnp.uint32(salt)))
    second = _mix(bits * jnp.uint32(0x9E3779B1) + _mix(position ^ jnp.uint32(~salt & 0xFFFFFFFF)))
    return jnp.stack([first.sum(dtype=jnp.uint32), second.sum(dtype=jnp.uint32)])


def _mix(word: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The 32-bit finalizer of MurmurHash3 (Appleby): each input bit flips about half of the output bits."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
