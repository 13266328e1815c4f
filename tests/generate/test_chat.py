"""Conversations: the text they are, and what happens when the context is full."""

import pytest

from jaxllm.data.chat_template import ChatTemplate
from jaxllm.errors import UserError
from jaxllm.generate.chat import Chat, PlainRoles, TemplateRoles, Turn
from jaxllm.generate.engine import Completion
from jaxllm.generate.sampling import Sampling


class Parrot:
    """An engine that answers from a list; a token is a character. Keeps the prompts it was given."""

    max_length = 120

    def __init__(self, answers):
        self.answers, self.prompts, self.seeds, self.budgets = list(answers), [], [], []

    def count_tokens(self, prompt, *, special):
        return len(prompt)

    def generate(self, prompts, max_new_tokens, sampling, *, special, stop, seed, on_text):
        self.special = special
        (prompt,) = prompts
        self.prompts.append(prompt)
        self.seeds.append(seed)
        self.budgets.append(max_new_tokens)
        answer = self.answers.pop(0)
        for character in answer:
            on_text(0, character)
        return [Completion(prompt, answer, [], "stop")]


def chat_with(*answers, system="", new=20):
    engine = Parrot(answers)
    return engine, Chat(engine, PlainRoles(system=system), Sampling(), new)


def test_the_conversation_is_one_text():
    engine, chat = chat_with(" hello\n", " fine", system="Be brief.")
    shown = []
    assert chat.say("hi", on_text=shown.append) == "hello"
    assert "".join(shown) == "hello\n"  # the space after "Assistant:" is not the answer's
    chat.say("well?")
    assert engine.prompts[1] == "Be brief.\nUser: hi\nAssistant: hello\nUser: well?\nAssistant:"
    assert engine.seeds == [0, 1]


def test_the_oldest_turns_are_forgotten_when_the_context_is_full():
    engine, chat = chat_with(*["a" * 15] * 5, system="S")
    for _ in range(5):
        chat.say("x" * 10)
    assert all(len(prompt) + 20 <= engine.max_length for prompt in engine.prompts)
    assert all(prompt.startswith("S\nUser: ") for prompt in engine.prompts)
    assert chat.forgotten == 3
    assert chat.turns == [Turn("x" * 10, "a" * 15)] * 2
    chat.reset()
    assert (chat.turns, chat.forgotten) == ([], 0)


def test_a_line_that_never_fits_is_refused_and_says_why():
    _, chat = chat_with()
    with pytest.raises(UserError, match="leaves no room for an answer of 20 in the model's context of 120"):
        chat.say("x" * 100)


def test_of_a_short_context_an_answer_takes_at_most_half():
    """The default of 200 tokens is more than the whole context of configs/sanguo.py."""
    engine, chat = chat_with("fine", "fine", new=200)
    assert chat.say("x" * 20) == "fine"
    assert engine.budgets == [60]


def test_a_template_is_the_whole_prompt_and_the_oldest_turns_of_it_go_first():
    source = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{{ '<a>' if add_generation_prompt }}"
    engine = Parrot([" hello\n", *["a" * 15] * 5])
    chat = Chat(engine, TemplateRoles(ChatTemplate(source, {}), system="S"), Sampling(), 20, stop=["!"])
    chat.say("hi")
    chat.say("x" * 10)
    assert engine.special
    assert engine.prompts == ["<s>S<u>hi<a>", f"<s>S<u>hi<a>hello<u>{'x' * 10}<a>"]
    for _ in range(4):
        chat.say("x" * 10)
    assert all(len(prompt) + 20 <= engine.max_length for prompt in engine.prompts)
    assert engine.prompts[-1].startswith(f"<s>S<u>{'x' * 10}<a>a")
    assert chat.forgotten == 3


def test_what_a_template_refuses_is_told():
    template = ChatTemplate("{{ raise_exception('no system message, please') }}", {})
    with pytest.raises(UserError, match="no system message, please"):
        Chat(Parrot([]), TemplateRoles(template, system="S"), Sampling()).say("hi")


def test_the_model_does_not_speak_for_the_user():
    assert PlainRoles().stop == ("\nUser:", "\nAssistant:")
