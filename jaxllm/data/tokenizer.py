"""Text to token ids and back, exactly: newlines, runs of spaces and indentation survive.

`Tokenizer` is what the rest of the package knows. sentencepiece is behind it here, the `tokenizers` package in
`jaxllm.data.huggingface_tokenizer`; another backend implements the abstract methods and is opened in `load_tokenizer`.
"""

import abc
import codecs
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
from jaxtyping import Int

from jaxllm.data.chat_template import TEMPLATE_FILE, ChatTemplate, find_template
from jaxllm.data.tokenizer_files import FILES, JSON_FILE, MODEL_FILE
from jaxllm.errors import UserError
from jaxllm.remote.copy import local_copy

SPACE = "\u2581"  # how sentencepiece writes a space inside a piece
CHUNK = 1 << 16  # characters encoded at once; a longer text is cut at a line end
PROBE = "what an assistant says"  # to find in the text of a template
UNKNOWN = "\ufffd".encode()


class Encoded(NamedTuple):
    """The tokens of a text, and of which of its characters each is a part. A character may be in several tokens."""

    ids: list[int]
    starts: Int[np.ndarray, " tokens"]
    ends: Int[np.ndarray, " tokens"]  # exclusive


class Tokenizer(abc.ABC):
    """Token ids of texts. `bos_id`, `eos_id`, `pad_id`, `mask_id` are None where the tokenizer has no such token."""

    vocab_size: int  # the largest id and one
    bos_id: int | None  # what documents and prompts begin with; None where nothing is put in front of them
    eos_id: int | None  # what documents end with
    pad_id: int | None
    mask_id: int | None
    fingerprint: str  # hash of everything the ids depend on
    specials: Mapping[str, int]  # tokens that stand for no text of their own, by name: <s>, </s>, <|user|>, …
    chat_template: ChatTemplate | None = None
    puts_space: bool = False  # a text is encoded with a space in front, which decoding takes away

    @property
    def end_ids(self) -> frozenset[int]:
        """Every token that ends an answer: eos, and what the chat template writes after the assistant's words."""
        return frozenset({self.eos_id, self._end_of_turn_id} - {None})

    @abc.abstractmethod
    def with_template(self, source: str) -> "Tokenizer":
        """The same tokenizer with another chat template."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str], *, num_threads: int | None = None) -> list[list[int]]:
        """The ids of each text, special tokens never recognised in it; threads in C++, default one a core."""

    @abc.abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes a token stands for (a part of a character at worst); none for a special token."""

    @abc.abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tokenizer into `folder`, in place of one that is there; `load_tokenizer` opens it again."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of `text`, without bos or eos.

        With `special`, names of special tokens in the text become those tokens (for templates the program wrote
        itself); without, they are text like any other, so that no document can forge one.
        """
        if not special or not self.specials:
            return self.encode_batch([text], num_threads=1)[0]
        parts = self._special_pattern.split(text)
        ids = iter(self.encode_batch(parts[::2], num_threads=1))
        return [token for i, part in enumerate(parts) for token in (next(ids) if i % 2 == 0 else [self.specials[part]])]

    def encode_with_extents(
        self,
        texts: Sequence[str],
        cuts: Sequence[Sequence[int]],
        *,
        special: bool = False,
        num_threads: int | None = None,
    ) -> list[Encoded]:
        """The ids of each text as `encode` gives them, with their characters.

        Args:
          cuts: of each text, characters in front of which a token should begin. sentencepiece models that put no space
            in front of a text keep to it, so that what comes before has the tokens that it has alone; a tokenizer.json
            does not: its ids are those of transformers.

        Raises:
          UserError: a tokenizer that changes the text and does not say how.
        """
        parts = [list(self._parts(text, special, at)) for text, at in zip(texts, cuts, strict=True)]
        plain = [part for row in parts for part, is_special in row if not is_special]
        ids = iter(self.encode_batch(plain, num_threads=num_threads))
        return [self._with_extents(row, ids) for row in parts]

    def _parts(self, text: str, special: bool, cuts: Sequence[int]) -> Iterator[tuple[str, bool]]:
        """(text to encode, False) and (name of a special token, True), in their order."""
        at = 0
        for i, part in enumerate(self._special_pattern.split(text) if special and self.specials else [text]):
            inside = () if self.puts_space else [cut - at for cut in cuts if at < cut < at + len(part)]
            bounds = [0, len(part)] if i % 2 else [0, *inside, len(part)]
            yield from ((part[a:b], i % 2 == 1) for a, b in itertools.pairwise(bounds))
            at += len(part)

    def _with_extents(self, parts: Sequence[tuple[str, bool]], ids: Iterator[list[int]]) -> Encoded:
        tokens: list[int] = []
        extents, at = [np.zeros((2, 0), np.int64)], 0
        for part, is_special in parts:
            new = [self.specials[part]] if is_special else next(ids)
            extents.append(at + (np.array([[0], [len(part)]]) if is_special else self._extents(part, new)))
            tokens += new
            at += len(part)
        return Encoded(tokens, *np.concatenate(extents, axis=1))

    def _extents(self, text: str, ids: Sequence[int]) -> Int[np.ndarray, "2 tokens"]:
        """Where the characters of each token start and end in `text`, by the bytes that tokens stand for."""
        pieces = [self.token_bytes(token) for token in ids]
        if self.puts_space and pieces and pieces[0].startswith(b" "):
            pieces[0] = pieces[0][1:]
        data = text.encode()
        if b"".join(pieces) != data:
            raise UserError(
                "this sentencepiece model changes the text, so that its tokens cannot be told from each other by "
                f"characters. Use the tokenizer's {JSON_FILE}."
            )
        sizes = np.array([len(piece) for piece in pieces], np.int64)
        end = np.cumsum(sizes)
        start = end - sizes
        # The character that each byte belongs to; a byte 10xxxxxx goes on with the one before.
        character = np.cumsum((np.frombuffer(data, np.uint8) & 0xC0) != 0x80) - 1
        after = np.append(character, len(text))
        return np.stack([after[start], np.where(end > start, after[end - 1] + 1, after[start])])

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        text = b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.puts_space else text

    def stream(self) -> "TextStream":
        """Decodes tokens one by one, as they are generated."""
        return TextStream(self)

    @functools.cached_property
    def _end_of_turn_id(self) -> int | None:
        """The special token that the chat template writes after the assistant's words, if it does."""
        if self.chat_template is None:
            return None
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
        try:
            text = self.chat_template.render(talk, add_generation_prompt=False).text
        except UserError:  # a template for conversations of another kind
            return None
        found = self._special_pattern.match(text.rpartition(PROBE)[2].lstrip()) if PROBE in text else None
        return found and self.specials.get(found[0])

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        names = sorted(self.specials, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, names)) + ")")


