"""jaxllm instructions --expand with a model that is trained on pages as the prompts begin them."""

import json
import random

import pytest

from jaxllm.cli.main import main
from jaxllm.data.instructions.tasks import Task, append_task, read_tasks
from jaxllm.data.rouge import rouge_l
from jaxllm.data.words import words
from jaxllm.generate.self_instruct import ASKED, INSTRUCTIONS, OUTPUT, SHOWN
from tests.mistakes import mistake

WORDS = (
    ("write", "name", "list", "draft", "find", "count"),
    ("red", "old", "warm", "tiny", "calm", "loud"),
    ("birds", "poems", "rivers", "games", "soups", "songs"),
    ("about", "without", "near", "before", "after", "with"),
    ("spring", "paris", "silence", "money", "friends", "snow"),
)
MODEL = {"num_layers": 1, "embed_dim": 64, "num_heads": 4, "mlp_dim": 128, "max_length": 256}


def draw_task(draw: random.Random) -> Task:
    said = [draw.choice(choices) for choices in WORDS]
    return Task(" ".join(said), said[4] if draw.random() < 0.5 else "", " ".join(said[1:3]))


def page(draw: random.Random) -> str:
    """A list of instructions, or tasks with inputs and outputs."""
    tasks = [draw_task(draw) for _ in range(SHOWN + ASKED + 1)]
    if draw.random() < 0.5:
        lines = [f"{number}. {task.instruction}" for number, task in enumerate(tasks, 1)]
        return INSTRUCTIONS.format(count=SHOWN + ASKED, tasks="\n".join(lines))
    inputs = [f"\nInput: {task.input}" if task.input else "" for task in tasks]
    parts = [f"Task: {t.instruction}{given}\nOutput: {t.output}" for t, given in zip(tasks[:6], inputs, strict=False)]
    return OUTPUT.format(tasks="\n\n".join(parts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """seeds.jsonl, and run: a model that has learned such pages."""
    folder, draw = tmp_path_factory.mktemp("expand"), random.Random(0)
    pages = [json.dumps({"text": page(draw)}) for _ in range(2000)]
    (folder / "pages.jsonl").write_text("\n".join(pages), encoding="utf-8")
    for _ in range(12):
        append_task(folder / "seeds.jsonl", draw_task(draw))
    data = {"source": "jsonl", "path": folder / "pages.jsonl", "tokenizer": "bpe:340", "batch_size": 8, "held_out": ""}
    train = {"steps": 150, "log_every": 50, "eval_every": 0, "checkpoint_every": 150}
    groups = {"data": data | {"cache": folder / "cache"}, "model": MODEL, "train": train}
    fields = [f"--config.{group}.{name}={value}" for group, some in groups.items() for name, value in some.items()]
    assert main(["train", "--config=configs/quickstart.py", f"--workdir={folder / 'run'}", *fields]) == 0
    return folder


def command(folder, out, *flags):
    given = ["instructions", f"--expand={folder / 'seeds.jsonl'}", f"--workdir={folder / 'run'}", f"--out={out}"]
    return [*given, "--temperature=1", "--top_p=1", "--max_new_tokens=100", "--batch_size=2", "--json", *flags]


def test_new_tasks_that_go_on(folder, tmp_path, capsys):
    out = tmp_path / "new.jsonl"
    assert main(command(folder, out, "--count=6")) == 0
    said, err = capsys.readouterr()
    assert json.loads(said) | {"rejected": {}} == {"out": str(out), "tasks": 6, "before": 0, "rejected": {}}
    assert "6 of 6; rejected: " in err
    first = out.read_bytes()
    out.write_bytes(first + b'{"instruction": "cut o')
    assert main(command(folder, out, "--count=9")) == 0
    assert json.loads(capsys.readouterr().out)["before"] == 6
    assert out.read_bytes().startswith(first)
    known = [words(task.instruction) for task in read_tasks(str(folder / "seeds.jsonl"))]
    new = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(new) == 9
    for task in new:
        said = words(task["instruction"])
        assert task["output"] and max(rouge_l(said, other) for other in known) <= task["rouge_l"] + 1e-4 < 0.7
        known.append(said)
    assert main(command(folder, out, "--count=9")) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "tasks": 9, "before": 9, "rejected": {}}


def test_a_model_that_finds_nothing_new(folder, tmp_path, capsys):
    said = refusal(command(folder, tmp_path / "x.jsonl", "--rouge=0.01", "--patience=2"), capsys)
    assert "2 rounds in a row gave no new task; rejected:" in said and "similar" in said
    assert not (tmp_path / "x.jsonl").exists()


def refusal(argv, capsys):
    """What stderr says last."""
    assert main(argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--count=0"], "--count=0 must be 1 or more"),
        (["--rouge=0"], "--rouge=0.0 must be above 0 and at most 1"),
        (["--out=x.json"], "--out x.json: say where to write the tasks, a file whose name ends in .jsonl"),
        (["--expand=/gone.jsonl"], "/gone.jsonl: no such file"),
        (["--held_out=0.1"], "--held_out is not a flag of jaxllm instructions --expand"),
        (["--workdir="], "say which run: --workdir DIR"),
    ],
)
def test_mistakes(tmp_path, capsys, flags, says):
    append_task(tmp_path / "seeds.jsonl", Task("Say something nice", "", "x"))
    assert says in mistake(command(tmp_path, tmp_path / "new.jsonl", *flags), capsys)


def test_a_context_that_is_too_short(run_on_disk, tmp_path, capsys):
    append_task(tmp_path / "seeds.jsonl", Task("Say something nice", "", "x"))
    argv = command(tmp_path, tmp_path / "new.jsonl", f"--workdir={run_on_disk}")
    assert "the model's context has no room for a prompt" in refusal(argv, capsys)
