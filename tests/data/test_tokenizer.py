import io
import random
import re

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.tokenizer import CHUNK, SentencePieceTokenizer, load_tokenizer
from jaxllm.data.tokenizer_training import parse_tokenizer, sample_passages, train_tokenizer
from jaxllm.errors import UserError

TEXTS = [
    "",
    " ",
    "   leading, and  double  spaces ",
    "\n\n\n",
    "def f(x):\n    if x:\n\t\treturn  x\r\n\n",
    "　　却说曹操引兵\n",
    "a\u2581b\u2581\u2581 c",  # the mark sentencepiece writes for a space
    "\u2585\ufffd\x00\x7f\ufeff",
    "<s></s><pad><unk><|user|><0x0A>",
    "😀 龘 ภาษาไทย",
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_round_trip_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {tokenizer.pad_id, 1, tokenizer.bos_id, tokenizer.eos_id, *tokenizer.specials.values()}


def test_unigram_round_trip():
    unigram = train_tokenizer(["".join(TEXTS[:6]) * 20], kind="unigram", vocab_size=300)
    for text in TEXTS:
        assert unigram.decode(unigram.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 399), max_size=30))
def test_stream_prints_what_decode_gives(tokenizer, tokens):
    stream = tokenizer.stream()
    assert "".join(map(stream.push, tokens)) + stream.flush() == tokenizer.decode(tokens)


def test_stream_holds_back_unfinished_characters(tokenizer):
    tokens = tokenizer.encode("😀")
    assert len(tokens) == 4  # one token a byte
    stream = tokenizer.stream()
    assert [stream.push(token) for token in tokens] == ["", "", "", "😀"]
    assert [stream.push(token) for token in tokens[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"
    assert stream.push(tokenizer.encode("a")[0]) == "a"


def test_special_tokens(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 2, 3)
    assert tokenizer.specials == {"<pad>": 0, "<s>": 2, "</s>": 3, "<|user|>": 4, "<|end|>": 5}
    written = "<|user|>曹操<|end|></s>"
    assert tokenizer.encode(written, special=True) == [4, *tokenizer.encode("曹操"), 5, 3]
    assert tokenizer.decode(tokenizer.encode(written, special=True)) == "曹操"
    assert 4 not in tokenizer.encode(written)


def test_mask_and_end_tokens(tokenizer):
    assert (tokenizer.mask_id, tokenizer.end_ids) == (None, {3})
    masked = train_tokenizer(["".join(TEXTS[:6]) * 20], vocab_size=300, specials=["<|x|>", "[MASK]"])
    assert masked.mask_id == masked.specials["[MASK]"] == 5


def test_batches_and_long_texts_equal_single_texts(tokenizer):
    assert tokenizer.encode_batch(TEXTS, num_threads=2) == [tokenizer.encode(text) for text in TEXTS]
    long = "却说曹操 the dog\n" * (CHUNK // 8) + "x" * (2 * CHUNK)
    assert tokenizer.decode(tokenizer.encode(long)) == long


def test_training_is_deterministic():
    texts = ["the lazy dog 却说曹操\n" * 30, "brown fox\n" * 30]
    for kind in ("bpe", "unigram"):
        first, second = (train_tokenizer(texts, kind=kind, vocab_size=284) for _ in range(2))
        assert first.fingerprint == second.fingerprint


def test_newlines_are_learned(tokenizer):
    assert any(b"\n" in tokenizer.token_bytes(i) and len(tokenizer.token_bytes(i)) > 1 for i in range(400))


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer", tmp_path / "tokenizer" / "tokenizer.model"):
        loaded = load_tokenizer(path)
        assert (loaded.fingerprint, loaded.vocab_size) == (tokenizer.fingerprint, 400)
    assert [p.name for p in (tmp_path / "tokenizer").iterdir()] == ["tokenizer.model"]


def test_foreign_model_that_puts_a_space_in_front():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the lazy dog", "the quick dog"] * 10),
        model_writer=model,
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    foreign = SentencePieceTokenizer(model.getvalue())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert foreign.encode("the dog") == theirs.encode("the dog")
    assert foreign.decode(foreign.encode("the dog")) == "the dog"
    assert foreign.pad_id is None


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_too_large_names_the_largest(kind):
    texts = ["hello world, how are you?\n" * 5]
    with pytest.raises(UserError, match=f"{kind} tokenizer of 5000 pieces needs more text.*at most") as error:
        train_tokenizer(texts, kind=kind, vocab_size=5000)
    largest = int(re.search(r"at most (\d+)", str(error.value))[1])
    assert train_tokenizer(texts, kind=kind, vocab_size=largest).vocab_size == largest


def test_too_small_names_the_smallest():
    with pytest.raises(UserError, match="too small") as error:
        train_tokenizer(["abc def\n" * 9], vocab_size=10)
    smallest = int(re.search(r"need (\d+)", str(error.value))[1])
    assert train_tokenizer(["abc def\n" * 9], vocab_size=smallest).vocab_size == smallest


def test_training_mistakes():
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(["", " \n"])
    with pytest.raises(UserError, match="Did you mean 'bpe'"):
        train_tokenizer(["abc"], kind="bpee")
    with pytest.raises(UserError, match="distinct"):
        train_tokenizer(["abc"], specials=["<s>"])


def test_sample_is_bounded_and_spread():
    texts = [f"{i:05d}\n" * 150 for i in range(500)]
    passages = sample_passages(texts, 50_000)
    assert 50_000 <= sum(map(len, passages)) < 52_000
    assert passages == sample_passages(texts, 50_000)
    kept = {int(re.search(r"\d{5}", passage)[0]) for passage in passages}
    assert min(kept) < 100 and max(kept) > 400
    assert "".join(sample_passages(texts)) == "".join(texts)


def test_parse_tokenizer():
    assert parse_tokenizer("unigram:500") == ("unigram", 500)
    assert parse_tokenizer("runs/a:b/tokenizer.model") is None
    for bad, message in (("bep:10", "Did you mean 'bpe'"), ("bpe:many", "'many' is not a number"), ("bpe:0", "number")):
        with pytest.raises(UserError, match=message):
            parse_tokenizer(bad)


def test_load_mistakes(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "nothing.model")
    with pytest.raises(UserError, match="found none"):
        load_tokenizer(tmp_path)
    for content in (b"", b"not a model", random.Random(0).randbytes(3000)):
        (tmp_path / "broken.model").write_bytes(content)
        with pytest.raises(UserError, match="not a sentencepiece model"):
            load_tokenizer(tmp_path / "broken.model")


def test_truncated_model(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    model = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model[: len(model) // 2])
    with pytest.raises(UserError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)
