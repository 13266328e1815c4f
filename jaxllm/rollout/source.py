"""Batches of what the model itself writes: a `Source` of the training loop (train/source.py).

A rollout, and what is learned from it:

1. The next prompts of the set; the newest weights are brought to the rollout's layout.
2. Answers are drawn (generate/continuous.py).
3. The trainer's own model, its reference, its critic and the reward model say what they make of them (judge.py).
4. Rewards, of the functions and of the reward model; advantages (credit.py).
5. Minibatches of `config.data.batch_size` answers, all of them in each epoch in another order: a step each.

All that is held meanwhile is saved with a checkpoint, so that a run goes on in the middle of an epoch.
"""

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.data.batch import Batch
from jaxllm.data.prompts import Prompt, prepare_prompts
from jaxllm.errors import UserError
from jaxllm.generate.continuous import Answer
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import Layout, make_layout
from jaxllm.layout.mesh import one_at_a_time
from jaxllm.model.spec import ModelSpec
from jaxllm.rollout.credit import Credit, make_credit
from jaxllm.rollout.judge import Judged, make_judge
from jaxllm.rollout.reward_model import check_reward_model, open_reward_model
from jaxllm.rollout.rewards import parse_rewards
from jaxllm.rollout.rows import Rows, make_rows, on_devices
from jaxllm.rollout.samples import write_samples
from jaxllm.rollout.verdict import Verdict, judge_answers
from jaxllm.rollout.writer import Writer, Written
from jaxllm.steps import STEPS
from jaxllm.steps.experience import Experience
from jaxllm.train.config import Config
from jaxllm.train.learner import step_options
from jaxllm.train.source import Record, Setting
from jaxllm.train.state import TrainState


class Position(NamedTuple):
    """Where a run stands between two steps; JSON-able."""

    prompts: int = 0  # taken so far
    rollouts: int = 0  # made so far
    used: int = 0  # minibatches of the newest one that were taken
    kl_weight: float = 0.0  # of the newest one
    next_kl_weight: float = 0.0
    policy_kl: float = 0.0  # of the newest step
    identity: str = ""  # of the prompts
    minibatches: int = 0  # of a rollout


