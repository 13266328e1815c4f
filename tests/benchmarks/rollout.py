"""How fast rollouts are written: continuous batching beside transformers' `generate`, and beside static batches.

    python -m tests.benchmarks.rollout

A Llama of 97 million parameters with random weights, float32, the same in both libraries. 64 prompts of 8 to 64 tokens;
the answers' lengths are long-tailed, as those of people and of models that reason: exp of a normal around log 40 with
deviation 1, at most 384 tokens. Every answer has just so many: nothing ends one early. transformers samples all 64 in
one batch with its key-value cache and stops when the longest is done. What is counted are the tokens of answers.
Ours is compiled and warm before it is timed; the contestants take turns.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from jaxllm.generate.continuous import ContinuousDecoder
from jaxllm.interop.hf.load import load_params, open_directory
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout

SHAPE = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=16_000)
MODEL = SHAPE | dict(max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
MOST = 384


def requests(count: int) -> tuple[list[list[int]], list[int]]:
    """Prompts, and how many tokens each is answered with."""
    random = np.random.default_rng(0)
    prompts = [random.integers(3, SHAPE["vocab_size"], size).tolist() for size in random.integers(8, 65, count)]
    lengths = np.exp(random.normal(np.log(40), 1.0, count)).astype(int).clip(1, MOST)
    return prompts, lengths.tolist()


class Theirs:
    """transformers, all prompts in one batch padded on the left."""

    def __init__(self, model, prompts: list[list[int]], lengths: list[int]):
        width = max(map(len, prompts))
        padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        self._ids = torch.tensor(padded)
        self._mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        self._ends, self._model = torch.tensor(lengths) + width, model

    def __call__(self) -> None:
        stop = lambda ids, scores, **_: ids.shape[1] >= self._ends  # noqa: E731
        with torch.no_grad():
            self._model.generate(
                input_ids=self._ids,
                attention_mask=self._mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=MOST,
                stopping_criteria=transformers.StoppingCriteriaList([stop]),
                eos_token_id=None,
                pad_token_id=0,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    prompts, lengths = requests(options.prompts)
    torch.set_num_threads(2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        layout = make_layout(MeshConfig(data=1), LayoutConfig(zero_stage=0), devices=jax.devices()[:1])
        directory = open_directory(Path(folder))
        weights = load_params(directory, layout)
    print(f"{directory.spec.num_parameters:,} parameters, {sum(lengths):,} tokens, the longest answer {max(lengths)}")

    def ours(slots: int, static: bool):
        how = {"num_tokens": SHAPE["vocab_size"], "length": 512, "temperature": 1.0, "end_ids": ()}
        decoder = ContinuousDecoder(directory.spec, layout, slots=slots, static=static, **how)
        return lambda: decoder.generate(weights, prompts, max_new_tokens=lengths, seed=0)

    contestants = {
        "transformers generate, one batch": Theirs(model, prompts, lengths),
        f"continuous, {options.slots} slots": ours(options.slots, False),
        f"static, {options.slots} slots": ours(options.slots, True),
        f"static, {options.prompts} slots": ours(options.prompts, True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        if not isinstance(run, Theirs):  # which compiles nothing
            run()
    for _ in range(options.repeats):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
            print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    best = {name: sum(lengths) / min(times) for name, times in seconds.items()}
    theirs = best["transformers generate, one batch"]
    for name, rate in best.items():
        print(f"{name}: {rate:,.0f} tokens/s, {rate / theirs:.2f} x transformers")


if __name__ == "__main__":
    main()
