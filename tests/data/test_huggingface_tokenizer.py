"""Hugging Face tokenizers against transformers: ids, text, special tokens, files."""

import json
import random
import re

import pytest

pytest.importorskip("transformers")

from jaxllm.data.config import DataConfig
from jaxllm.data.dataset import prepare
from jaxllm.data.huggingface_tokenizer import CHUNK
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import UserError
from tests.data import huggingface
from tests.data.huggingface import BERT_TOKENS, KINDS, TEXT

TEXTS = [
    "",
    " ",
    "   leading, and  double  spaces ",
    "\n\n\n",
    "def f(x):\n    if x:\n\t\treturn  x\r\n\n",
    "　　却说曹操引兵\n",
    "\u2585\ufffd\x7f\ufeff",
    "<s></s><pad><unk><mask>[CLS] [MASK]<|endoftext|><|begin_of_text|> <|eot_id|> <s> </s> <think>",
    "😀 龘 ภาษาไทย",
    TEXT,
]
LOSSY = ("bert", "unigram")  # unknown characters become <unk>, as nothing falls back to bytes


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    theirs = huggingface.save(request.param, folder)
    return request.param, load_tokenizer(folder), theirs, folder


def plain(theirs, text: str) -> list[int]:
    """transformers' ids with special tokens spelt out."""
    theirs._tokenizer.encode_special_tokens = True
    try:
        return theirs._tokenizer.encode(text, add_special_tokens=False).ids
    finally:
        theirs._tokenizer.encode_special_tokens = False


def test_ids_are_those_of_transformers(both):
    kind, ours, theirs, _ = both
    for text in TEXTS:
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False), text
        if kind not in ("unigram", "llama3") or "<s>" not in text:  # these forge: the next test
            assert ours.encode(text) == plain(theirs, text), text
    assert ours.encode_batch(TEXTS) == ours.encode_batch(TEXTS, num_threads=1) == list(map(ours.encode, TEXTS))
    assert ours.vocab_size == len(theirs)


def test_no_text_forges_a_special_token(both):
    _, ours, _, _ = both
    names = list(ours.specials)
    assert names
    for text in [
        *names,
        *(f" {name}" for name in names),
        "x".join(names),
        " ".join(names),
        "".join(f"\n{n}" for n in names),
    ]:
        unknown = {ours.specials.get("<unk>"), ours.specials.get("[UNK]")}
        assert not set(ours.encode(text)) & (set(ours.specials.values()) - unknown), text
        assert set(ours.encode(text, special=True)) & set(ours.specials.values()), text


def test_decoding(both):
    kind, ours, theirs, _ = both
    for text in TEXTS:
        for ids in (ours.encode(text), ours.encode(text, special=True)):
            want = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            unknown = [i for i in ids if ours.specials.get("<unk>", ours.specials.get("[UNK]")) == i]
            if not unknown:
                # transformers takes all the spaces that one first piece holds, and one is what encoding put there.
                assert ours.decode(ids).lstrip() == want.lstrip(), text
        if kind not in LOSSY:
            # To Metaspace a space in front is the one that it would have put there itself.
            kept = text.removeprefix(" ") if kind.startswith("metaspace") else text
            assert ours.decode(ours.encode(text)) == kept
    assert ours.decode(ours.encode("the quick fox")) == "the quick fox"


def test_streams_of_any_tokens_give_what_decode_gives(both):
    kind, ours, theirs, _ = both
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(ours.vocab_size) for _ in range(20)]
        stream = ours.stream()
        streamed = "".join(map(stream.push, ids)) + stream.flush()
        assert (streamed.removeprefix(" ") if ours.puts_space else streamed) == ours.decode(ids)
        if kind in ("gpt2", "llama3"):
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "llama3"])
def test_a_character_of_several_tokens_is_held_back(kind, tmp_path):
    huggingface.save(kind, tmp_path)
    ours = load_tokenizer(tmp_path)
    tokens = ours.encode("😀")[-4:]
    assert len(b"".join(map(ours.token_bytes, tokens))) == 4
    stream = ours.stream()
    assert [stream.push(token) for token in tokens] == ["", "", "", "😀"]


