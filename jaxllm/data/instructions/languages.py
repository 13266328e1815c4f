"""The language of a text, by py3langid, whose model comes with it."""

from collections.abc import Collection

from jaxllm.errors import UserError, did_you_mean

CERTAIN = 0.5  # probability from which a text counts as of another language; short texts and code stay below
VARIETIES = {"yue": "zh", "wuu": "zh", "pcm": "en", "nn": "no"}  # counted as the language after it, unless asked for


class Languages:
    """Tells texts of other languages than `codes`."""

    def __init__(self, codes: Collection[str]):
        """Raises a UserError for a code that is not known."""
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        known = set(map(str, self._identifier.labels))
        if unknown := next((code for code in codes if code not in known), None):
            raise UserError(f"--languages: '{unknown}' is no language that is known. {did_you_mean(unknown, known)}")
        self._codes = set(codes)

    def is_another(self, text: str) -> bool:
        """Whether the text is, most probably, in one other language."""
        probabilities: dict[str, float] = {}
        for code, probability in self._identifier.rank(text):
            code = str(code) if code in self._codes else VARIETIES.get(str(code), str(code))
            probabilities[code] = probabilities.get(code, 0.0) + float(probability)
        best = max(probabilities, key=probabilities.__getitem__)
        return best not in self._codes and best != "zxx" and probabilities[best] >= CERTAIN
