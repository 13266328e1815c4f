"""generate, chat and evaluate on a run on disk: what goes to stdout, what a program can read, and mistakes."""

import io
import json
import math
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from jaxllm.cli.main import main

TEXT = "the quick brown fox。却说曹操"


def run(argv, capsys, code=0):
    assert main(argv) == code
    return capsys.readouterr()


def test_generate_streams_one_prompt_to_stdout(run_on_disk, capsys):
    argv = ["generate", f"--workdir={run_on_disk}", "--prompt", "却说曹操", "--max_new_tokens=8", "--seed=3"]
    out, err = run(argv, capsys)
    assert out.startswith("却说曹操")
    assert out.endswith("\n")
    assert "The run's mesh does not fit the 8 devices here; using data=-1 model=2." in err
    again, _ = run(argv, capsys)
    assert again == out
    as_json, _ = run([*argv, "--json"], capsys)
    completion = json.loads(as_json)
    assert completion["prompt"] + completion["text"] + "\n" == out
    assert len(completion["tokens"]) == 8
    assert completion["finish_reason"] == "length"


def test_generate_takes_a_batch_from_flags_and_a_file(run_on_disk, capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("玄德\n\nthe lazy\n", encoding="utf-8")
    argv = ["generate", f"--workdir={run_on_disk}", "--prompt=-x", f"--prompt_file={file}", "--temperature=0"]
    out, _ = run([*argv, "--max_new_tokens=4", "--json"], capsys)
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["-x", "玄德", "the lazy"]
    out, _ = run([*argv, "--max_new_tokens=4"], capsys)
    assert "玄德" in out and "the lazy" in out


def test_generate_says_when_the_context_is_full(run_on_disk, capsys):
    argv = ["generate", f"--workdir={run_on_disk}", "--prompt=the", "--temperature=0", "--max_new_tokens=500"]
    _, err = run(argv, capsys)
    assert "stopped where the model's context of 32 tokens is full" in err


def test_generate_is_the_same_on_every_mesh(run_on_disk, capsys):
    argv = ["generate", f"--workdir={run_on_disk}", "--prompt=the quick", "--seed=1", "--max_new_tokens=6"]
    texts = {run([*argv, *mesh], capsys)[0] for mesh in ([], ["--config.mesh.data=8", "--config.mesh.model=1"])}
    assert len(texts) == 1


def test_evaluate_prints_and_writes_json(run_on_disk, capsys, tmp_path):
    file = tmp_path / "held_out.txt"
    file.write_text(TEXT * 10, encoding="utf-8")
    argv = ["evaluate", f"--workdir={run_on_disk}", f"--input={file}"]
    out, _ = run([*argv, "--json"], capsys)
    result = json.loads(out)
    assert result["characters"] == len(TEXT) * 10
    assert result["loss"] == pytest.approx(math.log(320), rel=0.05)  # untrained: as good as a guess
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_character"] > result["bits_per_byte"]
    out, _ = run(argv, capsys)
    assert f"{result['bits_per_character']:.4f}" in out
    lines = tmp_path / "held_out.jsonl"
    lines.write_text(json.dumps({"body": TEXT * 10}), encoding="utf-8")
    out, _ = run(["evaluate", f"--workdir={run_on_disk}", f"--input={lines}", "--field=body", "--json"], capsys)
    assert json.loads(out) == result


def test_evaluate_several_files_each_and_in_total(run_on_disk, capsys, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 10, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": TEXT * n}) + "\n" for n in (1, 2)), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["dog"]}), tmp_path / "c.parquet")
    files = [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.parquet")]
    argv = ["evaluate", f"--workdir={run_on_disk}", f"--input={','.join(files)}"]
    result = json.loads(run([*argv, "--json"], capsys)[0])
    assert list(result["files"]) == files
    for name in ("nats", "tokens", "characters", "bytes", "documents"):
        assert result[name] == pytest.approx(sum(result["files"][file][name] for file in files))
    assert result["documents"] == 4
    alone = json.loads(run([*argv[:2], f"--input={files[1]}", "--json"], capsys)[0])
    assert alone["loss"] == pytest.approx(result["files"][files[1]]["loss"], rel=1e-5)
    head, *lines = run(argv, capsys)[0].splitlines()
    assert head.split() == ["loss", "perplexity", "bits", "per", "character", "bits", "per", "byte"]
    assert [line.split()[0] for line in lines] == [*files, "total"]
    assert lines[-1].split()[1] == f"{result['loss']:.4f}"


def test_evaluate_choices_is_the_same_on_every_mesh(run_on_disk, capsys, tmp_path):
    records = [{"prompt": "the quick", "choices": ["brown fox", "曹操", "dog"], "answer": i % 3} for i in range(6)]
    records += [{"question": "却说", "options": ["曹操引兵", "over", "x"], "label": "B"}] * 3
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(lines[: lines.index("\n") + 1], encoding="utf-8")
    argv = ["evaluate", f"--workdir={run_on_disk}", f"--choices={tmp_path}", "--batch_size=5"]
    out, _ = run([*argv, "--json"], capsys)
    result = json.loads(out)
    assert result["questions"] == 10
    assert [of_file["questions"] for of_file in result["files"].values()] == [9, 1]
    assert result["acc"] == result["right"] / 10
    folded = ["--config.mesh.data=8", "--config.mesh.model=1", "--delimiter= "]
    assert run([*argv, "--json", *folded], capsys)[0] == out
    table = run(argv, capsys)[0].splitlines()
    assert table[0].split() == ["acc", "acc_norm", "acc_bytes"]
    assert table[-1].split() == ["total", *(f"{result[name]:.4f}" for name in ("acc", "acc_norm", "acc_bytes"))]
    one = run([*argv[:2], f"--choices={tmp_path / 'b.jsonl'}"], capsys)[0].splitlines()
    assert [line.split()[0] for line in one] == ["acc", "acc_norm", "acc_bytes"]


FINE = {"prompt": "the", "choices": ["dog", "fox"], "answer": 0}
NO_QUESTIONS = {
    "empty file": ([], "a.jsonl: the file is empty"),
    "missing field": ([FINE, {"prompt": "the", "answer": 0}], "a.jsonl:2: no field 'choices' (nor options, endings)"),
    "out of range": ([FINE, {**FINE, "answer": 2}], "a.jsonl:2: the answer 2 is out of range: there are 2 choices"),
    "too long": (
        [FINE, FINE, {**FINE, "choices": ["a", "曹" * 40]}],
        "a.jsonl:3: the continuation has 41 tokens, more than the model's context of 32.",
    ),
}


@pytest.mark.parametrize(("records", "says"), NO_QUESTIONS.values(), ids=NO_QUESTIONS.keys())
def test_questions_that_are_none(run_on_disk, records, says, capsys, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    said = mistake(["evaluate", f"--workdir={run_on_disk}", f"--choices={tmp_path / 'a.jsonl'}"], capsys)
    assert says in said
    assert len(said.split("jaxllm: ")[-1].splitlines()) == 1


def test_a_run_that_split_sequences_is_used_with_split_rows(run_on_disk, capsys, tmp_path):
    """`context` has no use in generation and evaluation; its devices take rows of the batch."""
    trained = shutil.copytree(run_on_disk, tmp_path / "run")
    config = json.loads((trained / "config.json").read_text())
    config["mesh"] = {**config["mesh"], "data": 1, "context": 4, "model": 2}
    (trained / "config.json").write_text(json.dumps(config))
    file = tmp_path / "held_out.txt"
    file.write_text(TEXT * 10, encoding="utf-8")
    argv = ["evaluate", f"--input={file}", "--json"]
    out, err = run([*argv, f"--workdir={trained}"], capsys)
    assert "does not fit" not in err
    elsewhere, _ = run([*argv, f"--workdir={run_on_disk}", "--config.mesh.data=4", "--config.mesh.model=2"], capsys)
    assert json.loads(out) == json.loads(elsewhere)
    said = mistake([*argv, f"--workdir={trained}", "--config.mesh.data=2", "--config.mesh.context=2"], capsys)
    assert "config.mesh.context=2: generation and evaluation split the batch" in said


def test_chat_answers_line_by_line_and_lives_on_after_a_line_that_is_too_long(run_on_disk, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n" + "the quick brown fox " * 20 + "\n/reset\nhi\n"))
    argv = ["chat", f"--workdir={run_on_disk}", "--max_new_tokens=4", "--user=U", "--assistant=A", "--temperature=0"]
    out, err = run(argv, capsys)
    answers = out.splitlines()
    assert len(answers) >= 2
    assert "leaves no room for an answer of 4" in err


def test_chat_and_generate_with_a_hugging_face_tokenizer(run_on_disk, tmp_path, capsys, monkeypatch):
    """An untrained model: what counts is the prompt that its template makes, and that text comes out."""
    pytest.importorskip("transformers")
    from jaxllm.generate.engine import Engine
    from tests.data import huggingface

    copy = shutil.copytree(run_on_disk, tmp_path / "run")
    shutil.rmtree(copy / "tokenizer")
    turn = "<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>"
    template = f"{{{{ bos_token }}}}{{% for m in messages %}}{turn}{{% endfor %}}<|start_header_id|>"
    theirs = huggingface.save("llama3", copy / "tokenizer", vocab_size=320, chat_template=template)
    prompts = []
    encode = Engine.encode
    monkeypatch.setattr(Engine, "encode", lambda *a, **b: prompts.append(encode(*a, **b)) or prompts[-1])
    monkeypatch.setattr("sys.stdin", io.StringIO("hi fox\n"))
    argv = [f"--workdir={copy}", "--temperature=0", "--max_new_tokens=4"]
    run(["chat", *argv, "--system=brief"], capsys)
    talk = [{"role": "system", "content": "brief"}, {"role": "user", "content": "hi fox"}]
    want = theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert prompts.pop() == want
    out, _ = run(["generate", *argv, "--prompt=却说 <|eot_id|>", "--json"], capsys)
    (ids,), completion = prompts, json.loads(out)
    assert ids[0] == theirs.bos_token_id
    assert theirs.convert_tokens_to_ids("<|eot_id|>") not in ids
    assert completion["text"] == theirs.decode(completion["tokens"], skip_special_tokens=True)


def mistake(argv, capsys) -> str:
    said = run(argv, capsys, code=2).err
    assert "Traceback" not in said
    return said


MISTAKES = {
    "no run": (["generate", "--prompt=x"], "say which run: --workdir DIR"),
    "no such folder": (["generate", "--prompt=x", "--workdir=no/such"], "--workdir no/such: no such folder"),
    "no prompt": (["generate", "--workdir=RUN"], 'say what to continue: --prompt "…"'),
    "prompt longer than the context": (
        ["generate", "--workdir=RUN", f"--prompt={'曹' * 100}"],
        "but the model's context is 32 and must hold the answer too. Shorten the prompt to at most 31 tokens.",
    ),
    "temperature": (["generate", "--workdir=RUN", "--prompt=x", "--temperature=-1"], "temperature=-1.0 must be 0"),
    "top_p": (["generate", "--workdir=RUN", "--prompt=x", "--top_p=2"], "top_p=2.0 must be above 0 and at most 1"),
    "not a number": (["generate", "--workdir=RUN", "--prompt=x", "--top_k=few"], "argument --top_k: invalid int value"),
    "misspelt flag": (["generate", "--workdir=RUN", "--promt=x"], "--promt is not a flag of jaxllm generate"),
    "no tokens": (["generate", "--workdir=RUN", "--prompt=x", "--max_new_tokens=0"], "max_new_tokens=0 must be 1"),
    "prompt file": (["generate", "--workdir=RUN", "--prompt_file=no.txt"], "--prompt_file no.txt: No such file"),
    "mesh": (["generate", "--workdir=RUN", "--prompt=x", "--config.mesh.model=3"], "config.mesh"),
    "field": (["generate", "--workdir=RUN", "--prompt=x", "--config.mesh.mdel=1"], "Did you mean 'config.mesh.model'?"),
    "attention": (
        ["evaluate", "--workdir=RUN", "--input=RUN/config.json", "--source=text", "--config.layout.attention=cudnn"],
        "config.layout.attention='cudnn' needs a GPU",
    ),
    "another model": (
        ["generate", "--workdir=RUN", "--prompt=x", "--config.model.num_layers=2"],
        "is a checkpoint of another model",
    ),
    "no input": (["evaluate", "--workdir=RUN"], "say what to evaluate on: --input FILES, or --choices FILES."),
    "missing input": (["evaluate", "--workdir=RUN", "--input=no.txt"], "no.txt"),
    "two evaluations": (["evaluate", "--workdir=RUN", "--input=a.txt", "--choices=b.jsonl"], "give one of them"),
    "missing questions": (["evaluate", "--workdir=RUN", "--choices=no.jsonl"], "no.jsonl: no such file"),
    "batch size": (["evaluate", "--workdir=RUN", "--input=no.txt", "--batch_size=0"], "--batch_size=0 must be 1"),
}


@pytest.mark.parametrize(("argv", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(run_on_disk, argv, says, capsys):
    assert says in mistake([argument.replace("RUN", str(run_on_disk)) for argument in argv], capsys)


def test_an_attention_backend_that_differs(run_on_disk, capsys, monkeypatch, request):
    from jaxllm.model import attention_backends, attention_check

    flash = attention_backends._flash
    ignores_segments = lambda rate, q, k, v, segments, rows: flash(rate, q, k, v, None, rows)  # noqa: E731
    monkeypatch.setattr(attention_backends, "_flash", ignores_segments)
    request.addfinalizer(attention_check._differences.clear_cache)
    attention_check._differences.clear_cache()
    said = mistake(["generate", f"--workdir={run_on_disk}", "--prompt=x"], capsys)
    assert "attention backend 'xla' differs from the reference" in said


def test_a_folder_that_is_no_run(tmp_path, capsys):
    said = mistake(["generate", f"--workdir={tmp_path}", "--prompt=x"], capsys)
    assert "holds no run: there is no config.json in it" in said


def test_a_run_without_a_checkpoint(run_on_disk, tmp_path, capsys):
    workdir = shutil.copytree(run_on_disk, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    assert "has no checkpoint yet" in mistake(["generate", f"--workdir={workdir}", "--prompt=x"], capsys)


def test_a_tokenizer_of_another_size(run_on_disk, tmp_path, capsys):
    from jaxllm.data.tokenizer_training import train_tokenizer

    workdir = shutil.copytree(run_on_disk, tmp_path / "run")
    train_tokenizer([TEXT] * 20, vocab_size=300).save(workdir / "tokenizer")
    said = mistake(["generate", f"--workdir={workdir}", "--prompt=x"], capsys)
    assert "is a checkpoint of another model" in said
    assert "[320, 16]" in said and "[300, 16]" in said