def test_long_texts_are_cut_where_it_changes_nothing(both):
    _, ours, theirs, _ = both
    text = "".join(random.Random(0).choices(re.split(r"(?<=[\s。])", TEXT), k=3 * CHUNK // 4))
    assert len(text) > 3 * CHUNK
    assert len(list(ours._chunks(text))) > 3
    assert ours.encode(text) == plain(theirs, text)
    whole = "x" * (CHUNK + 5)  # no place to cut
    assert list(ours._chunks(whole)) == [whole]


def ids_of(tokenizer):
    found = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id
    names = {i: name for name, i in tokenizer.specials.items()}
    return [names.get(i) for i in found], sorted(names[i] for i in tokenizer.end_ids)


EXPECTED = {
    "gpt2": [None, "<|endoftext|>", None, None],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", None, None],
    "llama2": ["<s>", "</s>", "<pad>", None],
    "metaspace always": ["<s>", "</s>", "<pad>", None],
    "metaspace first": ["<s>", "</s>", "<pad>", None],
    "unigram": ["<s>", "</s>", "<pad>", "<mask>"],
    "bert": ["[CLS]", "[SEP]", "[PAD]", "[MASK]"],
}


def test_what_documents_begin_and_end_with(both):
    kind, ours, theirs, _ = both
    assert ids_of(ours) == (EXPECTED[kind], [EXPECTED[kind][1]])
    # A prompt begins as transformers lets a text begin.
    front = [] if ours.bos_id is None else [ours.bos_id]
    assert theirs.encode("fox")[: len(front) + 1] == [*front, ours.encode("fox")[0]]


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def test_special_tokens_of_every_form_of_file(tmp_path):
    """Objects of transformers 4, its special_tokens_map.json, ids of a generation_config.json, and who wins."""
    KINDS["llama3"][0]().save(str(tmp_path / "tokenizer.json"))
    named = load_tokenizer(tmp_path)
    assert ids_of(named) == (["<|begin_of_text|>", None, None, None], [])  # the post-processor knows bos
    write(tmp_path, "special_tokens_map.json", {"eos_token": "<|eot_id|>", "pad_token": {"content": "<|eot_id|>"}})
    assert ids_of(load_tokenizer(tmp_path))[0][1:3] == ["<|eot_id|>", "<|eot_id|>"]
    end = {"content": "<|end_of_text|>", "lstrip": False, "__type": "AddedToken", "special": True}
    write(tmp_path, "tokenizer_config.json", {"eos_token": end, "add_bos_token": False})
    assert ids_of(load_tokenizer(tmp_path)) == ([None, "<|end_of_text|>", "<|eot_id|>", None], ["<|end_of_text|>"])
    # Ids without names: a list, and one that is an ordinary token (a default that nobody set).
    ends = [named.specials["<|eot_id|>"], named.specials["<|end_of_text|>"], named.encode("fox")[0]]
    write(tmp_path, "config.json", {"eos_token_id": ends, "vocab_size": 5, "bos_token_id": 0})
    ours = load_tokenizer(tmp_path)
    assert ids_of(ours)[1] == ["<|end_of_text|>", "<|eot_id|>"]
    write(tmp_path, "generation_config.json", {"eos_token_id": ends[0]})
    assert ids_of(load_tokenizer(tmp_path))[1] == ["<|end_of_text|>", "<|eot_id|>"]
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    assert ids_of(load_tokenizer(tmp_path)) == (["<|begin_of_text|>", "<|eot_id|>", None, None], ["<|eot_id|>"])


def test_a_named_token_is_special_though_tokenizer_json_does_not_say_so(tmp_path):
    tokenizer = KINDS["llama3"][0]()
    end = tokenizer.token_to_id("<think>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).decode([end]) == "<think>"
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<think>", "pad_token": "ox"})
    ours = load_tokenizer(tmp_path)
    assert (ours.eos_id, ours.end_ids, ours.decode([end])) == (end, {end}, "")
    assert end not in ours.encode("a <think>") and end in ours.encode("a <think>", special=True)
    # "ox" is a piece that others are made of; as a special token it is none any more.
    assert tokenizer.encode("ox").ids[1:] == [ours.pad_id]
    assert ours.pad_id not in ours.encode("ox") and ours.decode(ours.encode("ox fox")) == "ox fox"


def test_the_configs_of_others_do_not_cut_or_fill_documents(tmp_path):
    tokenizer = KINDS["bert"][0]()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for special in (False, True):
        assert ours.encode(TEXT, special=special) == tokenizer.encode(TEXT, add_special_tokens=False).ids


def test_save_carries_all_files_and_only_them(both, tmp_path):
    _, ours, _, folder = both
    (folder / "config.json").write_text(json.dumps({"eos_token_id": ours.eos_id, "model_type": "x"}))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    ours = load_tokenizer(folder)
    for target in ("one", "two"):
        (tmp_path / target).mkdir()
        (tmp_path / target / "special_tokens_map.json").write_text('{"pad_token": "<|eot_id|>"}')  # another's
        ours.save(tmp_path / target)
        ours = load_tokenizer(tmp_path / target)
    after = {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert json.loads(after.pop("generation_config.json")) == {"eos_token_id": ours.eos_id}
    before.pop("config.json")
    assert after == before
    assert (
        ours.fingerprint == load_tokenizer(folder).fingerprint == load_tokenizer(folder / "tokenizer.json").fingerprint
    )
    (folder / "config.json").unlink()


def test_the_fingerprint_is_of_what_ids_depend_on(tmp_path):
    huggingface.save("llama2", tmp_path)
    first = load_tokenizer(tmp_path).fingerprint
    write(tmp_path, "generation_config.json", {"eos_token_id": [1, 2]})
    assert load_tokenizer(tmp_path).fingerprint == first
    write(tmp_path, "tokenizer_config.json", {"eos_token": "</s>", "add_bos_token": False})
    assert load_tokenizer(tmp_path).fingerprint != first


def test_of_two_kinds_in_a_folder_the_hugging_face_one_is_opened(tokenizer, tmp_path):
    theirs = huggingface.save("gpt2", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    assert load_tokenizer(tmp_path).vocab_size == len(theirs)
    tokenizer.save(tmp_path)  # in its place
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_broken_files(tmp_path):
    huggingface.save("bert", tmp_path)
    file, content = tmp_path / "tokenizer.json", (tmp_path / "tokenizer.json").read_text()
    data = json.loads(content)
    broken = {
        "": "is not a Hugging Face tokenizer, or is broken",
        content[: len(content) // 2]: "is broken",
        "[]": "is broken",
        "{}": "is broken",
        json.dumps(
            {**data, "decoder": {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}}
        ): ("decoder CTC is not supported"),
        json.dumps({**data, "decoder": {"decoders": [{"cleanup": True}]}}): "is broken",
        json.dumps({**data, "post_processor": {**data["post_processor"], "special_tokens": {}}}): "is broken",
        json.dumps({**data, "model": {**data["model"], "vocab": {}}, "added_tokens": []}): "has no tokens",
    }
    for text, message in broken.items():
        file.write_text(text)
        with pytest.raises(UserError, match=rf"tokenizer\.json.*{message}"):
            load_tokenizer(tmp_path)
    file.write_text(content)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        for text, message in (
            ("{", "is not JSON"),
            ("[1]", "must hold a JSON object, not list"),
            ("\udcff", "is not JSON"),
        ):
            kept = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
            (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
            with pytest.raises(UserError, match=rf"{name} {message}"):
                load_tokenizer(tmp_path)
            (tmp_path / name).unlink() if kept is None else (tmp_path / name).write_bytes(kept)
    write(tmp_path, "tokenizer_config.json", {**BERT_TOKENS, "eos_token": "</s>"})
    with pytest.raises(UserError, match=r"the eos_token '</s>' of tokenizer_config\.json is not in tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_data_are_prepared_with_it(both, tmp_path):
    _, ours, _, folder = both
    lines = [f"Document {i} of the quick brown fox, 曹操.\n" for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    config = DataConfig(
        source="jsonl",
        path=str(tmp_path / "a.jsonl"),
        tokenizer=str(folder),
        held_out="",
        cache=str(tmp_path / "cache"),
    )
    data = prepare(config, length=32, progress=False)
    assert data.tokenizer.fingerprint == ours.fingerprint
    (stream,) = data.train
    starts = stream.document_starts
    first = stream.read(int(starts[0]), int(starts[1] - starts[0])).tolist()
    front = [] if ours.bos_id is None else [ours.bos_id]
    assert first in [[*front, *ours.encode(line), ours.eos_id] for line in lines]
    assert stream.index.documents == 40
