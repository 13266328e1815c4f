"""A bitwise hash of a tree of arrays, computed on the devices, equal under every sharding and device count."""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from jaxllm.layout.mesh import in_order


def tree_hash(tree: Any) -> str:
    """The hash of all leaves of `tree`: 16 hexadecimal digits.

    It depends on the path, shape, position and bits of every element, and on nothing else: each element's bits are
    mixed with its position and the mixed words are summed modulo 2^32, a sum that has one value in any order. Two
    different mixes give 64 bits. Elements that are 0 add nothing, nor does the length of the first axis count: empty
    layers after the last (layout/at_rest.py) change no hash. It waits for the arrays; only 8 bytes a leaf leave the
    devices.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    salts = [_salt(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    words = [in_order(_hasher(_everywhere(leaf))(leaf, salt)) for (_, leaf), salt in zip(leaves, salts, strict=True)]
    first, second = np.sum([np.asarray(pair, np.uint64) for pair in jax.device_get(words)], axis=0)
    first, second = ((int(word) + sum(map(int, salts))) & 0xFFFFFFFF for word in (first, second))
    return f"{first:08x}{second:08x}"


def _salt(path: str, leaf: jax.Array) -> np.uint32:
    return np.uint32(zlib.crc32(f"{path} {leaf.shape[1:]} {leaf.dtype}".encode()))


def _everywhere(leaf: jax.Array) -> NamedSharding | None:
    """Where the result goes, so that every process can read it."""
    sharding = leaf.sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


@functools.cache
def _hasher(result: NamedSharding | None) -> Callable[[jax.Array, np.uint32], UInt32[Array, "2"]]:
    """Compiles once a shape, not once a tree: a state has few shapes and many leaves."""
    return jax.jit(_hash_leaf, out_shardings=result)


def bits_and_positions(leaf: jax.Array) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Each element's bits, and its number in row-major order. Traceable."""
    word = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = (leaf.astype(word) if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, word)).astype(jnp.uint32)
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return bits, position


def _hash_leaf(leaf: jax.Array, salt: UInt32[Array, ""]) -> UInt32[Array, "2"]:
    bits, position = bits_and_positions(leaf)
    first = jnp.where(bits == 0, 0, _mix(bits ^ _mix(position + salt)))
    second = jnp.where(bits == 0, 0, _mix(bits * jnp.uint32(0x9E3779B1) + _mix(position ^ ~salt)))
    # One reduction of both: of two, XLA on CPUs stores each term, twice the bytes of the leaf.
    add = lambda sums, terms: (sums[0] + terms[0], sums[1] + terms[1])  # noqa: E731
    zeros = (jnp.uint32(0), jnp.uint32(0))
    return jnp.stack(jax.lax.reduce((first, second), zeros, add, tuple(range(leaf.ndim))))


def _mix(word: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The 32-bit finalizer of MurmurHash3 (Appleby): each input bit flips about half of the output bits."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
