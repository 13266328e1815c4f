"""The trained model as it writes: its newest weights, brought to the layout of rollouts, and the decoder there."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.data.prompts import Prompt
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.generate.continuous import Answer, ContinuousDecoder
from jaxllm.generate.reshard import Resharding
from jaxllm.layout.layout import Layout, as_dtype
from jaxllm.model.spec import ModelSpec
from jaxllm.train.config import Config
from jaxllm.train.learner import model_of, weights_of
from jaxllm.train.state import TrainState


class Written(NamedTuple):
    """Answers, and how long they took."""

    answers: list[Answer]
    texts: list[str]
    seconds: float  # of writing alone
    reshard_seconds: float  # of bringing the weights there


class Writer:
    """Draws answers of the model in a train state."""

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        layout: Layout,
        rollout: Layout,
        tokenizer: Tokenizer,
        length: int,
        alive: Callable[[str], None],
    ):
        """`layout` is that of training, `rollout` that of writing; a prompt and its answer have `length` tokens.

        `alive` is told that work goes on, and which.
        """
        self._config, self._spec, self._layouts, self._tokenizer = config, spec, (layout, rollout), tokenizer
        self._length, self._alive = length, alive
        self._reshard: Resharding | None = None
        self._decoders: dict[tuple[int, float], ContinuousDecoder] = {}

    def _decoder(self, slots: int, temperature: float) -> ContinuousDecoder:
        if (slots, temperature) not in self._decoders:
            self._decoders[slots, temperature] = self._make_decoder(slots, temperature)
        return self._decoders[slots, temperature]

    def _make_decoder(self, slots: int, temperature: float) -> ContinuousDecoder:
        return ContinuousDecoder(
            model_of(self._spec),
            self._layouts[1],
            num_tokens=self._tokenizer.vocab_size,
            slots=slots,
            length=self._length,
            temperature=temperature,
            end_ids=self._tokenizer.end_ids,
        )

    def write(self, state: TrainState, prompts: Sequence[Prompt], seed: Sequence[int], greedy: bool = False) -> Written:
        """An answer to each prompt, drawn by random numbers that are a function of `seed` and the prompt's number."""
        started = time.perf_counter()
        self._alive("writing answers")
        rollout, compute = self._config.rollout, as_dtype(self._config.precision.compute)
        own = weights_of(state, self._spec, compute)
        if self._reshard is None:
            self._reshard = Resharding(own.axes, own.frozen.axes, *self._layouts, compute)
        weights = self._reshard(own.params, own.frozen.weights)
        jax.block_until_ready(weights)
        there = time.perf_counter()
        decoder = self._decoder(rollout.slots or len(prompts), 0.0 if greedy else rollout.temperature)
        number = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
        ids = [prompt.ids for prompt in prompts]
        on_tokens = functools.partial(self._alive, "writing answers")
        how = {"max_new_tokens": rollout.max_new_tokens, "seed": number, "on_tokens": on_tokens}
        answers = decoder.generate(weights, ids, **how)
        texts = [self.text(answer) for answer in answers]
        return Written(answers, texts, time.perf_counter() - there, there - started)

    def text(self, answer: Answer) -> str:
        """An answer without what ends it."""
        ended = answer.finish_reason == "stop"
        return self._tokenizer.decode(answer.tokens[:-1] if ended else answer.tokens)
