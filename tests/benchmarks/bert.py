"""A small BERT from scratch on WikiText against the unigram: the loss of held-out masked tokens.

    python -m tests.benchmarks.bert --path ../shared/data/wikitext2_valid.txt --workdir runs/bert

Trains configs/bert_wikitext.py with the jaxllm command, unless WORKDIR holds a finished run, and prints the table;
further flags (--config.GROUP.FIELD=VALUE) are those of jaxllm train. Both sides are asked for the same tokens at the
same places: those of the run's own evaluation. The unigram, the frequencies of the tokens in the training part, is
where a model stays that has learned nothing from the context.
"""

import argparse
import math
import time
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxllm.data.dataset import Dataset, prepare
from jaxllm.generate.run import read_run_config
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.steps import STEPS
from tests.benchmarks.sanguo import final_evaluation, machine, train

CONFIG = "bert_wikitext.py"
BATCH = 16  # rows read at once; any will do


def data_of(workdir: Path) -> Dataset:
    """What the run in `workdir` was trained and evaluated on."""
    config = read_run_config(workdir)
    length = config.data.length or config.model.max_length
    return prepare(config.data, length=length, kind=STEPS[config.train_step].batch, progress=False)


def held_out_targets(data: Dataset) -> Int[np.ndarray, " masked"]:
    """The tokens that an evaluation asks for."""
    layout = make_layout(MeshConfig(), LayoutConfig(), devices=jax.devices()[:1])
    batches = data.eval_batches(layout.sharding("batch", None), batch_size=BATCH)
    return np.concatenate([np.asarray(batch.targets)[np.asarray(batch.loss_mask)] for batch in batches])


def unigram(data: Dataset) -> Float[np.ndarray, " vocab"]:
    """log P of each token: its frequency in the training part, one added to each count."""
    counts = np.ones(data.tokenizer.vocab_size)
    for stream in data.train:
        counts += np.bincount(stream.read(0, stream.index.tokens), minlength=len(counts))
    return np.log(counts / counts.sum())


def unigram_loss(data: Dataset) -> float:
    """Cross-entropy, in nats, of the tokens that an evaluation asks for."""
    return -float(unigram(data)[held_out_targets(data)].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="wikitext2_valid.txt")
    parser.add_argument("--workdir", type=Path, default=Path("runs/bert"))
    arguments, flags = parser.parse_known_args()
    if not Path(arguments.path).is_file():
        parser.error(f"--path {arguments.path}: no such file")

    cost = "trained before"
    if final_evaluation(arguments.workdir) is None:
        minutes, cpu = train(CONFIG, arguments.path, arguments.workdir, *flags)
        cost = f"{minutes:.1f} minutes, {cpu:,.0f} CPU seconds"
    final = final_evaluation(arguments.workdir)
    assert final is not None, "the run ended without an evaluation at its last step"

    data = data_of(arguments.workdir)
    masked = len(held_out_targets(data))
    print(f"\n{data.train_tokens:,} tokens to learn from, {masked:,} held-out ones masked; {machine()}\n")
    print("| model | loss of the held-out masked tokens, nats | perplexity | training |\n| --- | --- | --- | --- |")
    start = time.monotonic()
    baseline = unigram_loss(data)
    print(f"| unigram | {baseline:.3f} | {math.exp(baseline):.0f} | {time.monotonic() - start:.0f} s with scoring |")
    loss = final["eval_loss"]
    print(f"| configs/{CONFIG}, {final['step']:,} steps | {loss:.3f} | {math.exp(loss):.0f} | {cost} |")


if __name__ == "__main__":
    main()
