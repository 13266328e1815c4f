"""lm-evaluation-harness on a run: its numbers are those of `jaxllm evaluate`, its requests those of the engine."""

import json
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from jaxllm.cli.main import main  # noqa: E402
from jaxllm.errors import UserError  # noqa: E402
from jaxllm.generate.engine import Engine  # noqa: E402
from jaxllm.generate.likelihood import Scorer  # noqa: E402
from jaxllm.generate.sampling import Sampling  # noqa: E402
from jaxllm.interop.lm_eval import JaxllmLM  # noqa: E402

TASK = """
task: animals
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/questions.jsonl}}
  cache_dir: {cache}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_bytes
"""
ROLLING = """
task: animals_text
dataset_path: text
dataset_kwargs:
  data_files: {{test: {cache}/held_out.txt}}
  cache_dir: {cache}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.fixture(scope="module")
def model(trained) -> JaxllmLM:
    return JaxllmLM(str(trained / "run"), batch_size=8, **{"precision.compute": "float32"})


@pytest.fixture(autouse=True)
def no_logging(monkeypatch):
    """The harness would log to the stderr of the first test for good."""
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_the_accuracy_is_that_of_evaluate(trained, tmp_path, capsys):
    (tmp_path / "animals.yaml").write_text(TASK.format(folder=trained, cache=tmp_path))
    argv = ["lm_eval", "--model", "jaxllm", "--model_args", f"workdir={trained / 'run'},precision.compute=float32"]
    argv += ["--tasks", "animals", "--include_path", str(tmp_path), "--batch_size", "8"]
    assert main([*argv, "--output_path", str(tmp_path / "results")]) == 0
    (file,) = (tmp_path / "results").rglob("*.json")
    theirs = json.loads(file.read_text())["results"]["animals"]
    capsys.readouterr()
    assert main(["evaluate", f"--workdir={trained / 'run'}", f"--choices={trained / 'questions.jsonl'}", "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert ours["questions"] == 40
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert theirs[f"{name},none"] == pytest.approx(ours[name])
    assert 0.7 <= ours["acc"] <= 0.85  # every fifth answer is wrong, and a guess is right one time in four


def test_bits_per_byte_are_the_definition(model, tmp_path):
    lines = ["the cow says moo." * 12, "a dog"]
    (tmp_path / "held_out.txt").write_text("\n".join(lines))
    (tmp_path / "animals_text.yaml").write_text(ROLLING.format(cache=tmp_path))
    tasks = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(model, tasks=["animals_text"], task_manager=tasks, bootstrap_iters=0)
    scorer = Scorer(model._run)
    pairs = [pair for line in lines for pair in scorer.rolling(line)]
    nats = -sum(likelihood.nats for likelihood in scorer.likelihoods(pairs))
    size = sum(len(line.encode()) for line in lines)
    assert len(pairs) > len(lines)
    assert results["results"]["animals_text"]["bits_per_byte,none"] == pytest.approx(nats / size / 0.6931471806)


class Harness(TemplateLM):
    """How the harness itself turns texts into tokens, with our tokenizer as it would see it."""

    def __init__(self, tokenizer):
        super().__init__()
        self.of_run, self.eot_token_id, self.prefix_token_id = tokenizer, tokenizer.eos_id, tokenizer.bos_id

    eot_token_id = prefix_token_id = None
    loglikelihood_rolling = generate_until = None

    def tok_encode(self, string, add_special_tokens=None, **_):
        begin = [] if add_special_tokens is False else [self.prefix_token_id]
        return begin + self.of_run.encode(string)

    def _loglikelihood_tokens(self, requests, **_):
        return [(before, targets) for _, before, targets in requests]


@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("the cat says", " meow"),
        ("the cat says ", "meow"),
        ("a\n\n", "b"),
        ("", " the"),
        ("th", "e cat says meow."),
        ("曹", "操"),
    ],
)
def test_texts_are_cut_where_the_harness_cuts_them(model, context, continuation):
    theirs = Harness(model._run.tokenizer).loglikelihood(requests("loglikelihood", (context, continuation)), True)
    assert theirs == [Scorer(model._run).pair(context, continuation)]


@pytest.mark.parametrize("repeats", [0, 1, 5, 6, 20])
def test_windows_are_those_of_the_harness(model, repeats):
    text, tokenizer = "the cow says moo.\n" * repeats, model._run.tokenizer
    ids, first = tokenizer.encode(text), tokenizer.bos_id
    windows = get_rolling_token_windows(ids, prefix_token=first, max_seq_len=model.max_length, context_len=1)
    assert [make_disjoint_window(window) for window in windows] == Scorer(model._run).rolling(text)


def test_loglikelihood_and_rolling_are_the_scorers(model):
    scorer = Scorer(model._run, 3)
    texts = [("the cat says", " meow"), ("the cat says", " moo"), ("", "the"), ("the cow says moo. " * 9, "the")]
    results = model.loglikelihood(requests("loglikelihood", *texts), disable_tqdm=True)
    expected = scorer.likelihoods([scorer.pair(*pair) for pair in texts])
    assert results == [(pytest.approx(one.nats, rel=1e-5), one.is_greedy) for one in expected]
    assert results[0][1] and not results[1][1]
    long = "the cow says moo.\n" * 9
    rolled = model.loglikelihood_rolling(requests("loglikelihood_rolling", (long,), ("",), ("the",)), disable_tqdm=True)
    sums = [sum(one.nats for one in scorer.likelihoods(scorer.rolling(text))) for text in (long, "", "the")]
    assert rolled == pytest.approx(sums, rel=1e-5)
    assert rolled[1] == 0


def test_generate_until_is_the_engine(model):
    engine, room = Engine(model._run), model.max_length
    contexts = ["the cat says", "the lion", "the cow says"]
    greedy = Sampling(temperature=0)
    free = [engine.generate([context], 10, greedy)[0].text for context in contexts]
    asked = [(context, {"until": ["\n"], "max_gen_toks": 10}) for context in contexts]
    asked += [(contexts[0], {"until": ["eow"], "max_gen_toks": 10}), (contexts[0], {"max_gen_toks": 2})]
    written = model.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert written[:3] == [text.split("\n")[0] for text in free]
    assert written[0] == " meow." and written[3] == " m"
    assert written[4] == engine.generate([contexts[0]], 2, greedy)[0].text
    long = "the cow says moo.\n" * 20 + "the cat says"
    ids = [engine.tokenizer.bos_id, *engine.tokenizer.encode(long)][-(room - 8) :]
    cut = model.generate_until(requests("generate_until", (long, {"until": ["\n"], "max_gen_toks": 8})), True)
    assert cut == [engine.generate([ids], 8, greedy, stop=["\n"])[0].text]


def test_answers_are_drawn_where_a_task_asks_for_it(model):
    asked = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 3.0, "top_p": 0.99}
    ask = requests("generate_until", *[("the", dict(asked))] * 3)
    drawn = [*model.generate_until(ask, True), *model.generate_until(ask, True)]
    assert len(set(drawn)) > 4
    greedy = model.generate_until(requests("generate_until", *[("the", asked | {"do_sample": False})] * 2), True)
    assert len(set(greedy)) == 1


def test_a_conversation_is_that_of_chat(model):
    history = [("system", "Be brief."), ("user", "hi"), ("assistant", "hello"), ("user", "well?")]
    messages = [{"role": role, "content": text} for role, text in history]
    assert model.apply_chat_template(messages) == "Be brief.\nUser: hi\nAssistant: hello\nUser: well?\nAssistant:"
    open_end = model.apply_chat_template([*messages, {"role": "assistant", "content": "Fi"}], False)
    assert open_end.endswith("\nUser: well?\nAssistant: Fi")
    assert model._run.tokenizer.fingerprint in model.tokenizer_name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "say which run: --model_args workdir=DIR"),
        ("workdir=no/such", "no/such: no such folder"),
        ("workdir=RUN,precision.compte=float32", "config.precision.compte is not a field. Did you mean 'compute'?"),
        ("workdir=RUN,compute=float32", "compute=float32: fields of the config are written GROUP.FIELD=VALUE"),
        ("workdir=RUN,mesh.model=3", "config.mesh"),
    ],
)
def test_mistakes(trained, arguments, says):
    with pytest.raises(UserError) as error:
        JaxllmLM.create_from_arg_string(arguments.replace("RUN", str(trained / "run")), {"batch_size": 1})
    assert says in str(error.value)


def test_a_mistake_in_the_harness_is_one_line(tmp_path, capsys):
    argv = ["lm_eval", "--model", "jaxllm", "--model_args", f"workdir={tmp_path}", "--tasks", "lambada_openai"]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "holds no run" in said and "Traceback" not in said


def test_a_tokenizers_own_template_is_used_and_its_special_tokens_are_tokens(model, monkeypatch):
    from jaxllm.data.chat_template import ChatTemplate

    template = ChatTemplate("{% for m in messages %}<s>{{ m.content }}{% endfor %}", {})
    monkeypatch.setattr(model._run.tokenizer, "chat_template", template)
    monkeypatch.setattr(model._scorer, "special", False)
    plain = model._scorer.pair("<s>the cow", " eats")
    text = model.apply_chat_template([{"role": "user", "content": "the cow"}])
    assert text == "<s>the cow"
    pair = model._scorer.pair(text, " eats")
    assert pair.context == [model._run.tokenizer.bos_id, *model._run.tokenizer.encode("the cow")]
    assert len(plain.context) > len(pair.context)
