"""Step time, tokens a second, MFU and peak memory of a 1.3B Llama at length 4096 in bfloat16, on whatever GPU is here.

    python tests/benchmarks/gpu_step.py [--batch_size 8] [--microbatches 1] [--remat selective] [--packed] …

Synthetic tokens, and no data library: jax, flax, optax, orbax and ml_collections (and jaxtyping) are enough. With
`--packed` the rows hold several documents, which goes through the packed attention kernel. All devices share the batch
(`--zero_stage`). Figures are a median over the steps after the first three; MFU is given by two conventions.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from jaxllm.data.batch import Batch
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.model.attention_backends import choose_backend
from jaxllm.model.attention_check import check_backend
from jaxllm.model.config import ModelConfig
from jaxllm.model.presets import llama2_7b
from jaxllm.model.spec import ModelSpec, model_spec
from jaxllm.steps import STEPS
from jaxllm.train.config import Config, PrecisionConfig
from jaxllm.train.flops import flops_per_token, peak_flops
from jaxllm.train.optimizer import make_optimizer, make_schedule
from jaxllm.train.state import init_state
from jaxllm.train.train_step import make_train_step

DOCUMENTS = 4  # a row, with --packed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    numbers = {"layers": 24, "embed": 2048, "heads": 16, "mlp": 5504, "vocab": 32_000, "length": 4096}
    numbers |= {"batch_size": 8, "microbatches": 1, "zero_stage": 1, "model": 1, "steps": 13}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--remat", default="selective", choices=("none", "selective", "full"))
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--unroll", action="store_true", help="unroll the layers instead of looping over them")
    parser.add_argument("--packed", action="store_true", help=f"{DOCUMENTS} documents a row")
    return parser.parse_args()


def make_batch(args: argparse.Namespace) -> Batch:
    shape = (args.batch_size, args.length)
    tokens = np.random.default_rng(0).integers(0, args.vocab, shape).astype(np.int32)
    size = args.length // DOCUMENTS if args.packed else args.length
    column = np.broadcast_to(np.arange(args.length, dtype=np.int32), shape)
    return Batch(tokens, column % size, column // size + 1 if args.packed else None, column % size > 0)


def main() -> None:
    args = arguments()
    sizes = {"num_layers": args.layers, "embed_dim": args.embed, "num_heads": args.heads, "mlp_dim": args.mlp}
    model = ModelConfig(**llama2_7b(**sizes, vocab_size=args.vocab, max_length=args.length)).resolved()
    fields = {"zero_stage": args.zero_stage, "num_microbatches": args.microbatches, "remat": args.remat}
    config = Config(model=model, precision=PrecisionConfig(compute="bfloat16"))
    layout = make_layout(
        MeshConfig(model=args.model),
        LayoutConfig(**fields, scan_layers=not args.unroll, attention=args.attention),
    )
    spec = model_spec(model)
    optimizer, schedule = make_optimizer(config.optimizer, 1000, spec.axes), make_schedule(config.optimizer, 1000)
    device = jax.devices()[0]
    backend = choose_backend(args.attention, device.platform, compute="bfloat16", dropout=0)
    print(f"{layout.mesh.size} x {device.device_kind}, jax {jax.__version__}, {spec.num_parameters:,} parameters")
    print(check_backend(layout, model, "bfloat16") if args.packed else f"attention: {backend}, rows of one document")

    state = init_state(spec, optimizer, layout, 0)
    batch = jax.device_put(make_batch(args), layout.sharding("batch", None))
    start = time.perf_counter()
    step = make_train_step(STEPS["pretrain"], spec, optimizer, schedule, config, layout)
    compiled = step.trace(state, batch).lower().compile()
    print(f"compiled in {time.perf_counter() - start:.1f} s")
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics["loss"])  # waits for the step
        seconds.append(time.perf_counter() - start)
    report(args, spec, statistics.median(seconds[3:] or seconds), loss, compiled.memory_analysis(), device)


def report(args, spec: ModelSpec, seconds: float, loss: float, predicted, device: jax.Device) -> None:
    tokens = args.batch_size * args.length / seconds
    print(f"batch {args.batch_size} x {args.length}, {args.microbatches} microbatches, remat {args.remat}")
    print(f"step {seconds * 1e3:,.1f} ms, {tokens:,.0f} tokens/s, loss {loss:.4f}")
    full = flops_per_token(spec, args.length)
    attention = 12.0 * args.layers * args.embed * args.length
    peak = peak_flops(device)
    for name, flops in {
        "6N + 12 layers heads head_dim length (full attention, no recompute)": full,
        "the same with the causal half of attention": full - attention / 2,
    }.items():
        rate = flops * tokens / jax.device_count()
        share = f"MFU {rate / peak:.1%}" if peak else "no peak known for this device"
        print(f"{rate / 1e12:,.1f} TFLOP/s a device, {share}: {flops:.6g} FLOPs a token, {name}")
    temporary, at_rest = predicted.temp_size_in_bytes, predicted.argument_size_in_bytes
    print(f"memory a device: {(temporary + at_rest) / 2**30:.2f} GiB predicted by XLA ({at_rest / 2**30:.2f} at rest)")
    if stats := device.memory_stats():
        print(f"memory a device: {stats['peak_bytes_in_use'] / 2**30:.2f} GiB at the peak, measured")


if __name__ == "__main__":
    main()
