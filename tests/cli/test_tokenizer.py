import json

import pytest

from jaxllm.cli.tokenizer import main
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import UserError


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the lazy dog and the quick fox\n" * 50)
    return path


def test_trains_and_prints_json(tmp_path, text, capsys):
    flags = ["--input", str(text), "--out", str(tmp_path / "out"), "--vocab_size", "300", "--json"]
    assert main([*flags, "--special_tokens", "<|user|>,<|end|>"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert (result["vocab_size"], result["fingerprint"]) == (300, tokenizer.fingerprint)
    assert tokenizer.specials["<|end|>"] == result["special_tokens"]["<|end|>"] == 5


def test_from_jsonl_unigram(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"body": "the lazy dog and the quick fox"}\n' * 50)
    flags = ["--input", str(tmp_path), "--source", "jsonl", "--field", "body", "--kind", "unigram"]
    assert main([*flags, "--out", str(tmp_path / "out"), "--vocab_size", "280"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 280 pieces\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--inptu", "x"], "--inptu is not a flag of jaxllm tokenizer. Did you mean '--input'"),
        (["--kind", "bep"], "--kind=bep is unknown. Did you mean 'bpe'"),
        (["--vocab_size", "many"], "invalid int value"),
        (["--vocab_size", "0"], "must be above 0"),
        (["--vocab_size", "100000"], "at most"),
        (["--source", "txt"], "no source of data. Did you mean 'text'"),
        (["--out", "{text}"], "cannot be written"),
    ],
)
def test_mistakes(tmp_path, text, flags, message):
    required = ["--input", str(text), "--out", str(tmp_path / "out"), "--vocab_size", "300"]
    with pytest.raises(UserError, match=message):
        main([*required, *(flag.replace("{text}", str(text)) for flag in flags)])


def test_a_hugging_face_tokenizer_is_not_overwritten(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a Hugging Face tokenizer \(tokenizer\.json\)"):
        main(["--input", str(text), "--out", str(tmp_path), "--vocab_size", "300"])
    assert (tmp_path / "tokenizer.json").exists()


def test_required_flags():
    with pytest.raises(UserError, match="--input"):
        main(["--out", "x"])
