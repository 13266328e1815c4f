"""A run as a model of EleutherAI's lm-evaluation-harness, under the name `jaxllm`.

The harness knows the models of its own list and those that are registered before it looks: importing this file does
that. `jaxllm lm_eval …` is `lm_eval …` with this import; in Python, `import jaxllm.interop.lm_eval` and then
`lm_eval.simple_evaluate(model="jaxllm", model_args="workdir=runs/x", tasks=…)`.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from jaxllm.errors import UserError
from jaxllm.generate.chat import PlainRoles
from jaxllm.generate.engine import Engine
from jaxllm.generate.likelihood import Scorer
from jaxllm.generate.run import Run, config_for_use, open_run
from jaxllm.generate.sampling import Sampling

logger = logging.getLogger(__name__)
AUTO_BATCH = 32  # rows at once where the harness leaves the number to the model
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("jaxllm")
class JaxllmLM(LM):
    """The model of a WORKDIR, on all devices that JAX sees. One process."""

    def __init__(
        self,
        workdir: str = "",
        run: Run | None = None,
        batch_size: int | str = AUTO_BATCH,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        **overrides: Any,
    ):
        """Opens the run in `workdir`.

        Args:
          run: one that is open already, instead.
          batch_size: rows at once, rounded up to what the mesh divides; "auto": 32, or max_batch_size where less.
          max_gen_toks: the longest answer, in tokens, where a task names none.
          device: the harness's, "cuda:0" unless told otherwise, means nothing here: JAX_PLATFORMS chooses.
          seed: of answers that are drawn.
          overrides: fields of the run's config: precision.compute=float32, mesh.model=2, …

        Raises:
          UserError: no run there, an unknown field, or a layout that does not fit the devices.
        """
        super().__init__()
        if run is None and not workdir:
            raise UserError("say which run: --model_args workdir=DIR, what `jaxllm train --workdir DIR` wrote.")
        if str(batch_size).startswith("auto"):
            batch_size = min(AUTO_BATCH, max_batch_size or AUTO_BATCH)
        self._run = run or _open(str(workdir), overrides)
        self._scorer, self._engine = Scorer(self._run, int(batch_size)), Engine(self._run)
        self.batch_size, self.max_gen_toks, self._seed = int(batch_size), max_gen_toks, seed
        self.max_length = self._engine.max_length

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        return {"model_num_parameters": self._run.spec.num_parameters, "model_step": self._run.step}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding writes it) of each continuation after its context."""
        pairs = [self._scorer.pair(*request.args) for request in requests]
        with tqdm(total=len(pairs), desc="loglikelihood", disable=disable_tqdm) as bar:
            results = [tuple(likelihood) for likelihood in self._scorer.likelihoods(pairs, bar.update)]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, in nats: every token predicted once, in windows of the model's context."""
        windows = [self._scorer.rolling(*request.args) for request in requests]
        pairs = [pair for of_text in windows for pair in of_text]
        with tqdm(total=len(pairs), desc="loglikelihood_rolling", disable=disable_tqdm) as bar:
            likelihoods = iter(self._scorer.likelihoods(pairs, bar.update))
        results = [sum(next(likelihoods).nats for _ in of_text) for of_text in windows]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop text, an end of text or the most tokens.

        Of a context that leaves no room for the answer the end is taken.
        """
        results: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # requests that ask for the same go together
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for numbers in groups.values():
                numbers.sort(key=lambda number: -len(requests[number].args[0]))  # rows of a batch alike in length
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    texts = self._generate([requests[number].args[0] for number in batch], requests[batch[0]].args[1])
                    for number, text in zip(batch, texts, strict=True):
                        results[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return results

    def _generate(self, contexts: Sequence[str], asked: Mapping[str, Any]) -> list[str]:
        settings = dict(normalize_gen_kwargs(dict(asked), self.max_gen_toks))
        stop, most, _ = settings.pop("until"), settings.pop("max_gen_toks"), settings.pop("do_sample")
        sampling = Sampling(
            **{"temperature": 0.0} | {name: settings.pop(name) for name in SAMPLING if settings.get(name) is not None}
        )
        if settings:
            logger.warning("jaxllm does not know the generation settings %s; they change nothing.", settings)
        room = self.max_length - most if most < self.max_length else self.max_length // 2
        tokenizer = self._run.tokenizer
        special = self._scorer.special
        begin = [] if special or tokenizer.bos_id is None else [tokenizer.bos_id]
        prompts = [[*begin, *tokenizer.encode(context, special=special)][-room:] for context in contexts]
        done = self._engine.generate(prompts, most, sampling, stop=stop, seed=self._seed)
        self._seed += 1  # a question that comes again, in another batch, may be answered in another way
        return [completion.text for completion in done]

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests: another tokenizer has another name."""
        return f"jaxllm-{self._run.tokenizer.fingerprint}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The format of conversations, to be written beside the results."""
        return self.apply_chat_template([{"role": role, "content": "…"} for role in ("system", "user")])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text, by the tokenizer's template or in the roles of `jaxllm chat`, open at its end."""
        template = self._run.tokenizer.chat_template
        if template is not None:
            self._scorer.special = True  # of all that is asked from here on: the harness puts all or none in a template
            return template.render(chat_history, add_generation_prompt=add_generation_prompt).text
        roles = PlainRoles()
        names = {"system": "", "user": f"{roles.user}: ", "assistant": f"{roles.assistant}: "}
        said = [names.get(turn["role"], f"{turn['role']}: ") + turn["content"] for turn in chat_history]
        text = "\n".join(said)
        return f"{text}\n{roles.assistant}:" if add_generation_prompt else text


def _open(workdir: str, overrides: Mapping[str, Any]) -> Run:
    """The run in `workdir` with {"group.field": value} laid over its config."""
    overrides = {name.removeprefix("config."): value for name, value in overrides.items()}

    def change(config: dict[str, Any]) -> dict[str, Any]:
        for name, value in overrides.items():
            group, _, field = name.rpartition(".")
            if not isinstance(config.get(group), dict):
                raise UserError(f"--model_args {name}={value}: fields of the config are written GROUP.FIELD=VALUE.")
            config[group][field] = value
        return config

    return open_run(workdir, config_for_use(workdir, change, any(name.startswith("mesh.") for name in overrides)))
