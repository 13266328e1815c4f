"""Duplicates among conversations: exact, near, and which belong together in a split.

Two conversations are near duplicates when the Jaccard similarity of their shingles, runs of three words of what user,
assistant and tools say (a Chinese character is a word), is at least a threshold. MinHash finds the pairs to look at,
banded so that one at the threshold is missed once in 10,000 times; each is then compared exactly.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from datasketch import MinHash, MinHashLSH

from jaxllm.data.instructions.shapes import Talk
from jaxllm.data.words import words

SHINGLE = 3  # words
PERMUTATIONS = 128
MISSED = 1e-4
TOGETHER = 0.8  # from this similarity on, both go to the same side of a split
Shingles = frozenset[str]


def exact_key(talk: Talk) -> bytes:
    """The same for conversations that differ in case and white space alone."""
    said = [(message["role"], _plain(message["content"]), message.get("tool_calls")) for message in talk.messages]
    return _digest([said, talk.tools])


def question_key(talk: Talk) -> bytes:
    """The same for conversations in which the user begins with the same words, but for case and white space."""
    return _digest(next((_plain(m["content"]) for m in talk.messages if m["role"] == "user"), None))


def shingles(text: str) -> Shingles:
    """The runs of three words in `text`; of a shorter one all its words, of one without words its characters."""
    found = words(text)
    if not found:
        return frozenset([_plain(text)])
    return frozenset(" ".join(found[i : i + SHINGLE]) for i in range(max(len(found) - SHINGLE + 1, 1)))


def jaccard(a: Shingles, b: Shingles) -> float:
    """|a ∩ b| / |a ∪ b|."""
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def similarity(a: Talk, b: Talk) -> float:
    """The Jaccard similarity of two conversations, exactly."""
    return jaccard(shingles(a.text), shingles(b.text))


def bands(threshold: float) -> tuple[int, int]:
    """(bands, rows) of MinHash values, as many rows as let a pair at `threshold` be missed once in 1 / MISSED times."""
    for rows in range(PERMUTATIONS, 1, -1):
        if (1 - threshold**rows) ** (PERMUTATIONS // rows) <= MISSED:
            return PERMUTATIONS // rows, rows
    return PERMUTATIONS, 1


class Groups(NamedTuple):
    """What is near what."""

    duplicate_of: dict[int, int]  # near duplicates, which are to be left out, and an earlier one that stays
    cluster: list[int]  # of each conversation, the first of those that belong together


def group(talks: Sequence[Talk], near: float) -> Groups:
    """Finds near duplicates among conversations without exact ones.

    Args:
      near: similarity from which the later of two is left out; 1: none is.

    Those that stay belong together, transitively, where they are as similar as TOGETHER or begin with one question.
    """
    together = min(near, TOGETHER)
    index = MinHashLSH(num_perm=PERMUTATIONS, params=bands(together))
    shingles_of = lru_cache(maxsize=1 << 14)(lambda number: shingles(talks[number].text))
    cluster, duplicate_of, first_asked = _Clusters(len(talks)), {}, {}
    minhashes = MinHash.generator((_encoded(talk) for talk in talks), num_perm=PERMUTATIONS)
    for number, minhash in enumerate(minhashes):
        linked = set()  # clusters
        for other in sorted(index.query(minhash)):
            if near == 1 and cluster.first(other) in linked:
                continue
            found = jaccard(shingles_of(number), shingles_of(other))
            if near <= found and near < 1:
                duplicate_of[number] = other
                break
            if found >= together:
                linked.add(cluster.first(other))
        if number in duplicate_of:
            continue
        for other in [*linked, first_asked.setdefault(question_key(talks[number]), number)]:
            cluster.join(number, other)
        index.insert(number, minhash, check_duplication=False)
    return Groups(duplicate_of, cluster.firsts())


class _Clusters:
    """Union-find; the least number of a cluster stands for it."""

    def __init__(self, count: int):
        self._parent = list(range(count))

    def first(self, number: int) -> int:
        while (parent := self._parent[number]) != number:
            self._parent[number] = number = self._parent[parent]
        return number

    def join(self, a: int, b: int) -> None:
        a, b = sorted((self.first(a), self.first(b)))
        self._parent[b] = a

    def firsts(self) -> list[int]:
        return [self.first(number) for number in range(len(self._parent))]


def _encoded(talk: Talk) -> list[bytes]:
    return [shingle.encode() for shingle in shingles(talk.text)]


def _plain(content: object) -> object:
    """A text without differences of case and white space."""
    return " ".join(content.casefold().split()) if isinstance(content, str) else content


def _digest(value: object) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).digest()
