"""A Hugging Face tokenizer: the tokenizer.json that an imported model was trained with, and the files around it.

The `tokenizers` package runs it. Nothing of the folder is executed, and no pickle is opened.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from jaxllm.data.chat_template import TEMPLATE_FILE, ChatTemplate, find_template
from jaxllm.data.token_bytes import bytes_of_tokens
from jaxllm.data.tokenizer import Encoded, Tokenizer, write_files
from jaxllm.data.tokenizer_files import CARRIED, CONFIG_FILE, FILES, GENERATION_FILE, JSON_FILE, TOKEN_IDS
from jaxllm.errors import UserError

# Said aloud, so that the package does not warn of every fork; no forked child tokenises here.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # "bos_token" and so on in the JSON files
CHUNK = 1 << 16  # characters encoded at once: the package keeps over 100 bytes a character until it is done
GROUP = 1 << 22  # characters of the chunks encoded together, for the same reason
REACH = 128  # characters on each side of a cut that show whether it is harmless
TRIES = 64  # places for a cut, at ends of words and lines
CUT = re.compile(r"(?:\b|(?<=\n))(?!\Z)")


def open_huggingface_tokenizer(file: Path) -> "HuggingFaceTokenizer":
    """Opens `file`, a tokenizer.json, with what the other files of its folder say about it.

    Raises:
      UserError: a file that is broken, or of a kind whose tokens cannot be turned into bytes.
    """
    try:
        files = {name: path.read_bytes() for name in (*FILES, *CARRIED) if (path := file.parent / name).is_file()}
        files[JSON_FILE] = file.read_bytes()
        model_config = file.parent / "config.json"
        if GENERATION_FILE not in files and model_config.is_file():
            # config.json is the model's and stays behind; its special tokens come along where transformers has them.
            config = _json({"config.json": model_config.read_bytes()}, "config.json", file.parent)
            if ids := {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}:
                files[GENERATION_FILE] = json.dumps(ids).encode()
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}.") from error
    return HuggingFaceTokenizer(files, file)


class HuggingFaceTokenizer(Tokenizer):
    """Byte-level BPE (GPT-2, Llama 3, Qwen), BPE with byte fallback (Llama 2, Mistral), unigram, WordPiece (BERT).

    The ids are those of transformers. WordPiece is lossy: decoding writes a space before each word, and what encoding
    took away (capitals, accents, runs of spaces, unknown characters) stays away. So do a space in front of a whole text
    where Metaspace puts one there anyhow, and, where U+2581 stands for spaces, that character itself.

    bos is put in front of a document where `add_bos_token` says so or, where it says nothing, where the file's own
    post-processor does: Llama has one, GPT-2 has none, BERT's is [CLS] (and its eos [SEP]).
    """

    def __init__(self, files: Mapping[str, bytes], file: Path = Path(JSON_FILE)):
        """`files`: contents by name, tokenizer.json among them; `file`: where that was read, for messages."""
        self._files, self._file = dict(files), file
        folder = file.parent
        config = _json(files, CONFIG_FILE, folder)
        generation = _json(files, GENERATION_FILE, folder)
        names = _token_names(config, _json(files, "special_tokens_map.json", folder))
        self._templated = templated = _build(files[JSON_FILE], file)  # takes special tokens in a text for what they are
        vocabulary = templated.get_vocab(with_added_tokens=True)
        if (end := names.get("eos")) is not None and end not in vocabulary:
            raise UserError(f"{folder}: the eos_token {end!r} of {CONFIG_FILE} is not in {file.name}.")
        templated.add_special_tokens([name for name in names.values() if name in vocabulary])
        added = templated.get_added_tokens_decoder()
        special = {i: token for i, token in sorted(added.items()) if token.special or token.content in names.values()}
        self.specials = {token.content: i for i, token in special.items()}
        self.vocab_size = max(vocabulary.values()) + 1
        named = {key: vocabulary[name] for key, name in names.items() if name in vocabulary}
        self._read_ids(config, generation, named, _put_around(templated, file))
        content = json.loads(files[JSON_FILE])
        texts = {i: "" if i in special else token.content for i, token in added.items()}
        self._bytes, self.puts_space = bytes_of_tokens(content.get("decoder"), vocabulary, texts, file)
        self._plain = _without_specials(content, self.specials, file)
        if source := find_template(files.get(TEMPLATE_FILE), config, folder):
            variables = {f"{key}_token": name for key, name in names.items()}
            self.chat_template = ChatTemplate(source, variables, f"the chat template of {folder}")
        identity = json.dumps([self.bos_id, self.eos_id, self.pad_id, self.mask_id]).encode()
        self.fingerprint = hashlib.sha256(files[JSON_FILE] + identity).hexdigest()

    def _read_ids(
        self,
        config: dict[str, Any],
        generation: dict[str, Any],
        named: dict[str, int],
        around: tuple[int | None, int | None],
    ) -> None:
        """bos, eos, pad, mask and end ids.

        `named` are those of tokenizer_config.json, `generation` knows ids only, `around` are the post-processor's.
        """
        in_front, behind = around
        special = set(self.specials.values())

        def generated(key: str) -> list[int]:
            ids = generation.get(f"{key}_token_id")
            # An id of an ordinary token is a default of the model's class that nobody set.
            return [i for i in (ids if isinstance(ids, list) else [ids]) if i in special]

        def first(*keys: str, default: int | None = None) -> int | None:
            ids = [named[key] for key in keys if key in named]
            return next(iter([*ids, *generated(keys[0])]), default)

        adds = config.get("add_bos_token")
        bos = first("bos", "cls", default=in_front)
        self.bos_id = in_front if not isinstance(adds, bool) else bos if adds else None
        self.eos_id = first("eos", "sep", default=behind)
        self.pad_id = first("pad")
        self.mask_id = first("mask")
        self._generated_end_ids = frozenset(generated("eos"))

    @property
    def end_ids(self) -> frozenset[int]:
        return self._generated_end_ids | super().end_ids

    def encode_batch(self, texts: Sequence[str], *, num_threads: int | None = None) -> list[list[int]]:
        """The ids of each text; with `num_threads` other than 1 in as many threads as the package takes (all cores)."""
        chunks = [list(self._chunks(text)) for text in texts]
        flat = self._encode_chunks([chunk for parts in chunks for chunk in parts], num_threads)
        return [list(itertools.chain.from_iterable(itertools.islice(flat, len(parts)))) for parts in chunks]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self._templated.encode(text, add_special_tokens=False).ids if special else super().encode(text)

    def _encode_chunks(self, chunks: list[str], num_threads: int | None) -> Iterator[list[int]]:
        ends = itertools.accumulate(map(len, chunks))
        for _, numbered in itertools.groupby(zip(ends, chunks, strict=True), lambda pair: pair[0] // GROUP):
            group = [chunk for _, chunk in numbered]
            if num_threads == 1:
                yield from map(self._ids, group)
            else:
                yield from (made.ids for made in self._plain.encode_batch_fast(group, add_special_tokens=False))

    def _ids(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def _chunks(self, text: str) -> Iterator[str]:
        """Parts of `text` whose ids are, one after the other, those of the whole."""
        start = 0
        for end in range(CHUNK, len(text), CHUNK):
            if found := self._cut(text, end):
                at, start_of_next = found
                yield text[start:at]
                start = start_of_next
        yield text[start:]

    def _cut(self, text: str, end: int) -> tuple[int, int] | None:
        """Where, near `end`, one part may stop and the next begin; None where each place tried changes the ids.

        Tokens depend on what is near by, and how is different in every tokenizer: so it is tried on the text around.
        """
        for match in itertools.islice(CUT.finditer(text, end, end + CHUNK // 2), TRIES):
            at = match.start()
            left, right = text[at - REACH : at], text[at : at + REACH]
            whole = self._ids(left + right)
            if self._ids(left) + self._ids(right) == whole:
                return at, at
            # Llama 2 puts a space in front of every part.
            if right.startswith(" ") and self._ids(left) + self._ids(right[1:]) == whole:
                return at, at + 1
        return None

    def encode_with_extents(
        self,
        texts: Sequence[str],
        cuts: Sequence[Sequence[int]],
        *,
        special: bool = False,
        num_threads: int | None = None,
    ) -> list[Encoded]:
        model = self._templated if special else self._plain
        made = []
        for encoding in model.encode_batch(list(texts), add_special_tokens=False):
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            made.append(Encoded(encoding.ids, offsets[:, 0], offsets[:, 1]))
        return made

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def with_template(self, source: str) -> "HuggingFaceTokenizer":
        other = HuggingFaceTokenizer({**self._files, TEMPLATE_FILE: source.encode()}, self._file)
        other.chat_template = ChatTemplate(source, other.chat_template.variables)  # not that of the folder
        return other

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes all files of the tokenizer unchanged, chat template included."""
        write_files(folder, self._files)


