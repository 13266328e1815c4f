"""`jaxllm instructions --inspect`: what it shows, and which tokenizer it takes."""

import json

import pytest

from jaxllm.cli.main import main
from jaxllm.data.chat_template import named_template
from jaxllm.data.tokenizer_training import train_tokenizer
from jaxllm.train.config import base_config, config_dict, read_config
from tests.mistakes import mistake

TALK = [{"role": "user", "content": "却说 </s>"}, {"role": "assistant", "content": "😀 the fox"}]


@pytest.fixture
def files(tmp_path):
    tokenizer = train_tokenizer(["the fox 却说 " * 20], vocab_size=275)
    tokenizer.save(tmp_path / "tokenizer")
    records = [{"messages": TALK}, {"prompt": "a ", "completion": "<s>"}, {"text": "b"}, {"messages": TALK[:1]}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    config = base_config()
    config.train_step = "sft"
    config.data.update(packing="best_fit", chat_template="plain", supervise="all")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config_dict(read_config(config))))
    tokenizer.with_template(named_template("zephyr")).save(tmp_path / "run" / "tokenizer")
    return tmp_path


def inspect(files, *flags, code=0):
    assert main(["instructions", f"--inspect={files / 'a.jsonl'}", *flags]) == code


def test_what_is_learned_is_marked(files, capsys):
    """Special tokens by name, where they are such tokens; a text that only looks like one is one all the same."""
    inspect(files, f"--tokenizer={files / 'tokenizer'}", "--config.data.chat_template=plain", "--limit=3")
    shown = capsys.readouterr().out.replace(str(files), "")
    assert shown == (
        "--- /a.jsonl:1: 31 tokens, 10 of them learned\n"
        "<s>User: 却说 </s>\nAssistant:⟦ 😀 the fox</s>⟧\n\n"
        "--- /a.jsonl:2: 7 tokens, 4 of them learned\n<s>a ⟦<s></s>⟧\n"
        "--- /a.jsonl:3: 3 tokens, 2 of them learned\n<s>⟦b</s>⟧\n"
    )


def test_preferences_are_shown_as_pairs(files, capsys):
    pair = {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [{**TALK[1], "content": "fox"}], "margin": 0.5}
    (files / "a.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps({**pair, "margin": 0}) + "\n", encoding="utf-8")
    inspect(files, f"--workdir={files / 'run'}", "--limit=1")
    shown = capsys.readouterr().out.replace(str(files), "")
    assert shown == (
        "--- /a.jsonl:1, chosen: 40 tokens, 9 of them learned, margin 0.5\n"
        "<s><|user|>\n却说 </s></s>\n<|assistant|>\n⟦😀 the fox</s>⟧\n\n"
        "--- /a.jsonl:1, rejected: 33 tokens, 2 of them learned\n"
        "<s><|user|>\n却说 </s></s>\n<|assistant|>\n⟦fox</s>⟧\n\n"
    )


def test_of_a_run(files, capsys):
    """Its template and its settings, which the flags may change."""
    inspect(files, f"--workdir={files / 'run'}", "--limit=1")
    assert "<s>⟦<|user|>\n却说 </s></s>\n<|assistant|>\n😀 the fox</s>\n⟧" in capsys.readouterr().out
    inspect(files, f"--workdir={files / 'run'}", "--limit=1", "--config.data.supervise=completions")
    assert "<|assistant|>\n⟦😀 the fox</s>⟧\n" in capsys.readouterr().out


def test_colours_on_a_terminal(files, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    inspect(files, f"--workdir={files / 'run'}", "--limit=2", "--config.data.supervise=completions")
    shown = capsys.readouterr().out
    assert "\033[30;42m😀 the fox</s>\033[0m" in shown and "⟦" not in shown


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "say by which tokenizer: --workdir DIR, --config FILE.py or --tokenizer DIR"),
        (("--tokenizer=bpe:300",), "is trained when the run starts"),
        (("--workdir={run}", "--limit=0"), "a.jsonl:4: no message of the assistant"),
        (("--workdir={run}", "--config=x.py"), "both say which tokenizer"),
        (("--tokenizer={run}/tokenizer", "--source=text"), "a file of kind text holds no examples"),
        (("--tokenizer={run}/tokenizer", "--config.data.fields=x=y"), "'x' is a field of no format"),
    ],
)
def test_mistakes(files, capsys, flags, says):
    changed = [flag.format(run=files / "run") for flag in flags]
    inspect(files, *changed, "--config.data.supervise=completions", code=2)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "say what to do: --input FILES --out DIR, --expand FILE, or --inspect FILES."),
        (("--input", "a", "--inspect=b"), "--input and --inspect are different things to do"),
    ],
)
def test_one_thing_is_asked_for(capsys, flags, says):
    assert says in mistake(["instructions", *flags], capsys)


def test_help_names_what_there_is_to_do(capsys):
    assert main(["instructions", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(way in said for way in ("--input", "--expand", "--inspect"))
