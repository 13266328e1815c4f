"""What is held out, and how often each of the rest is taken.

Every order is that of a hash of seed and example, so it hangs neither on the order of the inputs nor on a random
generator's version.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction


def held_out_targets(counts: Sequence[int], fraction: float, total: int) -> list[int]:
    """How many examples of each input to hold out, for a set of `total` examples out of all `counts`; at least one."""
    targets = [round(fraction * count * total / sum(counts)) for count in counts]
    if fraction and not any(targets):
        targets[counts.index(max(counts))] = 1
    return targets


def hold_out(
    clusters: Sequence[int], inputs: Sequence[int], keys: Sequence[bytes], targets: Sequence[int], seed: int
) -> list[bool]:
    """Of each example, whether it is held out: whole clusters, in an order by the seed, as they fit into the targets.

    Args:
      clusters: of each example, the number of one of its cluster.
      inputs: of each example.
      keys: of each example, unlike the others'.
      targets: at most so many of each input.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for number, cluster in enumerate(clusters):
        members[cluster].append(number)
    room, chosen = list(targets), [False] * len(clusters)
    for cluster in sorted(members, key=lambda cluster: _rank(seed, "held out", keys[cluster])):
        wanted = Counter(inputs[number] for number in members[cluster])
        if all(count <= room[given] for given, count in wanted.items()):
            for number in members[cluster]:
                room[inputs[number]] -= 1
                chosen[number] = True
    return chosen


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in parts as the weights are to each other, rounded by largest remainder."""
    exact = [total * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def mix(by_input: Iterable[Sequence[int]], parts: Iterable[int], keys: Sequence[bytes], seed: int) -> list[int]:
    """The numbers of examples in the order to write them: as many of each input as its part says.

    What has fewer is repeated, each example as often as any other or once more; of what has more, some are dropped.

    Args:
      by_input: the numbers of the examples of each input, of at least one where its part is not 0.
      parts: how many of each to write.
      keys: of every example, by number.
    """
    copies = []
    for numbers, part in zip(by_input, parts, strict=True):
        ordered = sorted(numbers, key=lambda number: _rank(seed, "taken", keys[number]))
        copies += [(ordered[i % len(ordered)], i // len(ordered)) for i in range(part)]
    return [number for number, _ in sorted(copies, key=lambda copy: _rank(seed, str(copy[1]), keys[copy[0]]))]


def _rank(seed: int, what: str, key: bytes) -> bytes:
    return hashlib.blake2b(f"{seed} {what} ".encode() + key, digest_size=16).digest()
