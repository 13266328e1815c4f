"""The parity matrix: every legal layout of three small models on 8 devices against one device.

    python -m tests.parity --all                    # hours on two cores; --part 1/4 runs the first of four parts
    python -m tests.parity --sample 60 --seed 1

A line a layout: the worst relative difference of the losses and gradient norms of three steps, and of the parameters
after them: relative to the largest of their tensor, or to the learning rate where that is more. (The bias of the keys
is only rounding: softmax does not see it.)
"""

import argparse
import dataclasses
import functools
import itertools
import random
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple
from unittest import mock

from tests import conftest  # noqa: F401  eight virtual devices, before jax is imported

import jax  # isort: skip
import numpy as np

from jaxllm.data.config import DataConfig
from jaxllm.layout import zero
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.layout.mesh import AXES
from jaxllm.plan.layouts import flags, legal_layouts, variations
from jaxllm.train.config import Config
from tests.layout.runs import BATCH, GPT2, LEARNING_RATE, LENGTH, LLAMA, MOE, Trained, train

DEVICES, STEPS, MICROBATCHES = 8, 3, (1, 4, 8)
# Layers for eight stages. Llama: fewer key heads than `model` at 8, an untied head. GPT-2: learned positions, biases, a
# tied head, a vocabulary of 37. MoE: Llama with four experts.
MODELS = {
    name: dataclasses.replace(model, num_layers=8) for name, model in (("llama", LLAMA), ("gpt2", GPT2), ("moe", MOE))
}
NUMBERS, PARAMS = 1e-5, 1e-4  # what may differ
VARIED = ("mesh", "zero_stage", "sequence_parallel", "schedule", "num_microbatches", "context_attention")


class Case(NamedTuple):
    """A model under a layout."""

    model: str
    config: Config

    def __str__(self) -> str:
        mesh, layout = self.config.mesh, self.config.layout
        sizes = "".join(f"{axis[0]}{getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1)
        parts = [self.model, sizes, f"zero{layout.zero_stage}", *["sp"] * layout.sequence_parallel]
        parts += [self.schedule] * (mesh.pipeline > 1) + [layout.context_attention] * (mesh.context > 1)
        return "-".join([*parts, f"mb{layout.num_microbatches}"])

    @property
    def schedule(self) -> str:
        return self.config.layout.schedule if self.config.mesh.pipeline > 1 else ""

    @property
    def context_attention(self) -> str:
        return self.config.layout.context_attention if self.config.mesh.context > 1 else ""


class Differences(NamedTuple):
    """The worst relative ones from one device."""

    numbers: float
    params: float

    @property
    def within(self) -> bool:
        return self.numbers <= NUMBERS and self.params <= PARAMS


def smallest_gathered(elements: int = 256):
    """ZeRO 3 gathers tensors from this size on where they are used: even the tiny ones of these models."""
    return mock.patch.object(zero, "SMALL", elements)


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Every legal layout of the models."""
    cases = []
    with smallest_gathered():
        for name, model in MODELS.items():
            base = Config(model=model, data=DataConfig(batch_size=BATCH, length=LENGTH))
            vary = variations(base, DEVICES, VARIED) | {"num_microbatches": MICROBATCHES}
            cases += [Case(name, config) for config in legal_layouts(base, DEVICES, vary)]
    return tuple(cases)


def draw(number: int, seed: int) -> list[Case]:
    """Cases taken at random, in turn from each combination of model, schedule and context attention.

    From a combination the ZeRO stages are taken in turn, from another stage on than in the combination before.
    """
    shuffled = list(all_cases())
    random.Random(seed).shuffle(shuffled)
    groups: dict[tuple, list[list[Case]]] = {}
    for case in shuffled:
        stages = groups.setdefault((case.model, case.schedule, case.context_attention), [[], [], [], []])
        stages[case.config.layout.zero_stage].append(case)
    rotated = [groups[key][i % 4 :] + groups[key][: i % 4] for i, key in enumerate(sorted(groups))]
    return _in_turn([_in_turn(stages) for stages in rotated])[:number]


def _in_turn(lists: Sequence[Sequence[Case]]) -> list[Case]:
    """The first of each list, the second of each, and so on."""
    return [case for cases in itertools.zip_longest(*lists) for case in cases if case is not None]


@functools.cache
def reference(model: str) -> Trained:
    layout = make_layout(MeshConfig(data=1), LayoutConfig(zero_stage=0), devices=jax.devices()[:1])
    return train(MODELS[model], layout, STEPS)


def differences(case: Case) -> Differences:
    """Trains under the layout and compares."""
    with smallest_gathered():
        layout = make_layout(case.config.mesh, case.config.layout, devices=jax.devices()[:DEVICES])
        trained = train(MODELS[case.model], layout, STEPS)
    return compare(trained, reference(case.model))


def compare(trained: Trained, expected: Trained) -> Differences:
    def worst(a: np.ndarray, b: np.ndarray) -> float:
        return np.abs(a - b).max() / max(np.abs(b).max(), LEARNING_RATE)

    numbers = np.abs(trained.numbers / expected.numbers - 1).max()
    params = jax.tree.map(worst, trained.params, expected.params)
    return Differences(float(numbers), max(map(float, jax.tree.leaves(params))))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.partition("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every legal layout")
    which.add_argument("--sample", type=int, metavar="N", help="N of them, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts, from 1 on")
    options = parser.parse_args(argv)
    cases = all_cases() if options.all else draw(options.sample, options.seed)
    part, parts = map(int, options.part.split("/"))
    cases = cases[part - 1 :: parts]
    print(f"{len(cases)} of {len(all_cases())} legal layouts", flush=True)
    failed, worst, started = [], Differences(0.0, 0.0), time.time()
    for number, case in enumerate(cases, start=1):
        found = differences(case)
        worst = Differences(*map(max, worst, found))
        failed += [] if found.within else [case]
        mark = "" if found.within else "  TOO FAR: " + " ".join(flags(case.config, Config()))
        print(f"[{number}/{len(cases)}] {found.numbers:.1e} {found.params:.1e}  {case}{mark}", flush=True)
        if number % 20 == 0:
            jax.clear_caches()
    print(
        f"{len(cases) - len(failed)} of {len(cases)} layouts within {NUMBERS:g} (losses, gradient norms) "
        f"and {PARAMS:g} (parameters); worst {worst.numbers:.1e} and {worst.params:.1e}; {time.time() - started:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
