"""Text of one row as it is generated: bytes joined into characters, cut at a stop text, nothing shown too early."""

from collections.abc import Sequence

from jaxllm.data.tokenizer import Tokenizer


class RowText:
    """Takes the tokens of one row and says what text is certain.

    Text that may be the beginning of a stop text is held back until it is known not to be; a stop text itself, and
    whatever follows it, is never shown.
    """

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str] = ()):
        self._stream = tokenizer.stream()
        self._stops = [stop for stop in stop_texts if stop]
        self._pending = ""
        self.stopped = False
        self.text = ""  # all that was certain so far

    def push(self, token: int) -> str:
        """The text that is certain now; sets `stopped` when a stop text is complete."""
        return self._take(self._stream.push(token), final=False)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        return self._take(self._stream.flush(), final=True)

    def _take(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._pending += new
        found = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain = self._pending[: min(found)]
        else:
            certain = self._pending if final else self._pending[: len(self._pending) - self._held_back()]
        self._pending = self._pending[len(certain) :]
        self.text += certain
        return certain

    def _held_back(self) -> int:
        """Length of the longest end of the pending text that begins a stop text."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-size:]) for stop in self._stops):
                return size
        return 0
