"""Which tokens are learned: against transformers, and what cannot be told is refused."""

import re

import numpy as np
import pytest

from jaxllm.data.chat_template import BUILT_IN, named_template
from jaxllm.data.examples import Conversation, PlainText
from jaxllm.data.supervision import ExampleEncoder
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.data.tokenizer_training import train_tokenizer
from jaxllm.errors import UserError
from tests.data import huggingface
from tests.data.conversations import conversations
from tests.data.test_chat_template import CHATML, ZEPHYR

# No header of an answer, and no generation prompt.
INST = """{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}\
{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}\
{% else %}{{ '[INST] ' + message.content + ' [/INST]' }}{% endif %}{% endfor %}"""
# A system prompt of its own, and content that is trimmed.
TRIMMED = """{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content | trim + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
EXACT = {name: named_template(name) for name in BUILT_IN} | {"inst": INST, "trimmed": TRIMMED}
TEMPLATES = EXACT | {"own chatml": CHATML, "own zephyr": ZEPHYR}
NAMES_OF_BUILT_IN = sorted({token for tokens in BUILT_IN.values() for token in tokens})
MARKS = re.compile(r"\{%-? *(end)?generation *-?%\}")


def without_blocks(source: str) -> str:
    """The same template, which does not say whose words are whose. White space stays as the blocks left it."""
    return MARKS.sub(lambda mark: mark[0].replace("endgeneration", "endif").replace("generation", "if true"), source)


def talks(name: str) -> list[list[dict[str, str]]]:
    """Those that the template takes: with tools, but for two that know none."""
    return conversations(200, tools=name not in ("zephyr", "plain"))


def mask(encoded) -> np.ndarray:
    learned = np.zeros(len(encoded.tokens), bool)
    for start, end in encoded.supervised:
        learned[start:end] = True
    return learned


@pytest.fixture(scope="module", params=["llama3", "llama2", "gpt2"])
def both(request, tmp_path_factory):
    """A tokenizer here, and in transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = huggingface.save(request.param, folder, extra_special_tokens=NAMES_OF_BUILT_IN)
    return load_tokenizer(folder), theirs


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_those_of_transformers(both, name):
    """Of 200 conversations, by generation blocks. The first token is nobody's to learn."""
    ours, theirs = both
    encoder = ExampleEncoder(ours.with_template(TEMPLATES[name]))
    chosen = talks(name)
    made = encoder.encode([Conversation(talk) for talk in chosen], [""] * len(chosen))
    learned = 0
    for talk, encoded in zip(chosen, made, strict=True):
        want = theirs.apply_chat_template(
            talk, chat_template=TEMPLATES[name], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert encoded.tokens == want["input_ids"]
        assert mask(encoded)[1:].tolist() == [bool(x) for x in want["assistant_masks"][1:]]
        learned += encoded.num_supervised
    assert 1000 < learned < 0.8 * sum(len(encoded.tokens) for encoded in made)


@pytest.mark.parametrize("name", EXACT)
def test_a_template_without_blocks_teaches_the_same(both, name):
    """(The two others have blocks that take in a line break after the end, or leave out one that the model writes.)"""
    tokenizer = both[0]
    marked, plain = (tokenizer.with_template(t) for t in (TEMPLATES[name], without_blocks(TEMPLATES[name])))
    assert marked.chat_template.marks_answers and not plain.chat_template.marks_answers
    examples = [Conversation(talk) for talk in talks(name)]
    origins = [""] * len(examples)
    assert ExampleEncoder(plain).encode(examples, origins) == ExampleEncoder(marked).encode(examples, origins)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_learned_text_of_a_tokenizer_trained_here(name):
    """Token by token: what is learned is what the assistant said, and what ends it."""
    text = [message["content"] for talk in conversations(50) for message in talk]
    tokenizer = train_tokenizer(text, vocab_size=420, specials=BUILT_IN[name])
    tokenizer = tokenizer.with_template(named_template(name))
    names = {token: name for name, token in tokenizer.specials.items()}
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "</s>")
    assert tokenizer.end_ids == {tokenizer.specials["</s>"], tokenizer.specials[end]}
    encoder = ExampleEncoder(tokenizer)
    assert encoder.learns_to_stop()
    for talk in talks(name):
        (encoded,) = encoder.encode([Conversation(talk)], [""])
        shown = [
            "".join(names.get(t) or tokenizer.token_bytes(t).decode("latin1") for t in encoded.tokens[a:b])
            for a, b in encoded.supervised
        ]
        answers = [message["content"] for message in talk if message["role"] == "assistant"]
        spoken = [a.strip() if name == "llama3" else f" {a}" if name == "plain" else a for a in answers]
        assert [s.encode("latin1").decode() for s in shown] == [f"{words}{end}" for words in spoken]
        assert encoded.tokens.count(tokenizer.bos_id) == 1 and encoded.tokens[0] == tokenizer.bos_id


def test_texts_end_in_eos_and_learn_it(tokenizer):
    examples = [PlainText("the quick ", "brown fox"), PlainText("", "曹操 </s>")]
    first, second = ExampleEncoder(tokenizer).encode(examples, ["", ""])
    assert tokenizer.decode(first.tokens) == "the quick brown fox"
    ((start, end),) = first.supervised
    assert (first.tokens[0], first.tokens[-1], end) == (tokenizer.bos_id, tokenizer.eos_id, len(first.tokens))
    assert tokenizer.decode(first.tokens[start:end]) == "brown fox"
    assert second.supervised == [(1, len(second.tokens))]  # a text is learned whole, and forges no eos
    assert second.tokens.count(tokenizer.eos_id) == 1


