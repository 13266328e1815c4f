"""Alignment, for real: small models whose reward rises, with controls.

    python -m tests.benchmarks.alignment ppo reward dpo grpo control --workdir runs/alignment

- ppo: a model that answers with eight random letters is rewarded for the good ones among them.
- reward: a reward model learns that rule from pairs of random answers; PPO against it raises the rule's own reward.
- dpo: the same pairs without a reward model; the part of its answers that beat those of the model it started from.
- grpo: a model that sometimes reverses six letters is rewarded for exact answers only.
- control: the same with the toss of a coin for a reward.

Prints what was measured before and after, on held-out prompts, and the minutes it took.
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.generate.engine import Engine
from jaxllm.generate.run import open_run
from jaxllm.generate.sampling import Sampling
from jaxllm.rollout.source import RolloutSource
from jaxllm.train import loop
from jaxllm.train.config import base_config, read_config
from jaxllm.train.metrics import read_metrics
from tests.benchmarks.letters_rewards import LENGTH, good_letters
from tests.benchmarks.reverse import ALPHABET, TEMPLATE, write_examples, write_task

REWARDS = Path(__file__).with_name("letters_rewards.py")
MODEL = dict(num_layers=2, embed_dim=64, num_heads=4, mlp_dim=192, max_length=32, positions="rope", norm="rmsnorm")
MODEL |= dict(activation="silu", gated_mlp=True, use_bias=False)


class Letters(NamedTuple):
    """A model that answers with eight random letters, and files about it."""

    base: Path
    prompts: Path
    pairs: Path


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def config_of(workdir: Path, step: str, path: Path, steps: int, learning_rate: float):
    """One small model, one optimizer, short rows."""
    config = base_config()
    config.train_step = step
    config.model.update(**MODEL)
    config.data.update(source="jsonl", path=str(path), cache=str(workdir / "cache"), held_out="0.1", batch_size=32)
    config.data.update(packing="best_fit")
    config.optimizer.update(learning_rate=learning_rate, warmup_steps=10, weight_decay=0.0, final_fraction=0.1)
    config.precision.update(compute="float32")
    config.layout.update(scan_layers=False)
    config.train.update(steps=steps, log_every=10, eval_every=0, checkpoint_every=0)
    return config


def train(config, workdir: Path) -> list[dict[str, Any]]:
    """The records of a run on one device; one that is there is not made again."""
    if not (workdir / "metrics.jsonl").exists():
        draws = config.train_step in ("ppo", "grpo")
        how = {"open_source": RolloutSource} if draws else {}
        loop.train(read_config(config), workdir, devices=jax.devices()[:1], quiet=True, **how)
    return read_metrics(workdir / "metrics.jsonl")


def make_letters(workdir: Path, steps: int = 150, examples: int = 4_000) -> Letters:
    """The model, prompts for it, and pairs of random answers of which the chosen has more good letters."""
    draw = random.Random(0)
    letters = lambda count: " ".join(draw.choices(ALPHABET, k=count))  # noqa: E731
    talks = [(letters(4), letters(LENGTH)) for _ in range(examples)]
    task = write_examples(workdir / "task", talks[200:], talks[:200], TEMPLATE)
    prompts = write_lines(workdir / "prompts.jsonl", ({"prompt": asked(q)} for q, _ in talks))
    pairs = []
    while len(pairs) < examples:
        first, second = letters(LENGTH), letters(LENGTH)
        better, worse = sorted((first, second), key=lambda text: -good_letters([text])[0])
        if good_letters([better]) != good_letters([worse]):
            said = [[{"role": "assistant", "content": text}] for text in (better, worse)]
            pairs.append({"prompt": asked(letters(4)), "chosen": said[0], "rejected": said[1]})
    config = config_of(workdir, "sft", task.train, steps, 3e-3)
    config.data.update(tokenizer="bpe:281", chat_template=str(task.template), held_out=f"file:{task.held_out}")
    train(config, workdir / "base")
    return Letters(workdir / "base", prompts, write_lines(workdir / "pairs.jsonl", pairs))


def from_base(workdir: Path, base: Path, step: str, path: Path, steps: int, learning_rate: float):
    """A run that starts from `base`."""
    config = config_of(workdir, step, path, steps, learning_rate)
    config.data.update(tokenizer=str(base / "tokenizer"))
    config.train.update(init_from=str(base))
    return config


def with_rollouts(config, reward: str, prompts: int, samples: int = 1, max_new_tokens: int = 12):
    """Rewards by a function of letters_rewards.py."""
    config.data.update(length=24, held_out="0.05")
    config.rollout.update(prompts=prompts, samples=samples, max_new_tokens=max_new_tokens)
    config.rollout.update(rewards=f"{REWARDS}:{reward}" if reward else "", eval_prompts=200)
    return config


def ppo_config(letters: Letters, workdir: Path, reward: str = "good_letters", steps: int = 320):
    """Sixty-four answers a rollout, four epochs of two minibatches; the divergence is held at eight nats an answer."""
    config = with_rollouts(from_base(workdir, letters.base, "ppo", letters.prompts, steps, 1e-3), reward, 64)
    config.ppo.update(epochs=4, kl_weight=0.02, kl_target=8.0, kl_horizon=2_000.0, critic_learning_rate=3e-3)
    return config


def grpo_config(base: Path, prompts: Path, workdir: Path, reward: str, steps: int):
    """Thirty-two prompts, eight answers each, in two minibatches."""
    config = with_rollouts(from_base(workdir, base, "grpo", prompts, steps, 4e-4), reward, 32, samples=8)
    config.data.update(batch_size=128)
    return config


def answers(workdir: Path, questions: list[str], temperature: float = 1.0) -> list[str]:
    """What a run answers."""
    run = open_run(workdir)
    render = run.tokenizer.chat_template.render
    prompts = [render(asked(question), add_generation_prompt=True).text for question in questions]
    engine = Engine(run)
    return [made.text for made in engine.generate(prompts, 12, Sampling(temperature=temperature), special=True)]


def mean_reward(workdir: Path, count: int = 400) -> float:
    """The rule's reward of sampled answers to new prompts."""
    draw = random.Random(1)
    questions = [" ".join(draw.choices(ALPHABET, k=4)) for _ in range(count)]
    return float(np.mean(good_letters(answers(workdir, questions))))


