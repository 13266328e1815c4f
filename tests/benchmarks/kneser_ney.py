"""The interpolated Kneser-Ney character n-gram: the baseline that a trained model has to beat."""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable


class KneserNey:
    """Kneser and Ney 1995, interpolated, one discount: Chen and Goodman 1999, equations 24 and 26 (there `D`).

        P(w | h) = max(c(h w) - D, 0) / c(h .) + D * N1+(h .) / c(h .) * P(w | h without its first character)

    c(h .) is the sum of c(h w) over w, N1+(h .) the number of w with c(h w) > 0. At the highest order c counts
    occurrences, below it the distinct characters found before `h w`. The unigram falls back on the uniform
    distribution over `vocabulary`, so that the probabilities of its characters sum to one after every context.
    """

    def __init__(self, text: str, order: int, vocabulary: Collection[str], discount: float = 0.75):
        self._order, self._discount = order, discount
        self._uniform = 1 / len(set(vocabulary) | set(text))
        # By length of context: {context: {character: c}}, and {context: c(h .)}.
        self._counts: list[dict[str, Counter[str]]] = [defaultdict(Counter) for _ in range(order)]
        for gram, count in Counter(_grams(text, order)).items():
            self._counts[order - 1][gram[:-1]][gram[-1]] = count
        for length in range(1, order):
            for gram in set(_grams(text, length + 1)):
                self._counts[length - 1][gram[1:-1]][gram[-1]] += 1
        self._totals = [{h: after.total() for h, after in counts.items()} for counts in self._counts]

    def probability(self, character: str, context: str) -> float:
        """P(character | context); of the context the last order - 1 characters count, and fewer are enough."""
        probability = self._uniform
        for length in range(min(len(context), self._order - 1) + 1):
            h = context[len(context) - length :]
            total = self._totals[length].get(h)
            if total is None:
                break  # a longer context has not been seen either
            after = self._counts[length][h]
            seen = max(after.get(character, 0) - self._discount, 0)
            probability = (seen + self._discount * len(after) * probability) / total
        return probability

    def bits_per_character(self, text: str) -> float:
        """The mean of -log2 P over the characters of `text`, the first of them after an empty context."""
        context = self._order - 1
        bits = (-math.log2(self.probability(c, text[max(i - context, 0) : i])) for i, c in enumerate(text))
        return math.fsum(bits) / len(text)


def _grams(text: str, order: int) -> Iterable[str]:
    return (text[i : i + order] for i in range(len(text) - order + 1))
