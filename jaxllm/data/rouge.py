"""ROUGE-L (Lin 2004) of texts in any script."""

from collections.abc import Sequence

from rapidfuzz.distance import Indel


def rouge_l(a: Sequence[str], b: Sequence[str], at_least: float = 0.0) -> float:
    """The F1 of the longest common subsequence of two texts in words, as `jaxllm.data.words.words` gives them.

    0 where it is under `at_least`, which is faster.
    """
    # With lcs / len(a) and lcs / len(b) for precision and recall, F1 is 2 lcs / (len(a) + len(b)): what Indel counts.
    return Indel.normalized_similarity(a, b, score_cutoff=at_least) if a and b else 0.0