class TextStream:
    """Decodes a growing sequence; a character whose bytes come in several tokens is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come; often empty inside a character."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The rest: U+FFFD where the sequence ended inside a character. The stream then starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, as trained by `jaxllm.data.tokenizer_training` or by anyone else.

    A foreign model may change the text (NFKC, a space in front); then decoding gives the changed text.
    """

    def __init__(self, model: bytes, template: str | None = None):
        """`model`: the content of a .model file; `template`: that of a chat_template.jinja beside it."""
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._model, self._processor = model, processor
        self.vocab_size = processor.vocab_size()
        self.bos_id = _given(processor.bos_id())
        self.eos_id = _given(processor.eos_id())
        self.pad_id = _given(processor.pad_id())
        self.fingerprint = hashlib.sha256(model).hexdigest()
        controls = [i for i in range(self.vocab_size) if processor.is_control(i)]
        self.specials = {processor.id_to_piece(i): i for i in controls}
        self.mask_id = self.specials.get("<mask>", self.specials.get("[MASK]"))
        if template is not None:
            ends = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
            names = {key: processor.id_to_piece(i) for key, i in ends.items() if i is not None}
            self.chat_template = ChatTemplate(template, names)
        self._bytes = [_piece_bytes(processor, i) for i in range(self.vocab_size)]
        # A model that puts a space in front of every text (Llama 2) must be given whole texts.
        self.puts_space = processor.id_to_piece(processor.encode("a")[0]).startswith(SPACE)
        self._space = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        if any(processor.is_unknown(i) for i in self._space):
            self._space = []

    def encode_batch(self, texts: Sequence[str], *, num_threads: int | None = None) -> list[list[int]]:
        chunks = [list(self._chunks(text)) for text in texts]
        flat = iter(self._processor.encode([c for parts in chunks for c in parts], num_threads=num_threads or -1))
        return [_join((next(flat) for _ in parts), parts, self._space) for parts in chunks]

    def _chunks(self, text: str) -> Iterator[str]:
        """Pieces of `text` to encode one by one. A literal U+2581, which sentencepiece takes for a space, is one."""
        if self.puts_space:
            yield text
            return
        for part in re.split(f"({SPACE})", text) if self._space and SPACE in text else [text]:
            start = 0
            while len(part) - start > CHUNK:
                cut = part.rfind("\n", start, start + CHUNK) + 1 or start + CHUNK
                yield part[start:cut]
                start = cut
            yield part[start:]

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def with_template(self, source: str) -> "SentencePieceTokenizer":
        return SentencePieceTokenizer(self._model, source)

    def save(self, folder: str | os.PathLike[str]) -> None:
        template = {TEMPLATE_FILE: self.chat_template.source.encode()} if self.chat_template else {}
        write_files(folder, {MODEL_FILE: self._model, **template})


