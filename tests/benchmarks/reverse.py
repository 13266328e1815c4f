"""A small model learns by fine-tuning on conversations to answer with the letters of the question in reverse.

    python -m tests.benchmarks.reverse --letters 6 --steps 200 --workdir runs/reverse

Prints the loss of held-out answers and the part of them that greedy generation, by the chat template and with the run's
own tokenizer, gets right to the letter. Both start at what chance gives: the questions are random.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxllm.generate.engine import Engine
from jaxllm.generate.run import open_run
from jaxllm.generate.sampling import Sampling
from jaxllm.train import loop
from jaxllm.train.config import base_config, read_config
from jaxllm.train.metrics import read_metrics

ALPHABET = "abcdefghij"
# Short, so that most tokens are letters.
TEMPLATE = """{{- bos_token }}{%- for message in messages %}{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
{%- else %}{{- message.content + '>' }}{%- endif %}{%- endfor %}"""


Pairs = Sequence[tuple[str, str]]


class Task(NamedTuple):
    """Files of training and held-out examples, none of which is in both, and the chat template."""

    train: Path
    held_out: Path
    template: Path


def write_task(folder: Path, letters: int, examples: int, held_out: int = 200) -> Task:
    """Questions of so many letters, spaces between them so that a letter is a token."""
    draw, seen = random.Random(0), set()
    while len(seen) < examples + held_out:
        seen.add(tuple(draw.choices(ALPHABET, k=letters)))
    questions = sorted(seen)
    draw.shuffle(questions)
    pairs = [(" ".join(question), " ".join(reversed(question))) for question in questions]
    return write_examples(folder, pairs[held_out:], pairs[:held_out], TEMPLATE)


def write_examples(folder: Path, train: Pairs, held_out: Pairs, template: str) -> Task:
    """Pairs of question and answer as conversations."""
    folder.mkdir(parents=True, exist_ok=True)
    task = Task(*(folder / name for name in ("train.jsonl", "held_out.jsonl", "t.jinja")))
    task.template.write_text(template, encoding="utf-8")
    for path, pairs in ((task.train, train), (task.held_out, held_out)):
        records = [{"messages": _talk(*pair)} for pair in pairs]
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return task


def _talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def reverse_config(task: Task, cache: Path, steps: int):
    """A Llama of two layers on packed rows."""
    config = base_config()
    config.train_step = "sft"
    config.model.update(num_layers=2, embed_dim=96, num_heads=4, mlp_dim=256, max_length=128, positions="rope")
    config.model.update(norm="rmsnorm", activation="silu", gated_mlp=True, use_bias=False)
    config.data.update(source="jsonl", path=str(task.train), held_out=f"file:{task.held_out}", cache=str(cache))
    config.data.update(tokenizer="bpe:281", chat_template=str(task.template), packing="best_fit", batch_size=16)
    config.optimizer.update(name="muon", learning_rate=2e-2, warmup_steps=10, final_fraction=0.0)
    config.precision.update(compute="float32")
    config.layout.update(scan_layers=False)
    config.train.update(steps=steps, log_every=50, eval_every=0, checkpoint_every=0)
    return read_config(config)


def exact_match(workdir: Path, held_out: Path) -> float:
    """The part of the held-out questions whose greedy answer is right."""
    run = open_run(workdir)
    engine, template = Engine(run), run.tokenizer.chat_template
    talks = [json.loads(line)["messages"] for line in held_out.read_text(encoding="utf-8").splitlines()]
    prompts = [template.render(talk[:1], add_generation_prompt=True).text for talk in talks]
    made = engine.generate(prompts, 32, Sampling(temperature=0.0), special=True)
    return sum(one.text == talk[1]["content"] for one, talk in zip(made, talks, strict=True)) / len(talks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--letters", type=int, default=6)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workdir", type=Path, default=Path("runs/reverse"))
    arguments = parser.parse_args()
    task = write_task(arguments.workdir / "task", arguments.letters, arguments.examples)
    start = time.monotonic()
    loop.train(reverse_config(task, arguments.workdir / "cache", arguments.steps), arguments.workdir / "run")
    minutes = (time.monotonic() - start) / 60
    (*_, last) = read_metrics(arguments.workdir / "run" / "metrics.jsonl")
    right = exact_match(arguments.workdir / "run", task.held_out)
    what = f"{arguments.letters} letters, {arguments.steps} steps, {minutes:.1f} minutes"
    print(f"{what}: {last['eval_loss']:.4f} nats a token, {right:.1%} of 200 held-out answers exact")


if __name__ == "__main__":
    main()
