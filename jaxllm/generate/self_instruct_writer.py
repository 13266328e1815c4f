"""A run's model as the writer of Self-Instruct: batches of one size, by its chat template if it has one."""

from collections.abc import Sequence

from jaxllm.generate.chat import TemplateRoles
from jaxllm.generate.engine import Engine
from jaxllm.generate.sampling import Sampling
from jaxllm.generate.self_instruct import Prompt, Written


class EngineWriter:
    """Writes with an engine; see `jaxllm.generate.self_instruct.Writer`."""

    def __init__(
        self, engine: Engine, sampling: Sampling, max_new_tokens: int, batch_size: int, *, stop: Sequence[str] = ()
    ):
        """
        Args:
          sampling: of what is drawn.
          batch_size: prompts at once; fewer are filled up, so that the program is compiled once.
          stop: further texts that end what is written.
        """
        self._engine, self._sampling, self._batch_size, self._stop = engine, sampling, batch_size, tuple(stop)
        # Of a short context what is written gets at most half, so that there is room for a prompt.
        self._max_new_tokens = min(max_new_tokens, engine.max_length // 2)
        template = engine.tokenizer.chat_template
        self._roles = None if template is None else TemplateRoles(template)

    def fits(self, prompt: Prompt) -> bool:
        """Whether the prompt leaves room for max_new_tokens, or for half the context if less."""
        length = self._engine.count_tokens(self._text(prompt), special=self._roles is not None)
        return length + self._max_new_tokens <= self._engine.max_length

    def write(self, prompts: Sequence[Prompt], stop: str, seed: int | None) -> list[Written]:
        """What the model writes after each prompt, up to the text `stop`: drawn by `seed`, or the most probable."""
        sampling = Sampling(temperature=0) if seed is None else self._sampling
        texts, written = [self._text(prompt) for prompt in prompts], []
        for start in range(0, len(texts), self._batch_size):
            batch = texts[start : start + self._batch_size]
            completions = self._engine.generate(
                batch + [batch[-1]] * (self._batch_size - len(batch)),
                self._max_new_tokens,
                sampling,
                special=self._roles is not None,
                stop=(stop, *self._stop),
                seed=(seed or 0) + start,
            )
            written += [Written(done.text, done.finish_reason == "stop") for done in completions[: len(batch)]]
        return written

    def _text(self, prompt: Prompt) -> str:
        if self._roles is None:
            return f"{prompt.request}\n{prompt.begun}"
        return self._roles.prompt((), prompt.request) + prompt.begun
