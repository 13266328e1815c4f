"""The text of a row: characters of several tokens, and stop texts across tokens."""

import codecs

import pytest

from jaxllm.generate.stream import RowText


class Bytes:
    """A tokenizer whose tokens are bytes; only what RowText asks of a tokenizer."""

    def stream(self):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        class Stream:
            push = staticmethod(lambda token: decoder.decode(bytes([token])))
            flush = staticmethod(lambda: decoder.decode(b"", final=True))

        return Stream()


def written(text: str, stops: list[str]) -> tuple[list[str], RowText]:
    row, shown = RowText(Bytes(), stops), []
    for token in text.encode():
        shown.append(row.push(token))
        if row.stopped:
            break
    shown.append(row.finish())
    return shown, row


def test_characters_come_whole():
    shown, row = written("曹操 said", [])
    assert [part for part in shown if part] == ["曹", "操", " ", "s", "a", "i", "d"]
    assert row.text == "曹操 said"


@pytest.mark.parametrize(
    ("text", "stops", "expected", "stopped"),
    [
        ("one\nUser: two", ["\nUser:"], "one", True),
        ("one\nUse it", ["\nUser:"], "one\nUse it", False),
        ("aaab", ["aab"], "a", True),
        ("a\n\nUser:", ["\nUser:"], "a\n", True),
        ("却说曹操。却说", ["。"], "却说曹操", True),
        ("abc", ["c", "bc"], "a", True),
        ("ab\n", ["\nUser:"], "ab\n", False),
        ("abc", [""], "abc", False),
    ],
)
def test_stop_texts(text, stops, expected, stopped):
    shown, row = written(text, stops)
    assert "".join(shown) == row.text == expected
    assert row.stopped == stopped


def test_what_may_begin_a_stop_text_is_not_shown_yet():
    shown, _ = written("x\nUs y", ["\nUser:"])
    assert shown == ["x", "", "", "", "\nUs ", "y", ""]
