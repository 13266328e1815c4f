"""Small Hugging Face tokenizers of every kind, trained on the spot and saved by transformers."""

import json
import os
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

TEXT = """却说曹操引兵追赶，玄德大惊。The quick brown fox jumps over the lazy dog; don't you think it's fine?
    def fox(x):  return x + 1984
Ünïcödé naïve café — “quoted” text, and a line of it. user assistant system message answer question\n"""


def gpt2() -> Tokenizer:
    """Byte-level BPE without anything in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return _train(tokenizer, ["<|endoftext|>"], pre_tokenizers.ByteLevel.alphabet())


def llama3(vocab_size: int = 400) -> Tokenizer:
    """Byte-level BPE with bos, whole words looked up first (`ignore_merges`), its own pattern."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    bos = "<|begin_of_text|>"
    ends = ["<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = _train(tokenizer, [bos, *ends], pre_tokenizers.ByteLevel.alphabet(), vocab_size - 1)
    tokenizer.add_tokens(["<think>"])  # an added token that is text
    return _in_front(tokenizer, bos)


def llama2(prepend_scheme: str = "") -> Tokenizer:
    """sentencepiece's BPE with byte fallback; a space in front by a normalizer, or by Metaspace where it says how."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme or "always")
    tokenizer = _train(tokenizer, ["<unk>", "<s>", "</s>", "<pad>"], [])
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if not prepend_scheme:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return _in_front(tokenizer, "<s>")


def unigram() -> Tokenizer:
    """sentencepiece's unigram as XLM-R and T5 have it: special tokens are pieces like any other."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    return _in_front(tokenizer, "<s>", "</s>")


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        [TEXT] * 5, trainers.WordPieceTrainer(vocab_size=220, special_tokens=specials, show_progress=False)
    )
    return _in_front(tokenizer, "[CLS]", "[SEP]")


def _train(tokenizer: Tokenizer, specials: list[str], alphabet: list[str], vocab_size: int = 400) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    return tokenizer


def _in_front(tokenizer: Tokenizer, bos: str, eos: str = "") -> Tokenizer:
    ids = [(name, tokenizer.token_to_id(name)) for name in (bos, eos) if name]
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A {eos}".strip(), special_tokens=ids)
    return tokenizer


LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
BERT_TOKENS = {key + "_token": f"[{key.upper()}]" for key in ("pad", "unk", "cls", "sep", "mask")}
KINDS = {
    "gpt2": (gpt2, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "llama3": (llama3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}),
    "llama2": (llama2, LLAMA_TOKENS),
    "metaspace always": (lambda: llama2("always"), LLAMA_TOKENS),
    "metaspace first": (lambda: llama2("first"), LLAMA_TOKENS),
    "unigram": (unigram, {**LLAMA_TOKENS, "mask_token": "<mask>"}),
    "bert": (bert, BERT_TOKENS),
}


def save(kind: str, folder: Path, vocab_size: int = 0, **more):
    """Saves a tokenizer of `kind` as transformers does, and opens it again with it. Llama 3's may have any size."""
    from transformers import PreTrainedTokenizerFast

    make, tokens = KINDS[kind]
    PreTrainedTokenizerFast(
        tokenizer_object=make(vocab_size) if vocab_size else make(), **tokens, **more
    ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
