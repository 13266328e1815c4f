"""A model is pretrained on text for a few minutes and then learns to answer: whole, and by LoRA.

    python -m tests.benchmarks.instruct --text a.txt,b.txt --instructions seed_tasks.jsonl,gsm8k_train.jsonl

Prints the held-out loss of the answers (nats a token) of the base and of both, with parameters trained and minutes. The
instructions are Alpaca's, Self-Instruct's or question and answer; every twentieth is held out. A base that is there is
not trained again.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

from jaxllm.model.spec import model_spec
from jaxllm.train import loop
from jaxllm.train.config import Config, base_config, read_config
from jaxllm.train.metrics import read_metrics

MODEL = dict(num_layers=4, embed_dim=192, num_heads=4, mlp_dim=512, max_length=256, positions="rope")
MODEL |= dict(norm="rmsnorm", activation="silu", gated_mlp=True, use_bias=False)


def examples(path: Path) -> Iterator[dict[str, str]]:
    """Prompts and completions."""
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "question" in record:
            yield {"prompt": record["question"], "completion": record["answer"]}
            continue
        for instance in record["instances"]:
            asked = f"{record['instruction']}\n{instance['input']}".strip()
            yield {"prompt": asked, "completion": instance["output"]}


def write_instructions(paths: list[Path], folder: Path) -> tuple[Path, Path]:
    """Files of training and of held-out examples, those without an answer left out."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [record for path in paths for record in examples(path) if record["completion"].strip()]
    parts = [r for i, r in enumerate(records) if i % 20], records[::20]
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    for file, part in zip(files, parts, strict=True):
        file.write_text("".join(json.dumps(record) + "\n" for record in part), encoding="utf-8")
    return files


def base(text: str, workdir: Path, steps: int, narrow: bool) -> Config:
    """Pretraining."""
    config = base_config()
    config.model.update(**MODEL | (dict(embed_dim=96, num_layers=2, mlp_dim=256) if narrow else {}))
    config.data.update(
        path=text, tokenizer="bpe:2048", chat_template="plain", batch_size=16, cache=str(workdir / "cache")
    )
    config.optimizer.update(name="muon", learning_rate=2e-2, warmup_steps=min(30, steps // 10), final_fraction=0.0)
    config.precision.update(compute="float32")
    config.layout.update(scan_layers=False)
    config.train.update(steps=steps, log_every=50, eval_every=0, checkpoint_every=0)
    return read_config(config)


def fine(made: Config, run: Path, files: tuple[Path, Path], steps: int, learning_rate: float) -> Config:
    """Fine-tuning of the base in `run`."""
    data = {"source": "jsonl", "path": str(files[0]), "held_out": f"file:{files[1]}", "packing": "best_fit"}
    data |= {"truncation": "drop", "tokenizer": str(run / "tokenizer"), "chat_template": ""}
    optimizer = {"name": "adamw", "learning_rate": learning_rate, "weight_decay": 0.0, "beta2": 0.999}
    return dataclasses.replace(
        made,
        train_step="sft",
        data=dataclasses.replace(made.data, **data),
        optimizer=dataclasses.replace(made.optimizer, **optimizer),
        train=dataclasses.replace(made.train, steps=steps, init_from=str(run)),
    )


def held_out_loss(workdir: Path) -> float:
    return read_metrics(workdir / "metrics.jsonl")[-1]["eval_loss"]


def run(what: str, config: Config, workdir: Path) -> float:
    """Trains, and says what came of it."""
    started = time.monotonic()
    if not workdir.exists():
        code = loop.train(config, workdir, quiet=True)
        assert code == 0, code
    minutes, loss = (time.monotonic() - started) / 60, held_out_loss(workdir)
    spec = model_spec(config.model.resolved(2048), config.adapter)
    part = spec.num_trained_parameters / spec.num_parameters
    trained = f"{spec.num_trained_parameters:,} parameters ({part:.2%})"
    print(f"{what}: {loss:.4f} nats a token, {trained}, {config.train.steps} steps, {minutes:.1f} minutes", flush=True)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="files to pretrain on, separated by commas")
    parser.add_argument("--instructions", required=True, help="jsonl files, separated by commas")
    parser.add_argument("--base_steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lora_steps", type=int, default=0, help="0: as many as the whole has")
    parser.add_argument("--rank", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the whole; LoRA takes --faster times it")
    parser.add_argument("--faster", type=float, default=10.0)
    parser.add_argument("--narrow", action="store_true", help="a model a quarter as large, for a test")
    parser.add_argument("--workdir", type=Path, default=Path("runs/instruct"))
    options = parser.parse_args()
    files = write_instructions([Path(p) for p in options.instructions.split(",")], options.workdir / "data")
    made, workdir = base(options.text, options.workdir, options.base_steps, options.narrow), options.workdir / "base"
    run("pretrained, of its own text", made, workdir)
    nothing = fine(made, workdir, files, 40, 1e-12)
    before = run("the base on answers", nothing, options.workdir / "before")
    whole = fine(made, workdir, files, options.steps, options.learning_rate)
    whole_loss = run("fine-tuned whole", whole, options.workdir / "sft")
    steps = options.lora_steps or options.steps
    narrow = fine(made, workdir, files, steps, options.faster * options.learning_rate)
    adapter = dataclasses.replace(narrow.adapter, kind="lora", rank=options.rank, alpha=2.0 * options.rank)
    narrow = dataclasses.replace(narrow, train_step="lora", adapter=adapter)
    loss = run("by LoRA", narrow, workdir / "adapters" / "lora")
    print(f"from {before:.4f}: whole {whole_loss:.4f}, LoRA {loss:.4f}, {loss / whole_loss - 1:+.1%} of the whole's")


if __name__ == "__main__":
    main()