def _given(token: int) -> int | None:
    return token if token >= 0 else None


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, token: int) -> bytes:
    piece = processor.id_to_piece(token)
    if processor.is_control(token):
        return b""
    if processor.is_unknown(token):
        return UNKNOWN
    return bytes([int(piece[3:5], 16)]) if processor.is_byte(token) else piece.replace(SPACE, " ").encode()


def _join(ids: Iterable[list[int]], parts: Sequence[str], space: list[int]) -> list[int]:
    joined: list[int] = []
    for part, part_ids in zip(parts, ids, strict=True):
        joined += space if space and part == SPACE else part_ids
    return joined


def write_files(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Writes a tokenizer's files into `folder`. Those of one that was there go: what it had more would be read, too."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if name not in files:
            (path / name).unlink(missing_ok=True)
    for name, content in files.items():
        partial = path / f".{name}.{os.getpid()}"
        partial.write_bytes(content)
        partial.replace(path / name)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Opens a Hugging Face `tokenizer.json` with what its folder says about it, or a sentencepiece `.model` file.

    Of a folder that holds both, `tokenizer.json` is taken: it is what an imported model was trained with. In a bucket,
    too.

    Raises:
      UserError: nothing there, a folder with none or several models, or a file that is broken or something else.
    """
    file = local_copy(path).expanduser()
    if file.is_dir():
        named = [file / name for name in (JSON_FILE, MODEL_FILE) if (file / name).exists()]
        models = named[:1] or sorted(file.glob("*.model"))
        if len(models) != 1:
            found = ", ".join(m.name for m in models) or "none"
            raise UserError(
                f"{path}: a tokenizer folder holds {JSON_FILE} or one sentencepiece .model file; found {found}."
            )
        file = models[0]
    if not file.exists():
        raise UserError(
            f"{path}: no such tokenizer. Give a folder with {JSON_FILE}, a sentencepiece .model file, or bpe:N."
        )
    if not file.is_file():  # to open a pipe would be to wait for somebody who writes into it
        raise UserError(f"{file} is no file. Give a folder with {JSON_FILE}, or a sentencepiece .model file.")
    if file.suffix == ".json":
        from jaxllm.data.huggingface_tokenizer import open_huggingface_tokenizer  # imports this module

        return open_huggingface_tokenizer(file)
    try:
        template = file.parent / TEMPLATE_FILE
        source = find_template(template.read_bytes() if template.is_file() else None, {}, file.parent)
        return SentencePieceTokenizer(file.read_bytes(), source)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{file} is not a sentencepiece model, or is broken.") from error
