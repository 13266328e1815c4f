"""Tokens a second of a whole training step on CPU, beside plain PyTorch, in turn, in one run.

    pip install torch==2.13.0          # only for this benchmark; without it jaxllm is timed alone
    python tests/benchmarks/cpu_step.py [--size nanogpt|llama] [--dtype float32|bfloat16] [--rounds 5] [--steps 8]

`nanogpt` is the Shakespeare size of nanoGPT: 6 layers, 384 wide, 6 heads, context 256, batch 12, 65 characters; the
other side is the same model in PyTorch with scaled_dot_product_attention, fused AdamW and gradient clipping. The size
`llama` is an 8.4M Llama (4 layers, 256 wide, 4 heads, mlp 1024, vocabulary 8192, length 256, batch 8), for which other
JAX trainers were measured. Dropout is 0 on both sides. Machines are noisy: the ratio of one run counts.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.batch import Batch
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.model.config import ModelConfig
from jaxllm.model.spec import model_spec
from jaxllm.steps import STEPS
from jaxllm.train.config import Config, OptimizerConfig, PrecisionConfig
from jaxllm.train.optimizer import make_optimizer, make_schedule
from jaxllm.train.state import init_state
from jaxllm.train.train_step import make_train_step

NANOGPT = ModelConfig(num_layers=6, embed_dim=384, num_heads=6, vocab_size=65, max_length=256).resolved()
LLAMA = ModelConfig(
    num_layers=4,
    embed_dim=256,
    num_heads=4,
    mlp_dim=1024,
    vocab_size=8192,
    max_length=256,
    positions="rope",
    norm="rmsnorm",
    activation="silu",
    gated_mlp=True,
    use_bias=False,
    tied_head=False,
).resolved()
SIZES = {"nanogpt": (NANOGPT, 12), "llama": (LLAMA, 8)}


def jaxllm_steps(model: ModelConfig, batch_size: int, dtype: str) -> Callable[[int], float]:
    """A function that trains for n steps and returns the last loss."""
    config = Config(model=model, precision=PrecisionConfig(compute=dtype), optimizer=OptimizerConfig(warmup_steps=10))
    spec = model_spec(model)
    layout = make_layout(MeshConfig(), LayoutConfig(zero_stage=0, scan_layers=False), devices=jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, 1000, spec.axes)
    schedule = make_schedule(config.optimizer, 1000)
    step = make_train_step(STEPS["pretrain"], spec, optimizer, schedule, config, layout)
    state = init_state(spec, optimizer, layout, 0)
    tokens = example_tokens(model, batch_size)
    shape = tokens.shape
    positions = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    batch = jax.device_put(Batch(tokens, positions, np.ones(shape, np.int32), positions > 0))

    def run(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, batch)
        return float(metrics["loss"])

    return run


def example_tokens(model: ModelConfig, batch_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.vocab_size, (batch_size, model.max_length)).astype(np.int32)


def torch_steps(model: ModelConfig, batch_size: int, dtype: str) -> Callable[[int], float]:
    """The same in plain PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    width, heads = model.embed_dim, model.num_heads

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            batch, length, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(model.vocab_size, width), nn.Embedding(model.max_length, width)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(model.num_layers)), nn.LayerNorm(width)

        def forward(self, tokens):
            x = self.tokens(tokens) + self.positions.weight
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.norm(x), self.tokens.weight)[:, :-1].float()
            return F.cross_entropy(logits.reshape(-1, model.vocab_size), tokens[:, 1:].reshape(-1))

    gpt = GPT()
    for weight in gpt.parameters():
        nn.init.normal_(weight, std=0.02) if weight.ndim > 1 else None
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.from_numpy(example_tokens(model, batch_size)).long()

    def run(steps: int) -> float:
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = gpt(tokens)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
            optimizer.step()
        return loss.item()

    return run


def compare(size: str, dtype: str, rounds: int, steps: int) -> None:
    model, batch_size = SIZES[size]
    runners = {"jaxllm": jaxllm_steps(model, batch_size, dtype)}
    if size == "nanogpt" and has_torch():
        runners["pytorch"] = torch_steps(model, batch_size, dtype)
    rates = {name: [] for name in runners}
    losses = {name: run(2) for name, run in runners.items()}  # compile, warm up
    for _ in range(rounds):
        for name, run in runners.items():
            start = time.perf_counter()
            losses[name] = run(steps)
            rates[name].append(steps * batch_size * model.max_length / (time.perf_counter() - start))
    for name, rate in rates.items():
        print(
            f"{size:8} {dtype:9} {name:8} {statistics.median(rate):8,.0f} tokens/s "
            f"(from {min(rate):,.0f} to {max(rate):,.0f}), loss {losses[name]:.3f}"
        )
    if "pytorch" in rates:
        pairs = [ours / theirs for ours, theirs in zip(rates["jaxllm"], rates["pytorch"], strict=True)]
        print(f"{size:8} {dtype:9} ratio    {statistics.median(pairs):.2f} (from {min(pairs):.2f} to {max(pairs):.2f})")


def matmul_rates() -> None:
    """What a plain matmul of the nanogpt size reaches on both sides: no step can be faster than its matmuls."""
    rows, inner, columns = 3072, 384, 1536
    a, b = np.ones((rows, inner), np.float32), np.ones((inner, columns), np.float32)
    x, y, multiply = jnp.asarray(a), jnp.asarray(b), jax.jit(jnp.matmul)
    runs = {"jax": lambda: multiply(x, y).block_until_ready()}
    if has_torch():
        import torch

        torch.set_num_threads(os.cpu_count())
        u, v = torch.from_numpy(a), torch.from_numpy(b)
        runs["pytorch"] = lambda: u @ v
    for name, run in runs.items():
        run()
        best = min(_seconds(run) for _ in range(20))
        print(f"matmul   float32   {name:8} {2e-9 * rows * inner * columns / best:8,.0f} GFLOP/s at best")


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def has_torch() -> bool:
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, nargs="*", default=list(SIZES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, {jnp.zeros(()).devices()}")
    matmul_rates()
    for size in args.size:
        for dtype in args.dtype if size == "nanogpt" else ["float32"]:
            compare(size, dtype, args.rounds, args.steps)