def test_a_token_across_the_border(tokenizer, both):
    """A tokenizer trained here has none; of another it is learned whole, and the ids are those of the whole text."""
    assert len(tokenizer.encode("the")) == 1
    (encoded,) = ExampleEncoder(tokenizer).encode([PlainText("th", "e")], [""])
    assert encoded.tokens[1:-1] == [*tokenizer.encode("th"), *tokenizer.encode("e")]
    assert encoded.supervised == [(len(encoded.tokens) - 2, len(encoded.tokens))]
    ours, text = both[0], "The quick brown fox jumps"
    ((ids, starts, ends),) = ours.encode_with_extents([text], [[]])
    long = int(np.argmax(ends - starts))
    border = int(ends[long]) - 1
    (encoded,) = ExampleEncoder(ours).encode([PlainText(text[:border], text[border:])], [""])
    first = 1 if ours.bos_id is not None else 0
    assert encoded.tokens[first : first + len(ids)] == ids and ends[long] - starts[long] > 2
    assert encoded.supervised == [(first + long, len(encoded.tokens))]


@pytest.mark.parametrize("text", ["", "a", "却说曹操😀x", "\u2581a \u2581", "<|user|>却<|end|>", "a\u0301 é\n\n  b"])
@pytest.mark.parametrize("special", [False, True])
def test_extents_are_those_of_the_bytes(tokenizer, text, special):
    (encoded,) = tokenizer.encode_with_extents([text], [[]], special=special)
    assert encoded.ids == tokenizer.encode(text, special=special)
    names = {token: name for name, token in tokenizer.specials.items()}
    for token, start, end in zip(*encoded, strict=True):
        piece = names[token].encode() if token in names else tokenizer.token_bytes(token)
        assert piece in text[start:end].encode() and piece
        assert end - start == len(piece.decode("utf-8", "replace")) or end - start == 1


def test_everything_is_learned_when_asked(both):
    ours, _ = both
    examples = [Conversation(talk) for talk in talks("own chatml")[:20]]
    for encoded in ExampleEncoder(ours.with_template(CHATML), "all").encode(examples, [""] * 20):
        assert encoded.supervised == [(1, len(encoded.tokens))]


@pytest.mark.parametrize("blocks", [True, False])
def test_answers_in_the_prompt_are_context(both, blocks):
    template = named_template("zephyr") if blocks else without_blocks(named_template("zephyr"))
    tokenizer = both[0].with_template(template)
    said = [("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "dd"), ("user", "e"), ("assistant", "ff")]
    messages = [{"role": role, "content": content} for role, content in said]
    (encoded,) = ExampleEncoder(tokenizer).encode([Conversation(messages, num_context=3)], [""])
    learned = [tokenizer.decode(encoded.tokens[a:b]) for a, b in encoded.supervised]
    assert [text.strip() for text in learned] == ["dd", "ff"]


THINKING = """{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and not loop.last %}\
{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}\
{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_a_template_that_rewrites_what_was_said_is_refused(both):
    """Of a conversation in which it matters; by line, with the place."""
    tokenizer = both[0].with_template(THINKING)
    encoder = ExampleEncoder(tokenizer)
    said = [("user", "a"), ("assistant", "<think>hm</think>bb"), ("user", "c"), ("assistant", "<think>!</think>dd")]
    messages = [{"role": role, "content": content} for role, content in said]
    (encoded,) = encoder.encode([Conversation(messages[:2])], ["x:1"])
    assert tokenizer.decode(encoded.tokens[encoded.supervised[0][0] :]).strip() == "<think>hm</think>bb"
    with pytest.raises(UserError, match=r"^x:2: the chat template writes the first 2 messages in one way .*'<think>hm"):
        encoder.encode([Conversation(messages)], ["x:2"])


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SILENT = {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("template", "talk", "says"),
    [
        ("{{ raise_exception('no, thanks') }}", TALK, "^a.jsonl:7: the chat template: no, thanks$"),
        ("{{ raise_exception('no, thanks') }}{% generation %}{% endgeneration %}", TALK, "^a.jsonl:7: .*no, thanks$"),
        ("{{ messages[0].no.such }}", TALK, "^a.jsonl:7: the chat template: .*has no attribute"),
        ("{% generation %}{% endgeneration %}x", TALK, "^a.jsonl:7: no token of this example is to be learned"),
        (CHATML, TALK[:1], "^a.jsonl:7: no message of the assistant, so there is nothing to learn"),
        (
            CHATML,
            [TALK[0], {"role": "assistant", "content": ""}],
            "^a.jsonl:7: every message of the assistant is empty",
        ),
        (named_template("plain"), [*TALK, {"role": "tool", "content": "4"}], "^a.jsonl:7: .*this is tool$"),
    ],
)
def test_what_is_refused(both, template, talk, says):
    tokenizer = both[0].with_template(template)
    with pytest.raises(UserError, match=says):
        ExampleEncoder(tokenizer).encode([Conversation(talk)], ["a.jsonl:7"])


def test_without_a_template(tokenizer):
    with pytest.raises(UserError, match=r"^a:1: a conversation needs a chat template.*plain or zephyr"):
        ExampleEncoder(tokenizer).encode([Conversation(TALK)], ["a:1"])


def test_blocks_that_leave_out_the_end_are_told(both):
    source = CHATML.replace("{{ '<|im_end|>' }}\n    {% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}")
    assert source != CHATML
    assert not ExampleEncoder(both[0].with_template(source)).learns_to_stop()
    for fine in (CHATML, named_template("zephyr")):
        assert ExampleEncoder(both[0].with_template(fine)).learns_to_stop()
