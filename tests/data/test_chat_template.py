"""Chat templates against transformers: text, ids, the assistant's characters, and what templates refuse."""

import json
from datetime import datetime

import pytest

pytest.importorskip("transformers")

from jaxllm.data.chat_template import ChatTemplate
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import UserError
from tests.data import huggingface

LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{%- if tools is not none %}{{ '<tools>' + tools | tojson(indent=2) + '</tools>' }}{%- endif %}
{%- if system_message %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system_message + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
CHATML = """{% for message in messages %}
{% if loop.first and message.role != 'system' %}{{ '<|im_start|>system\\nBe useful.<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message.role + '\\n' }}
    {% if message.role == 'assistant' %}
    {% generation %}
{{ message.content }}{{ '<|im_end|>' }}
    {% endgeneration %}
    {% else %}
{{ message.content + '<|im_end|>' }}
    {% endif %}

{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('After the optional system message, roles must alternate user/assistant!') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"""
ZEPHYR = """{% for message in messages %}
{% if message['content'] is not defined %}{% continue %}{% endif %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}

{% else %}
{{ '<|' ~ message['role'] ~ '|> ' ~ strftime_now('%d %b %Y') ~ message | tojson }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "mistral": MISTRAL, "zephyr": ZEPHYR}

TALK = [
    {"role": "user", "content": "却说 <曹操> & 'co'?  "},
    {"role": "assistant", "content": "It's 玄德.\n\n"},
    {"role": "user", "content": "And?"},
]
CONVERSATIONS = [
    TALK[:1],
    TALK,
    TALK[:2],
    [*TALK, {"role": "assistant", "content": "", "tool_calls": None}],
    [*TALK[:1], {"role": "tool", "content": "4", "name": None}],
]
SYSTEM = {"role": "system", "content": " Be brief, 简短. "}
VARIABLES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_spans_are_those_of_transformers(name, prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    template = ChatTemplate(TEMPLATES[name], VARIABLES)
    system = [] if name == "mistral" else [[SYSTEM, *talk] for talk in CONVERSATIONS]
    for talk in [*CONVERSATIONS, *system]:
        given = [{key: value for key, value in message.items() if value is not None} for message in talk]
        (text,), (spans,) = render_jinja_template(
            [given],
            chat_template=TEMPLATES[name],
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=True,
            **VARIABLES,
        )
        ours = template.render(talk, add_generation_prompt=prompt)
        assert (ours.text, ours.generation) == (text, spans)
        said = [message["content"] for message in talk if message["role"] == "assistant"]
        ends = {"chatml": "<|im_end|>", "zephyr": "<|end_of_text|>"}
        if name in ends:
            assert [text[start:end].rstrip("\n") for start, end in ours.generation] == [s + ends[name] for s in said]
    if name == "zephyr":
        assert datetime.now().strftime("%Y") in ours.text and "简短" in ours.text  # tojson leaves it readable


def test_variables_of_the_caller():
    template = ChatTemplate(LLAMA3, VARIABLES)
    tools = [{"name": "曹操", "html": "<a>"}]
    text = template.render(TALK, add_generation_prompt=True, tools=tools).text
    assert f"<tools>{json.dumps(tools, ensure_ascii=False, indent=2)}</tools>" in text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_ids_of_a_conversation(kind, name, tmp_path):
    theirs = huggingface.save(kind, tmp_path, chat_template=TEMPLATES[name])
    assert (tmp_path / "chat_template.jinja").exists()
    ours = load_tokenizer(tmp_path)
    text = ours.chat_template.render(TALK, add_generation_prompt=True).text
    assert text == theirs.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    want = theirs.apply_chat_template(TALK, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ours.encode(text, special=True) == want
    assert want.count(ours.bos_id) == (name in ("llama3", "mistral"))


@pytest.mark.parametrize("given", ["text", "list", "list without default", "file first"])
def test_where_a_template_is_found(given, tmp_path):
    huggingface.save("llama3", tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ eos_token }}yes"}]
    config["chat_template"] = {"text": "{{ eos_token }}yes", "list": named, "list without default": named[:1]}.get(
        given
    )
    if given == "file first":
        config["chat_template"] = "no"
        (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}yes")
    config["eos_token"] = {"content": "<|eot_id|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = load_tokenizer(tmp_path).chat_template
    if given == "list without default":
        assert template is None
    else:
        assert template.render([], add_generation_prompt=False).text == "<|eot_id|>yes"
        load_tokenizer(tmp_path).save(tmp_path / "saved")
        assert load_tokenizer(tmp_path / "saved").chat_template.source == template.source


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (MISTRAL, "^the chat template: After the optional system message, roles must alternate user/assistant!$"),
        ("a\n{% if %}", "line 2: Expected an expression"),
        ("{{ messages[0].content.no.such }}", "has no attribute"),
        ("{{ 1 + messages[0].content }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set _ = messages.append(1) %}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_what_a_template_may_not(source, says):
    with pytest.raises(UserError, match=says):
        ChatTemplate(source, VARIABLES).render([SYSTEM, *TALK], add_generation_prompt=False)


def test_a_template_beside_a_sentencepiece_model(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}<|end|>{{ eos_token }}曹")
    for folder in (tmp_path, tmp_path / "saved"):
        ours = load_tokenizer(folder)
        text = ours.chat_template.render([{"content": "hi"}], add_generation_prompt=True).text
        assert text == "<s>hi<|end|></s>曹"
        assert ours.encode(text, special=True) == [2, *ours.encode("hi"), 5, 3, *ours.encode("曹")]
        ours.save(tmp_path / "saved")


def test_a_template_file_that_is_no_text(tmp_path):
    huggingface.save("gpt2", tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja: not UTF-8 text \(byte 3\)"):
        load_tokenizer(tmp_path)
