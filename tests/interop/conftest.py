"""A run trained on sentences that a model can learn by heart, with questions about them; imported models."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded

SAYS = {
    "cat": "meow", "dog": "woof woof", "cow": "moo", "duck": "quack quack", "sheep": "baa", "pig": "oink oink",
    "frog": "croak", "lion": "a long roar",
}  # fmt: skip
CONFIG = """
from jaxllm.train.config import base_config

def get_config():
    config = base_config()
    config.model.update(num_layers=2, embed_dim=32, num_heads=2, max_length=32, positions="rope")
    config.data.update(path={text!r}, cache={cache!r}, tokenizer="bpe:330", held_out="0.05", batch_size=16)
    config.precision.update(compute="float32")
    config.optimizer.update(warmup_steps=5, learning_rate=1e-2)
    config.train.update(steps=150, log_every=150, eval_every=0, checkpoint_every=0)
    return config
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with run/ and questions.jsonl, in which every fifth answer is wrong. Not to be written to."""
    from jaxllm.cli.main import main

    folder = tmp_path_factory.mktemp("interop")
    drawn = random.Random(0)
    lines = [f"the {animal} says {sound}.\n" for animal, sound in SAYS.items()]
    (folder / "text.txt").write_text("".join(drawn.choices(lines, k=1500)), encoding="utf-8")
    config = CONFIG.format(text=str(folder / "text.txt"), cache=str(folder / "cache"))
    (folder / "config.py").write_text(config, encoding="utf-8")
    assert main(["train", f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}"]) == 0
    with (folder / "questions.jsonl").open("w") as file:
        for number in range(40):
            animal = drawn.choice(list(SAYS))
            wrong = drawn.sample([sound for sound in SAYS.values() if sound != SAYS[animal]], 3)
            choices = [SAYS[animal], *wrong]
            drawn.shuffle(choices)
            answer = choices.index(wrong[0] if number % 5 == 4 else SAYS[animal])
            file.write(json.dumps({"prompt": f"the {animal} says", "choices": choices, "answer": answer}) + "\n")
    return folder


@pytest.fixture(scope="session")
def base_of(tmp_path_factory) -> Callable:
    """name of a model -> it in both forms (tests/interop/peft/adapters.py); not to be written to."""
    from jaxllm.data.tokenizer_training import train_tokenizer
    from tests.interop.peft.adapters import make_base

    folder = tmp_path_factory.mktemp("bases")
    text = ["却说曹操引兵追赶，玄德大惊。the quick brown fox jumps over the lazy dog\n"] * 20
    train_tokenizer(text, vocab_size=320).save(folder / "tokenizer")
    return lambda name: make_base(name, folder)
