"""A conversation as one growing text, by the model's own chat template or in a plain role format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from jaxllm.data.chat_template import ChatTemplate
from jaxllm.errors import UserError
from jaxllm.generate.engine import Engine
from jaxllm.generate.sampling import Sampling


class Turn(NamedTuple):
    """What the user said and what the model answered."""

    user: str
    assistant: str


class Roles(Protocol):
    """How turns become text."""

    @property
    def user(self) -> str: ...  # how the user's turns are marked on the screen

    @property
    def assistant(self) -> str: ...

    @property
    def special(self) -> bool: ...  # whether names of special tokens in the text are those tokens, bos among them

    @property
    def stop(self) -> tuple[str, ...]: ...  # texts that end an answer

    def prompt(self, turns: Sequence[Turn], line: str) -> str: ...  # the text up to where the answer begins


@dataclass(frozen=True)
class PlainRoles:
    """User: …\\nAssistant: …\\n, for models that know no chat template of their own."""

    user: str = "User"
    assistant: str = "Assistant"
    system: str = ""
    special: ClassVar[bool] = False

    def prompt(self, turns: Sequence[Turn], line: str) -> str:
        """The text up to where the model's answer begins."""
        before = f"{self.system}\n" if self.system else ""
        said = "".join(f"{self.user}: {turn.user}\n{self.assistant}: {turn.assistant}\n" for turn in turns)
        return f"{before}{said}{self.user}: {line}\n{self.assistant}:"

    @property
    def stop(self) -> tuple[str, ...]:
        """The texts at which the model would speak for the user."""
        return (f"\n{self.user}:", f"\n{self.assistant}:")


@dataclass(frozen=True)
class TemplateRoles:
    """The roles of a chat template, which marks turns by special tokens; the names are those on the screen."""

    template: ChatTemplate
    user: str = "User"
    assistant: str = "Assistant"
    system: str = ""
    special: ClassVar[bool] = True
    stop: ClassVar[tuple[str, ...]] = ()  # the tokenizer knows which tokens end an answer

    def prompt(self, turns: Sequence[Turn], line: str) -> str:
        """The text up to where the model's answer begins.

        Raises:
          UserError: the template refuses the conversation: for some, one with a system message.
        """
        said = [part for turn in turns for part in (("user", turn.user), ("assistant", turn.assistant))]
        spoken = [*([("system", self.system)] if self.system else []), *said, ("user", line)]
        messages = [{"role": role, "content": content} for role, content in spoken]
        return self.template.render(messages, add_generation_prompt=True).text


class Chat:
    """A conversation with a model. The oldest turns are dropped when the context has no room for the answer."""

    def __init__(
        self,
        engine: Engine,
        roles: Roles,
        sampling: Sampling,
        max_new_tokens: int = 200,
        *,
        stop: Sequence[str] = (),
        seed: int = 0,
    ):
        self.roles, self.turns, self.forgotten = roles, [], 0
        # Of a short context an answer gets at most half, so that there is room for what is said.
        self._max_new_tokens = min(max_new_tokens, engine.max_length // 2)
        self._engine, self._sampling, self._stop = engine, sampling, tuple(stop)
        self._seed = seed

    def reset(self) -> None:
        """Forgets all turns."""
        self.turns, self.forgotten = [], 0

    def say(self, line: str, on_text: Callable[[str], None] | None = None) -> str:
        """The model's answer to `line`, which is kept with it as a turn.

        Raises:
          UserError: `line` alone leaves no room in the context for max_new_tokens, or for half the context if less.
        """
        prompt = self._fit(line)
        first = True

        def show(_: int, text: str) -> None:
            nonlocal first
            text = text.lstrip() if first else text
            first = first and not text
            if on_text and text:
                on_text(text)

        stop = (*self.roles.stop, *self._stop)
        (completion,) = self._engine.generate(
            [prompt],
            self._max_new_tokens,
            self._sampling,
            special=self.roles.special,
            stop=stop,
            seed=self._seed,
            on_text=show,
        )
        self._seed += 1  # the same line said twice may be answered in two ways
        answer = completion.text.strip()
        self.turns.append(Turn(line, answer))
        return answer

    def _fit(self, line: str) -> str:
        """The prompt, after as many of the oldest turns are dropped as it takes to leave room for the answer."""
        room = self._engine.max_length - self._max_new_tokens
        while True:
            prompt = self.roles.prompt(self.turns, line)
            length = self._engine.count_tokens(prompt, special=self.roles.special)
            if length <= room:
                return prompt
            if not self.turns:
                raise UserError(
                    f"with {length} tokens this leaves no room for an answer of {self._max_new_tokens} in the model's "
                    f"context of {self._engine.max_length}. Say less, or lower --max_new_tokens."
                )
            self.turns.pop(0)
            self.forgotten += 1
