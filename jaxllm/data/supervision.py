"""Which tokens of an example are learned: the completion, or what the assistant says, with what ends it.

Characters come first, tokens after. Of a conversation, the characters are those in the {% generation %} blocks of the
chat template; of a template without such blocks, for each turn of the assistant, what the template writes for the
messages up to it and not for those before it. **A token is learned when any of its characters is**, as in transformers'
`return_assistant_tokens_mask`: one that crosses the border of a prompt is learned whole. (With a tokenizer trained here
none does: prompt and answer are encoded apart, as they are when the model answers.) The first token of an example never
is learned: there is nothing to predict it from.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.data.chat_template import ChatTemplate
from jaxllm.data.examples import Conversation, Example, PlainText
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import UserError

Range = tuple[int, int]  # [start, end)


class EncodedExample(NamedTuple):
    """The tokens of an example, and which of them are learned."""

    tokens: list[int]
    supervised: list[Range]  # of tokens; in order, apart from each other, none empty
    text: str
    margin: float = 0.0  # of the first of a pair: by how much it is better

    @property
    def num_supervised(self) -> int:
        return sum(end - start for start, end in self.supervised)


class _Marked(NamedTuple):
    """The text of an example, and the characters to learn."""

    text: str
    ranges: list[Range]


class ExampleEncoder:
    """Examples to tokens, by one tokenizer and its chat template."""

    def __init__(self, tokenizer: Tokenizer, supervise: str = "completions", *, allow_silence: bool = False):
        """
        Args:
          supervise: "completions", or "all" for every token.
          allow_silence: whether all that the assistant says may be empty: only what ends it is then learned.
        """
        self.tokenizer, self._all, self._allow_silence = tokenizer, supervise == "all", allow_silence

    @property
    def identity(self) -> list[object]:
        """JSON-able: all that tokens and marks hang on beside the examples."""
        template = self.tokenizer.chat_template
        rendered = [template.source, template.variables] if template else []
        return [self.tokenizer.fingerprint, self._all, *rendered]

    def encode(
        self, examples: Sequence[Example], origins: Sequence[str], num_threads: int | None = None
    ) -> list[EncodedExample]:
        """The tokens of each example; `origins` say where they are from.

        A text gets bos and eos as a document of pretraining does, and its eos is learned; a conversation has what the
        template writes.

        Raises:
          UserError: no template, one that refuses the messages or does not show whose words are whose, or an example
            in which nothing is to be learned; with its origin.
        """
        marked = [self._mark(example, origin) for example, origin in zip(examples, origins, strict=True)]
        made: list[EncodedExample | None] = [None] * len(marked)
        for kind in (Conversation, PlainText):  # a text forges no special token; a template writes its own
            chosen = [i for i, example in enumerate(examples) if isinstance(example, kind)]
            texts, cuts = ([m.text for m in marked], [[start for start, _ in m.ranges] for m in marked])
            encoded = self.tokenizer.encode_with_extents(
                [texts[i] for i in chosen],
                [cuts[i] for i in chosen],
                special=kind is Conversation,
                num_threads=num_threads,
            )
            for i, (ids, starts, ends) in zip(chosen, encoded, strict=True):
                ranges = [
                    (int(np.searchsorted(ends, a, side="right")), int(np.searchsorted(starts, b, side="left")))
                    for a, b in marked[i].ranges
                ]
                if kind is PlainText:
                    ids, ranges = self._with_ends(ids, ranges)
                made[i] = self._finish(ids, ranges, marked[i].text, origins[i])
        return made  # type: ignore[return-value]

    def learns_to_stop(self) -> bool:
        """Whether a token that ends an answer is learned of what the chat template has the assistant say."""
        talk = Conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
        if self.tokenizer.chat_template is None:
            return True  # texts alone, whose eos is learned
        try:
            (encoded,) = self.encode([talk], ["the chat template"])
        except UserError:  # it is for conversations of another kind
            return True
        learned = {token for start, end in encoded.supervised for token in encoded.tokens[start:end]}
        return not learned.isdisjoint(self.tokenizer.end_ids)

    def _mark(self, example: Example, origin: str) -> _Marked:
        try:
            if isinstance(example, PlainText):
                text = example.prompt + example.completion
                return _Marked(text, [(len(example.prompt), len(text))])
            return self._render(example)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error

    def _render(self, talk: Conversation) -> _Marked:
        template = self.tokenizer.chat_template
        if template is None:
            raise UserError(
                "a conversation needs a chat template, and the tokenizer has none. Set config.data.chat_template to "
                "plain or zephyr (with any tokenizer), chatml or llama3 (with their special tokens) or FILE.jinja."
            )
        if not self._all:
            _refuse_silence(talk, self._allow_silence)
        variables = {"tools": talk.tools} if talk.tools else {}
        whole = template.render(talk.messages, add_generation_prompt=False, **variables)
        if self._all:
            return _Marked(whole.text, [(0, len(whole.text))])
        if not template.marks_answers:
            return _Marked(whole.text, _turns(template, talk, whole.text, tuple(self.tokenizer.specials), variables))
        learned_from = 0
        if any(message["role"] == "assistant" for message in talk.messages[: talk.num_context]):
            answers_next = talk.messages[talk.num_context]["role"] == "assistant"
            learned_from = _end_of(template, talk, talk.num_context, whole.text, answers_next, variables)
        return _Marked(whole.text, [(max(a, learned_from), b) for a, b in whole.generation if b > learned_from])

    def _with_ends(self, ids: list[int], ranges: list[Range]) -> tuple[list[int], list[Range]]:
        """With bos in front and eos, which is learned, behind."""
        bos, eos = ([i] if i is not None else [] for i in (self.tokenizer.bos_id, self.tokenizer.eos_id))
        tokens = [*bos, *ids, *eos]
        shifted = [(a + len(bos), b + len(bos)) for a, b in ranges]
        return tokens, [*shifted, (len(tokens) - len(eos), len(tokens))]

    def _finish(self, tokens: list[int], ranges: list[Range], text: str, origin: str) -> EncodedExample:
        joined: list[Range] = []
        for start, end in [(0, len(tokens))] if self._all else ranges:
            start = max(start, 1)
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            elif start < end:
                joined.append((start, end))
        if not joined:
            raise UserError(f"{origin}: no token of this example is to be learned.")
        return EncodedExample(tokens, joined, text)


def _refuse_silence(talk: Conversation, allow_empty: bool) -> None:
    answers = [message for message in talk.messages[talk.num_context :] if message["role"] == "assistant"]
    if not answers:
        raise UserError("no message of the assistant, so there is nothing to learn.")
    if not allow_empty and not any(message["content"] or message.get("tool_calls") for message in answers):
        raise UserError("every message of the assistant is empty, so there is nothing to learn.")


def _turns(
    template: ChatTemplate, talk: Conversation, text: str, specials: tuple[str, ...], variables: dict
) -> list[Range]:
    """The characters of the assistant's turns in `text`, found by rendering the conversation turn by turn.

    White space after the special token that ends a turn is the template's: the model stops before it.
    """
    ranges = []
    for i, message in enumerate(talk.messages):
        if message["role"] != "assistant" or i < talk.num_context:
            continue
        start = _end_of(template, talk, i, text, True, variables)
        end = _end_of(template, talk, i + 1, text, False, variables)
        shown = text[start:end].rstrip()
        ranges.append((start, start + len(shown) if shown.endswith(specials) else end))
    return ranges


def _end_of(
    template: ChatTemplate, talk: Conversation, count: int, text: str, generation_prompt: bool, variables: dict
) -> int:
    """How many characters of `text`, the whole conversation, the first `count` messages are.

    Raises:
      UserError: they are written otherwise when they stand alone.
    """
    before = template.render(talk.messages[:count], add_generation_prompt=generation_prompt, **variables).text
    if not text.startswith(before):
        at = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(text))
        raise UserError(
            f"the chat template writes the first {count} messages in one way alone ({before[at : at + 20]!r}) and in "
            f"another when more follow ({text[at : at + 20]!r}), so whose words are whose is not known. Put "
            "{% generation %} and {% endgeneration %} around the assistant's words in a copy of the template, and set "
            "config.data.chat_template to it."
        )
    return len(before)