def win_rate(workdir: Path, base: Path, count: int = 400) -> float:
    """How often a run's answer has more good letters than the base's; a tie is half a win."""
    draw = random.Random(2)
    questions = [" ".join(draw.choices(ALPHABET, k=4)) for _ in range(count)]
    ours, theirs = (np.array(good_letters(answers(run, questions))) for run in (workdir, base))
    return float(np.mean((ours > theirs) + 0.5 * (ours == theirs)))


def exact(workdir: Path, held_out: Path, temperature: float) -> float:
    """The part of held-out questions that a run answers exactly."""
    talks = [json.loads(line)["messages"] for line in held_out.read_text(encoding="utf-8").splitlines()]
    made = answers(workdir, [talk[0]["content"] for talk in talks], temperature)
    return float(np.mean([text.strip() == talk[1]["content"] for text, talk in zip(made, talks, strict=True)]))


def run_ppo(workdir: Path) -> str:
    letters = make_letters(workdir)
    records = train(ppo_config(letters, workdir), workdir / "ppo")
    told = [record for record in records if "kl" in record]
    return (
        f"PPO, rule: reward {mean_reward(letters.base):.3f} -> {mean_reward(workdir / 'ppo'):.3f} of 1; divergence at "
        f"most {max(r['kl'] for r in told):.2f} nats an answer (target 8), at the end {told[-1]['kl']:.2f}; explained "
        f"variance {records[-1]['critic_explained_variance']:.2f}"
    )


