"""What a mixture of experts costs beside a dense model of as many operations a token, on CPU, in turn, in one run.

    python -m tests.benchmarks.experts [--rounds 5] [--steps 4]

The dense side is the 8.4M Llama of cpu_step.py (mlp 1024); the others have 8 experts of 512, two for each token.
"""

import argparse
import dataclasses
import statistics
import time

from tests.benchmarks.cpu_step import LLAMA, jaxllm_steps

BATCH = 8
MIXTURE = dataclasses.replace(LLAMA, num_experts=8, experts_per_token=2, mlp_dim=512, router_balance_loss=0.01)
SIDES = {
    "dense": LLAMA,
    "dropless": MIXTURE,
    "capacity": dataclasses.replace(MIXTURE, expert_dispatch="capacity"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    runners = {name: jaxllm_steps(model, BATCH, "float32") for name, model in SIDES.items()}
    for run in runners.values():
        run(2)  # compile, warm up
    rates = {name: [] for name in runners}
    for _ in range(args.rounds):
        for name, run in runners.items():
            start = time.perf_counter()
            run(args.steps)
            rates[name].append(args.steps * BATCH * LLAMA.max_length / (time.perf_counter() - start))
    for name, rate in rates.items():
        ratio = statistics.median(ours / dense for ours, dense in zip(rate, rates["dense"], strict=True))
        print(f"{name:9} {statistics.median(rate):8,.0f} tokens/s, {ratio:.2f} of dense")


if __name__ == "__main__":
    main()
