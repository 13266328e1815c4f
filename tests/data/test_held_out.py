import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.data.held_out import HeldOut, read_held_out, split_documents
from jaxllm.data.sources import Document
from jaxllm.errors import UserError


class Texts:
    def __init__(self, *texts):
        self.texts = texts

    def documents(self):
        for i, text in enumerate(self.texts):
            yield Document(text, str(i), (i + 1) / len(self.texts))

    def identity(self):
        return list(self.texts)


def split(value, *texts):
    pieces = list(split_documents(Texts(*texts), read_held_out(value)))
    assert "".join(piece.text for piece in pieces) == "".join(texts)
    assert all(piece.text for piece in pieces)
    return [p.text for p in pieces if not p.held_out], [p.text for p in pieces if p.held_out]


def test_read_held_out():
    assert read_held_out("") == read_held_out("0") == HeldOut()
    assert read_held_out("0.25") == HeldOut("fraction", fraction=0.25)
    assert read_held_out("file:a.txt") == HeldOut("file", path="a.txt")
    assert read_held_out("第一百十五回") == HeldOut("marker", marker="第一百十五回")
    for bad in ("1", "-0.1", "17", "nan", "inf"):
        with pytest.raises(UserError, match="must be between 0 and 1"):
            read_held_out(bad)
    with pytest.raises(UserError, match="names no file"):
        read_held_out("file:")


@given(st.integers(1, 400), st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.9]))
def test_fraction_of_documents(count, fraction):
    texts = [f"document {i}" for i in range(count)]
    train, held_out = split(str(fraction), *texts)
    if count >= 1 / fraction:
        assert not set(train) & set(held_out) and len(train) + len(held_out) == count
        assert abs(len(held_out) - fraction * count) <= 1
        assert held_out


def test_fraction_of_documents_is_spread():
    texts = [f"document {i}" for i in range(1000)]
    _, held_out = split("0.1", *texts)
    places = [texts.index(text) % 10 for text in held_out]
    assert len(set(places)) > 5  # not every tenth


def test_few_documents_lose_their_tails():
    lines = "".join(f"line {i}\n" for i in range(100))
    train, held_out = split("0.05", lines, "y" * 100)
    assert train[0].endswith("\n") and held_out[0].startswith("line")
    assert 0.04 < len(held_out[0]) / len(lines) < 0.06
    assert (train[1], held_out[1]) == ("y" * 95, "y" * 5)  # no line to start from


def test_marker():
    assert split("<M>", "one", "two <M> rest <M>", "three") == (["one", "two "], ["<M> rest <M>", "three"])
    assert split("one", "one", "two") == ([], ["one", "two"])
    with pytest.raises(UserError, match="'<M>' is nowhere in the text"):
        split("<M>", "one", "two")


def test_only_a_document_cut_in_two_does_not_end():
    pieces = list(split_documents(Texts("one", "two <M> rest"), read_held_out("<M>")))
    assert [(piece.text, piece.ends) for piece in pieces] == [("one", True), ("two ", False), ("<M> rest", True)]


def test_last_six_chapters_of_sanguo(shared_file):
    text = shared_file("sanguoyanyi.txt").read_text(encoding="utf-8")
    train, held_out = split("第一百十五回", text)
    assert len(train) == len(held_out) == 1
    chapters = ["第一百十五回", "第一百十六回", "第一百十七回", "第一百十八回", "第一百十九回", "第一百二十回"]
    assert [chapter in held_out[0] for chapter in chapters] == [True] * 6
    assert not any(chapter in train[0] for chapter in chapters)
    assert "第一百十四回" in train[0] and "第一百十四回" not in held_out[0]