def _json(files: Mapping[str, bytes], name: str, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / name} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{folder / name} must hold a JSON object, not {type(content).__name__}.")
    return content


def _token_names(*configs: dict[str, Any]) -> dict[str, str]:
    """{"eos": "</s>", …}; the first file that names a token wins. A token is its text, or an object with `content`."""
    names: dict[str, str] = {}
    for config in configs:
        for key in NAMES:
            token = config.get(f"{key}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and text:
                names.setdefault(key, text)
    return names


def _build(content: bytes, file: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package knows no narrower class
        raise UserError(f"{file} is not a Hugging Face tokenizer, or is broken: {error}.") from error
    if not tokenizer.get_vocab_size():
        raise UserError(f"{file} has no tokens.")
    # What was set for somebody's batches: a document would silently lose its end.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None  # the same text always gets the same ids
    return tokenizer


def _put_around(tokenizer: tokenizers.Tokenizer, file: Path) -> tuple[int | None, int | None]:
    """The tokens that the file's post-processor puts in front of a text and behind it."""
    try:
        encoding = tokenizer.encode("a")
    except BaseException as error:  # a panic in Rust is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{file}: its post_processor is broken: {error}.") from error
    ids, put = encoding.ids, encoding.special_tokens_mask
    return ids[0] if ids and put[0] else None, ids[-1] if ids and put[-1] else None


def _without_specials(content: dict[str, Any], specials: Mapping[str, int], file: Path) -> tokenizers.Tokenizer:
    """The tokenizer `content`, in which no text becomes a special token.

    `encode_special_tokens` only stops the search for them; unigram, and BPE with `ignore_merges`, would still find one
    among their own pieces. So their names get a space in front, which these models never see: it is written as another
    character or cut away before.
    """
    renamed = {name: f" {name}" for name in specials}
    added = [
        {**token, "content": renamed[token["content"]], "special": True} if token["content"] in renamed else token
        for token in content.get("added_tokens") or []
    ]
    model = dict(content["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes_any(merge, renamed)]
    plain = {**content, "added_tokens": added, "model": model, "post_processor": None}
    tokenizer = _build(json.dumps(plain).encode(), file)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _makes_any(merge: str | list[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names