class RolloutSource:
    """See above."""

    def __init__(self, setting: Setting):
        """Raises a UserError for what is wrong with prompts, rewards and config."""
        config, self._say, self._workdir = setting.config, setting.say, setting.workdir
        self._alive = setting.alive
        self._config, self._group = config, getattr(config, config.train_step)
        self.length = config.data.length or config.model.max_length
        self._functions = parse_rewards(config.rollout.rewards)
        room = self.length - config.rollout.max_new_tokens
        self._prompts = prepare_prompts(setting.data, max_prompt_length=room)
        self.tokenizer, self.evaluates = self._prompts.tokenizer, bool(self._prompts.held_out)
        check_reward_model(config, self.tokenizer)
        self._at = Position(identity=self._prompts.identity, minibatches=self._minibatches)
        self._told: Record = {}
        self._experience: Experience | None = None

    @property
    def _answers(self) -> int:
        return self._config.rollout.prompts * self._config.rollout.samples

    @property
    def _minibatches(self) -> int:
        """Of one rollout, over all epochs."""
        return self._group.epochs * self._answers // self._config.data.batch_size

    def describe(self) -> list[str]:
        rollout, size = self._config.rollout, self._config.data.batch_size
        return [
            *self._prompts.describe(),
            f"a rollout: {rollout.prompts:,} prompts x {rollout.samples:,} answers of at most "
            f"{rollout.max_new_tokens:,} tokens; {self._group.epochs} epochs of {self._answers // size} minibatches: "
            f"{self._minibatches} steps",
        ]

    def epochs(self, steps: int) -> float:
        return steps / self._minibatches * self._config.rollout.prompts / len(self._prompts.train)

    def open(self, spec: ModelSpec, layout: Layout) -> None:
        config = self._config
        self._spec, self._layout = spec, layout
        self._step = STEPS[config.train_step]
        self._options = step_options(self._step, config, self.tokenizer.vocab_size)
        rollout = rollout_layout(config, layout)
        self._writer = Writer(config, spec, layout, rollout, self.tokenizer, self.length, self._alive)
        self._credit = make_credit(config, layout)
        pick = lambda tree, rows: jax.tree.map(lambda leaf: leaf[rows], tree)  # noqa: E731
        self._take = one_at_a_time(jax.jit(pick, out_shardings=layout.sharding("batch", None)))

    def begin(self, state: TrainState, stored: dict[str, Any] | None, arrays: dict[str, Any], base_hash: str) -> None:
        config, layout = self._config, self._layout
        self._reward_model = open_reward_model(config, layout, self.tokenizer, base_hash, self._say)
        a_time = config.data.batch_size // layout.num_microbatches
        how = (self._options, self._answers // a_time, self._reward_model.spec)
        self._judge = one_at_a_time(make_judge(self._step, self._spec, config, layout, *how))
        weight = getattr(self._group, "kl_weight", 0.0)
        self._at = self._at._replace(kl_weight=weight, next_kl_weight=weight, used=self._minibatches)
        if stored is not None:
            if stored["minibatches"] != self._minibatches:
                raise UserError(
                    f"The checkpoint was made with {stored['minibatches']} steps a rollout, and config.data.batch_size="
                    f"{config.data.batch_size} makes {self._minibatches} of it. Set it back, or start a new run."
                )
            if stored["identity"] != self._at.identity:
                raise UserError(
                    f"The checkpoint was made with other prompts than those of config.data.path={config.data.path}. "
                    "Set it back, or start a new run."
                )
            self._at, self._experience = Position(**stored), Experience(**arrays)

    def next(self, state: TrainState) -> Experience:
        if self._is_used_up():
            self._roll(state)
        order = self._order()
        self._at = self._at._replace(used=self._at.used + 1)
        return self._take(self._experience, order)

    def _is_used_up(self) -> bool:
        stop_kl = getattr(self._group, "stop_kl", 0.0)
        if stop_kl > 0 and 0 < self._at.used < self._minibatches and self._policy_kl() > stop_kl:
            self._told["stopped_early"] = 1.0
            return True
        return self._at.used >= self._minibatches

    def _policy_kl(self) -> float:
        """How far the newest step's policy was from the one that wrote; waits for that step."""
        self._at = self._at._replace(policy_kl=float(self._at.policy_kl))
        return self._at.policy_kl

    def _order(self) -> np.ndarray:
        """The rows of the next minibatch: of a permutation of all that belongs to the epoch."""
        size = self._config.data.batch_size
        epoch, minibatch = divmod(self._at.used, self._answers // size)
        key = [self._config.seed, (self._at.rollouts << 20) + epoch]
        random = np.random.RandomState(np.random.Philox(key=np.array(key, np.uint64)))
        return random.permutation(self._answers)[minibatch * size : (minibatch + 1) * size].astype(np.int32)

    def _roll(self, state: TrainState) -> None:
        """A rollout: answers, what they are worth, and what is to be learned from them."""
        started = time.perf_counter()
        rollout, position = self._config.rollout, self._at.prompts
        prompts = [self._prompts.at(position + i, self._config.seed) for i in range(rollout.prompts)]
        asked = [prompt for prompt in prompts for _ in range(rollout.samples)]
        written = self._writer.write(state, asked, seed=[self._config.seed, self._at.rollouts])
        rows = make_rows(asked, written.answers, self.length, self.tokenizer.pad_id or 0)
        batch, judged = self._judged(state, rows)
        scores = np.asarray(judged.scores)
        self._alive("rewarding answers")
        verdict = judge_answers(rollout, self._functions, asked, written, scores)
        sampled = on_devices(rows.sampled_log_probs, self._layout.sharding("batch", None))
        credit = self._credit(batch, judged, verdict.rewards, verdict.is_whole, sampled, self._at.next_kl_weight)
        self._experience = credit.experience
        self._at = self._at._replace(
            prompts=position + rollout.prompts,
            rollouts=self._at.rollouts + 1,
            used=0,
            kl_weight=self._at.next_kl_weight,
            next_kl_weight=float(credit.next_kl_weight),
        )
        self._tell(rows, written, verdict, credit, started)
        if rollout.samples_every and self._at.rollouts % rollout.samples_every == 0:
            write_samples(self._workdir, int(state.step) + 1, asked, written, verdict, rollout.samples_written)

    def _judged(self, state: TrainState, rows: Rows) -> tuple[Batch, Judged]:
        self._alive("judging answers")
        batch = on_devices(rows.batch, self._layout.sharding("batch", None))
        return batch, self._judge(state, self._reward_model.own, self._reward_model.frozen, batch)

    def _tell(self, rows: Rows, written: Written, verdict: Verdict, credit: Credit, started: float) -> None:
        tokens = int(rows.answer_lengths.sum())
        self._told |= {
            **verdict.record,
            **{name: float(value) for name, value in credit.metrics.items()},
            "kl_weight": self._at.kl_weight,
            "response_length": float(rows.answer_lengths.mean()),
            "ended": float(verdict.is_whole.mean()),
            "rollout": self._at.rollouts,
            "reshard_seconds": written.reshard_seconds,
            "rollout_tokens_per_second": tokens / written.seconds,
            "rollout_seconds": time.perf_counter() - started,
        }

    def stepped(self, metrics: dict[str, jax.Array]) -> None:
        if "policy_kl" in metrics:
            self._at = self._at._replace(policy_kl=metrics["policy_kl"])

    def told(self) -> Record:
        told, self._told = self._told, {}
        return told

    def state(self) -> dict[str, Any]:
        self._policy_kl()
        return self._at._asdict()

    def arrays(self) -> dict[str, Any]:
        assert self._experience is not None, "a checkpoint follows a step"
        return self._experience._asdict()

    def abstract_arrays(self) -> dict[str, Any]:
        sharding, shape = self._layout.sharding("batch", None), (self._answers, self.length)
        dtypes = {"tokens": np.int32, "positions": np.int32, "segment_ids": np.int32, "loss_mask": np.bool_}
        return {
            name: jax.ShapeDtypeStruct(shape, dtypes.get(name, np.float32), sharding=sharding)
            for name in Experience._fields
        }

    def evaluate(self, state: TrainState) -> Record:
        """eval_reward and the like of greedy answers to prompts that are held out."""
        asked = self._prompts.held_out[: self._config.rollout.eval_prompts or None]
        written = self._writer.write(state, asked, seed=[self._config.seed, 0], greedy=True)
        scores = self._scores(state, asked, written.answers)
        verdict = judge_answers(self._config.rollout, self._functions, asked, written, scores)
        lengths = [len(answer.tokens) for answer in written.answers]
        record = verdict.record | {"response_length": float(np.mean(lengths)), "ended": float(verdict.is_whole.mean())}
        return {f"eval_{name}": value for name, value in record.items()}

    def _scores(self, state: TrainState, asked: list[Prompt], answers: list[Answer]) -> np.ndarray:
        """Those of the reward model, a rollout's number of rows at a time."""
        scores = np.zeros(len(asked), np.float32)
        for start in range(0, len(asked) if self._reward_model.spec else 0, self._answers):
            part = range(start, min(start + self._answers, len(asked)))
            filled = [*part, *[start] * (self._answers - len(part))]
            rows = [[all_of[row] for row in filled] for all_of in (asked, answers)]
            judged = self._judged(state, make_rows(*rows, self.length, self.tokenizer.pad_id or 0))[1]
            scores[part.start : part.stop] = np.asarray(judged.scores)[: len(part)]
        return scores

    def close(self) -> None:
        pass


def rollout_layout(config: Config, layout: Layout) -> Layout:
    """The layout that answers are written under: the devices of training in the mesh `config.rollout.mesh`.

    Raises:
      UserError: a mesh that does not multiply to those devices.
    """
    mesh, devices = config.rollout.mesh, list(layout.mesh.devices.flat)
    model = mesh.model or layout.mesh.shape["model"]
    sizes = MeshConfig(replica=mesh.replica, data=mesh.data, expert=mesh.expert, model=model)
    group = LayoutConfig(zero_stage=0, attention=config.layout.attention, rules=config.layout.rules)
    try:
        return make_layout(sizes, group, devices=devices)
    except UserError as error:
        raise UserError(str(error).replace("config.mesh", "config.rollout.mesh")) from error
