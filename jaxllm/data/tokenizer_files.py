"""The files of a tokenizer's folder."""

from jaxllm.data.chat_template import TEMPLATE_FILE

MODEL_FILE = "tokenizer.model"  # sentencepiece
JSON_FILE = "tokenizer.json"  # Hugging Face
CONFIG_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
# What is read of a folder.
FILES = (JSON_FILE, MODEL_FILE, CONFIG_FILE, "special_tokens_map.json", GENERATION_FILE, TEMPLATE_FILE)
# What is not read, but carried along for an export: vocabularies and templates in older forms.
CARRIED = (
    "added_tokens.json",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # in generation_config.json and config.json
