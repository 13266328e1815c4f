"""Text in, text out: batches of prompts, stop texts, and text that streams as it is generated."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import UserError
from jaxllm.generate.decode import Decoder
from jaxllm.generate.run import Run, refuse_bidirectional
from jaxllm.generate.sampling import Sampling
from jaxllm.generate.stream import RowText

OnText = Callable[[int, str], None]


class Completion(NamedTuple):
    """What the model wrote after one prompt."""

    prompt: str
    text: str  # without the prompt, up to the stop text
    tokens: list[int]  # all that were generated, an end-of-text token included
    finish_reason: str  # "stop": an end-of-text token or a stop text | "length": max_new_tokens | "context": it is full


class Engine:
    """A trained model, ready to write: `Engine(open_run(workdir))`."""

    def __init__(self, run: Run):
        """Raises a UserError where the model sees what comes next, and so cannot say it."""
        refuse_bidirectional(run, "does not continue a text")
        self.tokenizer: Tokenizer = run.tokenizer
        self.max_length = run.spec.context
        self._decoder = Decoder(run.spec, run.weights, run.layout, run.tokenizer.vocab_size)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int = 200,
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008
        *,
        special: bool = False,
        stop: Sequence[str] = (),
        seed: int = 0,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """Continues every prompt.

        Args:
          prompts: texts, or token ids that are taken as they are.
          max_new_tokens: at most so many a row; fewer where the context is full before.
          sampling: of all rows, or one a row.
          special: the prompts are a chat template's: names of special tokens in them are those tokens, bos too.
          stop: texts that end a row; they are not part of its text.
          on_text: called with (row, new text) as soon as the text is certain.

        Raises:
          UserError: no prompt, a prompt that leaves no room in the model's context, or max_new_tokens below 1.
        """
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be 1 or more.")
        if not prompts:
            raise UserError("there is no prompt.")
        ids = [
            self.encode(prompt, special=special) if isinstance(prompt, str) else self._checked(list(prompt))
            for prompt in prompts
        ]
        budgets = [min(max_new_tokens, self.max_length - len(row)) for row in ids]
        rows = [_Row(RowText(self.tokenizer, stop), budget) for budget in budgets]
        settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        columns = self._decoder.generate(ids, settings, max(budgets), seed)
        for column in columns:
            for number, (row, token) in enumerate(zip(rows, column.tolist(), strict=True)):
                if not row.reason:
                    new = row.take(token, self.tokenizer.end_ids)
                    if on_text and new:
                        on_text(number, new)
            if all(row.reason for row in rows):
                break
        columns.close()
        full = ["context" if budget < max_new_tokens else "length" for budget in budgets]
        return [
            Completion(self._text(prompt), row.text.text, row.tokens, why if row.reason == "length" else row.reason)
            for prompt, row, why in zip(prompts, rows, full, strict=True)
        ]

    def encode(self, prompt: str, *, special: bool = False) -> list[int]:
        """The ids of a prompt, after bos where the tokenizer has one: as documents begin in training.

        With `special` the prompt is a chat template's, which writes bos and other special tokens by name itself.

        Raises:
          UserError: a prompt that fills the context, or an empty one where there is no bos.
        """
        return self._checked(self._ids(prompt, special))

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise UserError("the prompt is empty, and this tokenizer has no token to begin with. Write a prompt.")
        if len(ids) >= self.max_length:
            raise UserError(
                f"the prompt has {len(ids)} tokens, but the model's context is {self.max_length} and must hold the "
                f"answer too. Shorten the prompt to at most {self.max_length - 1} tokens."
            )
        return ids

    def count_tokens(self, prompt: str, *, special: bool = False) -> int:
        """How many tokens of the context `prompt` takes."""
        return len(self._ids(prompt, special))

    def _text(self, prompt: str | Sequence[int]) -> str:
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def _ids(self, prompt: str, special: bool) -> list[int]:
        ids, bos_id = self.tokenizer.encode(prompt, special=special), self.tokenizer.bos_id
        return ids if special or bos_id is None else [bos_id, *ids]


class _Row:
    """A row while it is written."""

    def __init__(self, text: RowText, budget: int):
        self.text, self.budget = text, budget
        self.tokens: list[int] = []
        self.reason = ""

    def take(self, token: int, end_ids: Collection[int]) -> str:
        """Adds a token; returns the text that is certain now, and sets `reason` when the row has ended."""
        self.tokens.append(token)
        if token in end_ids:
            self.reason = "stop"
            return self.text.finish()
        new = self.text.push(token)
        if self.text.stopped:
            self.reason = "stop"
        elif len(self.tokens) == self.budget:
            self.reason = "length"
            new += self.text.finish()
        return new
