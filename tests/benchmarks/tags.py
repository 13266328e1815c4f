"""Adapters bring out what a base can do, and only some of them teach it more.

    python -m tests.benchmarks.tags --workdir runs/tags

A small Llama learns to copy, reverse and sort six letters, by a tag before them. Then the tag is left out, and an
adapter of each kind is trained for reversal beside the frozen base. The control: a base that can only copy. LoRA
teaches it to reverse; a prefix, which adds to what is attended and changes no attention, does not (Petrov et al. 2023).

Prints the part of 200 held-out answers that are exact, parameters, steps and seconds. A base that is there is not
trained again.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.model.spec import model_spec
from jaxllm.train import loop
from jaxllm.train.config import base_config, read_config
from tests.benchmarks.reverse import ALPHABET, TEMPLATE, Task, exact_match, write_examples

TASKS = {"C": lambda letters: letters, "R": lambda letters: letters[::-1], "S": sorted}
MODEL = dict(num_layers=3, embed_dim=96, num_heads=4, mlp_dim=256, max_length=64, positions="rope")
MODEL |= dict(norm="rmsnorm", activation="silu", gated_mlp=True, use_bias=False)


class Method(NamedTuple):
    """How an adapter is trained."""

    step: str
    adapter: dict[str, Any]
    learning_rate: float
    steps: int


METHODS = {
    "LoRA of query and value": Method("lora", {"rank": 4, "alpha": 8.0, "targets": "query,value"}, 1e-2, 150),
    "prefix": Method("prompt", {"kind": "prefix"}, 3e-2, 200),
    "projected prefix": Method("prompt", {"kind": "prefix", "prefix_projection": True}, 3e-3, 150),
    "prompt": Method("prompt", {"kind": "prompt"}, 5e-2, 300),
    "P-tuning, MLP": Method("prompt", {"kind": "p_tuning", "encoder": "mlp"}, 2e-3, 400),
    "P-tuning, LSTM": Method("prompt", {"kind": "p_tuning", "encoder": "lstm"}, 1e-2, 400),
}
CONTROL = {
    "LoRA of all layers": Method("lora", {"rank": 8, "alpha": 16.0}, 1e-2, 600),
    "prefix": METHODS["prefix"]._replace(steps=600),
}


def write_task(folder: Path, tags: str, *, tagged: bool, letters: int, examples: int = 20_000, seed: int = 0) -> Task:
    """Questions of so many letters and the answers of the tasks `tags` in turn; none is in both parts."""
    draw, questions = random.Random(seed), set()
    while len(questions) < examples + 200:
        questions.add(tuple(draw.choices(ALPHABET, k=letters)))
    questions = sorted(questions)
    draw.shuffle(questions)
    pairs = []
    for number, question in enumerate(questions):
        tag = tags[number % len(tags)]
        pairs.append((" ".join([tag] * tagged + list(question)), " ".join(TASKS[tag](question))))
    return write_examples(folder, pairs[200:], pairs[:200], TEMPLATE)


def config(task: Task, folder: Path, steps: int, learning_rate: float):
    """Short rows of one example each, one optimizer for all."""
    config = base_config()
    config.train_step = "sft"
    config.model.update(**MODEL)
    config.data.update(source="jsonl", path=str(task.train), held_out=f"file:{task.held_out}", cache=str(folder))
    config.data.update(tokenizer="bpe:282", chat_template=str(task.template), packing="best_fit", batch_size=16)
    config.optimizer.update(learning_rate=learning_rate, warmup_steps=10, final_fraction=0.0, weight_decay=0.0)
    config.precision.update(compute="float32")
    config.layout.update(scan_layers=False)
    config.train.update(steps=steps, log_every=50, eval_every=0, checkpoint_every=0)
    return config


def train_base(workdir: Path, tags: str, steps: int, letters: int, tokenizer: str = "bpe:282") -> Path:
    """The run of a base that knows the tasks `tags`; one that is there is taken as it is."""
    task = write_task(workdir / f"task_{tags}", tags, tagged=True, letters=letters, examples=20_000 * len(tags))
    base = workdir / f"base_{tags}"
    made = config(task, workdir / "cache", steps, learning_rate=2e-2)
    made.optimizer.update(name="muon")
    made.data.update(tokenizer=tokenizer)
    if not base.exists():
        loop.train(read_config(made), base, quiet=True)
    print(
        f"the base of {tags}: {exact_match(base, task.held_out):.3f} of its own questions, with their tags", flush=True
    )
    return base


def train_adapter(base: Path, name: str, method: Method, letters: int) -> float:
    """Trains for reversal with the tag left out. Returns the part of the held-out answers that is exact."""
    task = write_task(base.parent / "hidden", "R", tagged=False, letters=letters, seed=1)
    made = config(task, base.parent / "cache", method.steps, method.learning_rate)
    made.train_step = method.step
    made.train.update(init_from=str(base))
    made.data.update(tokenizer=str(base / "tokenizer"), chat_template="")
    made.adapter.update({"kind": "lora"} | method.adapter)
    workdir = base / "adapters" / name.replace(" ", "_").replace(",", "")
    started = time.monotonic()
    loop.train(read_config(made), workdir, quiet=True)
    seconds = time.monotonic() - started
    before, right = exact_match(base, task.held_out), exact_match(workdir, task.held_out)
    spec = model_spec(read_config(made).model.resolved(282), read_config(made).adapter)
    print(
        f"{name} on {base.name}: {before:.3f} before, {right:.3f} after {method.steps} steps, {seconds:.0f} s; "
        f"{spec.num_trained_parameters:,} of {spec.num_parameters:,} parameters",
        flush=True,
    )
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--letters", type=int, default=6)
    parser.add_argument("--base_steps", type=int, default=600)
    parser.add_argument("--only", default="", help="methods by the beginning of their names, separated by commas")
    parser.add_argument("--fewer", type=int, default=1, help="divides the steps of the adapters")
    parser.add_argument("--no_control", action="store_true")
    parser.add_argument("--workdir", type=Path, default=Path("runs/tags"))
    options = parser.parse_args()
    chosen = lambda name: name.startswith(tuple(options.only.split(",")))  # noqa: E731
    fewer = lambda method: method._replace(steps=method.steps // options.fewer)  # noqa: E731
    base = train_base(options.workdir, "CRS", options.base_steps, options.letters)
    for name in filter(chosen, METHODS):
        train_adapter(base, name, fewer(METHODS[name]), options.letters)
    if options.no_control:
        return
    copies = train_base(options.workdir, "C", options.base_steps // 2, options.letters, str(base / "tokenizer"))
    for name in filter(chosen, CONTROL):
        train_adapter(copies, name, fewer(CONTROL[name]), options.letters)


if __name__ == "__main__":
    main()