def run_reward(workdir: Path) -> str:
    letters = make_letters(workdir)
    config = from_base(workdir, letters.base, "reward", letters.pairs, 200, 1e-3)
    config.model.scalar_head = True
    ranked = train(config, workdir / "reward")[-1]["eval_accuracy"]
    config = ppo_config(letters, workdir, reward="")
    config.rollout.reward_model = str(workdir / "reward")
    config.ppo.critic_init_from = str(workdir / "reward")
    records = [r for r in train(config, workdir / "ppo_on_model") if "reward_model" in r]
    return (
        f"reward model: {ranked:.3f} of held-out pairs in order; PPO against it: its score "
        f"{records[0]['reward_model']:.2f} -> {records[-1]['reward_model']:.2f}, the rule's reward "
        f"{mean_reward(letters.base):.3f} -> {mean_reward(workdir / 'ppo_on_model'):.3f}"
    )


def run_dpo(workdir: Path) -> str:
    letters = make_letters(workdir)
    config = from_base(workdir, letters.base, "dpo", letters.pairs, 200, 3e-4)
    config.dpo.update(beta=0.3, nll_weight=0.5)  # without the latter both responses become improbable
    records = train(config, workdir / "dpo")
    return (
        f"DPO: loss {records[0]['loss']:.3f} -> {records[-1]['loss']:.3f}, held-out accuracy "
        f"{records[-1]['eval_reward_accuracy']:.3f}, win rate over its start (0.5 before) "
        f"{win_rate(workdir / 'dpo', letters.base):.3f}, reward {mean_reward(letters.base):.3f} -> "
        f"{mean_reward(workdir / 'dpo'):.3f}"
    )


def make_reversal(workdir: Path, steps: int, letters: int = 6, examples: int = 8_000) -> tuple[Path, Path, Path]:
    """A model that sometimes reverses letters, the prompts it learned from with their answers, held-out examples."""
    task = write_task(workdir / "reversal", letters, examples)
    config = config_of(workdir, "sft", task.train, steps, 3e-3)
    config.data.update(tokenizer="bpe:281", chat_template=str(task.template), held_out=f"file:{task.held_out}")
    config.model.update(embed_dim=96, mlp_dim=256)
    train(config, workdir / "sometimes")
    talks = (json.loads(line)["messages"] for line in task.train.read_text(encoding="utf-8").splitlines())
    records = ({"prompt": talk[:1], "answer": talk[1]["content"]} for talk in itertools.islice(talks, 2_000))
    return workdir / "sometimes", write_lines(workdir / "reversal_prompts.jsonl", records), task.held_out


def run_grpo(workdir: Path, reward: str = "is_exact", steps: int = 500, sft_steps: int = 220) -> str:
    base, prompts, held_out = make_reversal(workdir, sft_steps)
    config = grpo_config(base, prompts, workdir, reward, steps)
    config.model.update(embed_dim=96, mlp_dim=256)
    records = train(config, workdir / reward)
    told = [record for record in records if "equal_groups" in record]
    found = [[exact(run, held_out, t) for t in (1.0, 0.0)] for run in (base, workdir / reward)]
    return (
        f"GRPO, {reward}: held-out answers exact, sampled {found[0][0]:.3f} -> {found[1][0]:.3f}, greedy "
        f"{found[0][1]:.3f} -> {found[1][1]:.3f}; groups all alike {told[0]['equal_groups']:.2f} -> "
        f"{told[-1]['equal_groups']:.2f}"
    )


RUNS: dict[str, Callable[[Path], str]] = {
    "ppo": run_ppo,
    "reward": run_reward,
    "dpo": run_dpo,
    "grpo": run_grpo,
    "control": lambda workdir: run_grpo(workdir, reward="coin"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(RUNS), help=", ".join(RUNS))
    parser.add_argument("--workdir", type=Path, default=Path("runs/alignment"))
    options = parser.parse_args()
    for name in options.what:
        started = time.monotonic()
        said = RUNS[name](options.workdir)
        print(f"{said}; {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
