"""A clean set of instructions out of files: filtered, without duplicates, split, mixed, and every step counted."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxllm.data.instructions import duplicates, mix
from jaxllm.data.instructions.filters import Rule
from jaxllm.data.instructions.inputs import Input, read_input
from jaxllm.data.instructions.shapes import Talk, read_talks
from jaxllm.errors import UserError

EXACT, NEAR = "exact_duplicate", "near_duplicate"
SHOWN = 3  # conversations of each kind that is left out


@dataclass
class Counts:
    """Of one input, or of all: conversations = removed + kept; kept = held_out + train - repeated + dropped."""

    path: str
    weight: float | None = None
    records: int = 0
    conversations: int = 0
    removed: Counter[str] = field(default_factory=Counter)  # by rule
    kept: int = 0
    held_out: int = 0
    train: int = 0
    repeated: int = 0  # of train, second and further copies
    dropped: int = 0  # for the weights' or max_examples' sake


NUMBERS = ("records", "conversations", "kept", "held_out", "train", "repeated", "dropped")


class Removed(NamedTuple):
    """A conversation that was left out."""

    talk: Talk
    duplicate_of: Talk | None = None
    similarity: float | None = None


class Built(NamedTuple):
    """The set, and what was done for it."""

    train: list[Talk]  # in the order to write them, copies of the same included
    held_out: list[Talk]
    counts: list[Counts]  # by input
    removed: dict[str, list[Removed]]  # a few by rule

    @property
    def total(self) -> Counts:
        """The counts of all inputs together."""
        total = Counts("all inputs")
        for counts in self.counts:
            total.removed.update(counts.removed)
            for name in NUMBERS:
                setattr(total, name, getattr(total, name) + getattr(counts, name))
        return total


def build(
    inputs: Sequence[Input],
    rules: Sequence[Rule],
    fields: Mapping[str, str],
    *,
    near: float = 0.8,
    held_out: float = 0.05,
    max_examples: int = 0,
    seed: int = 0,
) -> Built:
    """Builds a set of instructions.

    Args:
      inputs: read in their order; of duplicates the first stays.
      rules: a conversation goes by the first that removes it.
      fields: names of fields, as `jaxllm.data.examples.parse_fields` gives them.
      near: similarity from which the later of two is left out; 1: none but exact duplicates.
      held_out: fraction of each input's conversations to hold out; conversations that belong together stay so.
      max_examples: of both parts together; 0: all.
      seed: of the split, the order, and what is repeated or dropped.

    Raises:
      UserError: files that cannot be read, a record of no known shape (with its line), nothing left, an input with a
        weight of which nothing is left to train on, or nothing that could be held out.
    """
    pool = _Pool(inputs)
    for number, given in enumerate(inputs):
        pool.read(number, given, rules, fields)
    _refuse_empty(pool)
    clusters = pool.remove_near_duplicates(near)
    counts = [counts.kept for counts in pool.counts]
    total = min(max_examples or sum(counts), sum(counts))
    targets = mix.held_out_targets(counts, held_out, total)
    chosen = mix.hold_out(clusters, pool.inputs, pool.keys, targets, seed)
    _refuse_unsplit(sum(chosen), total, held_out)
    order = _mixed(pool, chosen, total - sum(chosen), seed)
    pool.count(chosen, order)
    held = [talk for talk, is_held_out in zip(pool.talks, chosen, strict=True) if is_held_out]
    return Built([pool.talks[i] for i in order], held, pool.counts, pool.removed)


class _Pool:
    """The conversations that are left, with the number of the input and the key of each, and the counts so far."""

    def __init__(self, inputs: Sequence[Input]):
        self.counts = [Counts(given.path, given.weight) for given in inputs]
        self.removed: dict[str, list[Removed]] = {}
        self.talks: list[Talk] = []
        self.inputs: list[int] = []
        self.keys: list[bytes] = []
        self._first: dict[bytes, Talk] = {}

    def read(self, number: int, given: Input, rules: Sequence[Rule], fields: Mapping[str, str]) -> None:
        for record in read_input(given):
            self.counts[number].records += 1
            for talk in read_talks(record, fields):
                self._take(number, talk, rules)

    def _take(self, number: int, talk: Talk, rules: Sequence[Rule]) -> None:
        self.counts[number].conversations += 1
        if rule := next((rule for rule in rules if rule.removes(talk)), None):
            return self._remove(number, rule.name, Removed(talk))
        key = duplicates.exact_key(talk)
        if (first := self._first.setdefault(key, talk)) is not talk:
            return self._remove(number, EXACT, Removed(talk, first, 1.0))
        self.talks.append(talk)
        self.inputs.append(number)
        self.keys.append(key)
        self.counts[number].kept += 1

    def remove_near_duplicates(self, near: float) -> list[int]:
        """Returns of each conversation that stays the first of those it belongs together with."""
        groups, talks = duplicates.group(self.talks, near), self.talks
        for i, other in groups.duplicate_of.items():
            self.counts[self.inputs[i]].kept -= 1
            similarity = duplicates.similarity(talks[i], talks[other])
            self._remove(self.inputs[i], NEAR, Removed(talks[i], talks[other], similarity))
        stay = [i for i in range(len(talks)) if i not in groups.duplicate_of]
        place = {i: new for new, i in enumerate(stay)}
        self.talks, self.inputs, self.keys = ([values[i] for i in stay] for values in (talks, self.inputs, self.keys))
        return [place[groups.cluster[i]] for i in stay]

    def _remove(self, number: int, rule: str, removed: Removed) -> None:
        self.counts[number].removed[rule] += 1
        shown = self.removed.setdefault(rule, [])
        if len(shown) < SHOWN:
            shown.append(removed)

    def count(self, chosen: Sequence[bool], order: Sequence[int]) -> None:
        """Counts what was held out, taken, repeated and dropped."""
        times = Counter(order)
        for i, number in enumerate(self.inputs):
            counts = self.counts[number]
            counts.held_out += chosen[i]
            counts.train += times[i]
            counts.repeated += max(times[i] - 1, 0)
            counts.dropped += not chosen[i] and not times[i]


def _mixed(pool: _Pool, chosen: Sequence[bool], total: int, seed: int) -> list[int]:
    """The numbers of `total` conversations that are not held out, by the weights of the inputs or else all alike."""
    by_input: list[list[int]] = [[] for _ in pool.counts]
    for i, number in enumerate(pool.inputs):
        if not chosen[i]:
            by_input[number].append(i)
    for counts, numbers in zip(pool.counts, by_input, strict=True):
        if counts.weight is not None and not numbers:
            raise UserError(
                f"{counts.path} has a weight, but of its {counts.conversations:,} conversations none is left to train "
                f"on: {_removals([counts])}."
            )
    weights = [len(n) if c.weight is None else c.weight for c, n in zip(pool.counts, by_input, strict=True)]
    return mix.mix(by_input, mix.shares(total, weights), pool.keys, seed)


def _refuse_empty(pool: _Pool) -> None:
    if not pool.talks:
        raise UserError(
            f"nothing is left of {sum(counts.conversations for counts in pool.counts):,} conversations: "
            f"{_removals(pool.counts)}. Change the bounds, or name a rule in --allow."
        )


def _refuse_unsplit(chosen: int, total: int, held_out: float) -> None:
    if chosen >= total or (held_out and not chosen):
        raise UserError(
            f"--held_out {held_out}: conversations that are near each other or begin with one question stay together, "
            f"and {total:,} cannot be split so. Give more of them, or --held_out 0."
        )


def _removals(counts: Sequence[Counts]) -> str:
    removed = sum((counts.removed for counts in counts), Counter())
    what = [f"{number:,} {rule}" for rule, number in removed.most_common()]
    kept = sum(counts.kept for counts in counts)
    return ", ".join([*what, *([f"{kept:,} held out"] if kept else [])])
