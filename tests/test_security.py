"""Nothing that is loaded runs code, and nothing is sent anywhere: by what jaxllm imports, and by malicious files."""

import ast
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxllm.cli.main import main
from jaxllm.data.chat_template import ChatTemplate
from jaxllm.data.sources import open_source
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import UserError
from tests.data import huggingface
from tests.fuzz_configs import Case, Files, make_files, try_case
from tests.mistakes import mistake

ROOT = Path(__file__).parents[1]
# Modules that turn bytes into code or objects of any class, and those that open connections.
MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "code", "codeop", "runpy"),
    *("torch", "yaml", "imp", "ctypes", "cffi", "xmlrpc"),
    *("socket", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "websockets"),
    *("wandb", "mlflow", "comet_ml", "neptune", "sentry_sdk", "posthog", "huggingface_hub", "transformers", "datasets"),
    *("fsspec", "gcsfs", "s3fs", "boto3", "botocore"),
}
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "import_module", "read_pickle", "from_pretrained"}
METHODS_OF_OTHERS = ("re.compile", "lowered.compile", "program.lowered.compile")  # no code of Python's
ALLOWED = {
    ("cli/config_file.py", "exec"): "a config is a Python file: --config FILE.py",
    ("cli/config_file.py", "compile"): "the same",
    ("layout/named.py", "exec"): "FILE.py:NAME of a config: rules, schedules and rewards of the user's own",
    ("layout/named.py", "compile"): "the same",
    ("remote/storage.py", "fsspec"): "buckets, where a path is an address: gs://, s3://",
    ("train/watch/sinks.py", "wandb"): "Weights & Biases, where config.train.wandb_project names a project",
    ("cli/main.py", "import_module"): "a verb's own file, by a name of the table VERBS",
    ("cli/instructions/__init__.py", "import_module"): "a file of the verb's, by a name of its table",
}


def findings(file: Path) -> Iterator[tuple[str, int]]:
    """(what, line) of whatever in a file could run code or open a connection."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in MODULES:
            yield node.module, node.lineno
        elif isinstance(node, ast.Call):
            yield from calls(node)


def calls(node: ast.Call) -> Iterator[tuple[str, int]]:
    written = ast.unparse(node.func)
    name = written.rpartition(".")[2]
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in CALLS and written not in METHODS_OF_OTHERS:
        yield name, node.lineno
    if written in ("np.load", "numpy.load", "jnp.load") and keywords.get("allow_pickle") != "False":
        yield "np.load without allow_pickle=False", node.lineno
    if keywords.get("allow_pickle", "False") != "False":
        yield "allow_pickle", node.lineno
    if keywords.get("shell", "False") != "False" or "trust_remote_code" in keywords:
        yield "shell or trust_remote_code", node.lineno


def found_in_jaxllm() -> dict[tuple[str, str], int]:
    files = sorted((ROOT / "jaxllm").rglob("*.py"))
    assert len(files) > 100
    return {(str(f.relative_to(ROOT / "jaxllm")), what): line for f in files for what, line in findings(f)}


def test_nothing_in_jaxllm_runs_what_it_loads_or_calls_home():
    found = found_in_jaxllm()
    assert {place: line for place, line in found.items() if place not in ALLOWED} == {}
    assert [place for place in ALLOWED if place not in found] == [], "allowed, and no longer there"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "import torch.utils",
        "eval(text)",
        "os.system(text)",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "AutoTokenizer.from_pretrained(name)",
        "compile(text, name, 'exec')",
    ],
)
def test_the_search_finds(line, tmp_path):
    (tmp_path / "a.py").write_text(line)
    assert list(findings(tmp_path / "a.py"))


class Creates:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return make_files(tmp_path_factory.mktemp("security"))


@pytest.fixture
def marker(tmp_path) -> Iterator[Path]:
    """A file that malicious input would create."""
    path = tmp_path / "was-here"
    pickle.loads(pickle.dumps(Creates(path))).close()
    assert path.exists(), "the payload works"
    path.unlink()
    yield path
    assert not path.exists(), "something that was loaded ran code"


@pytest.fixture
def run(files, tmp_path) -> Path:
    return Path(shutil.copytree(files.base, tmp_path / "run"))


def generate(workdir: Path, *flags: str) -> int:
    return main(["generate", f"--workdir={workdir}", "--prompt=say", "--max_new_tokens=1", *flags])


def test_weights_of_hugging_face_in_a_pickle(marker, tmp_path, capsys):
    folder = tmp_path / "hf"
    folder.mkdir()
    config = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 300, "n_positions": 16, "n_embd": 16, "n_head": 2}
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 1, "auto_map": {"AutoModel": "evil.Model"}}))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    (folder / "tokenizer.json").write_text(huggingface.gpt2().to_str())
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Creates(marker)))
    said = mistake(["convert", f"--from=hf:{folder}", f"--to={tmp_path / 'run'}"], capsys)
    assert "pytorch_model.bin is not opened: a pickle can run code" in said


def test_an_adapter_in_a_pickle(run, marker, tmp_path, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"]}))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Creates(marker)))
    mistake(["convert", f"--from=peft:{folder}", f"--base={run}", f"--to={tmp_path / 'tuned'}"], capsys)


@pytest.mark.parametrize("replaced", ["every file", "arrays", "metadata"])
def test_a_checkpoint_of_pickles(run, marker, replaced, capsys):
    """Refused, or passed over."""
    inside = [file for file in (run / "checkpoints").rglob("*") if file.is_file()]
    is_metadata = lambda file: "meta" in file.name.lower() or file.suffix == ".json"  # noqa: E731
    chosen = [f for f in inside if replaced == "every file" or is_metadata(f) == (replaced == "metadata")]
    assert chosen
    for file in chosen:
        file.write_bytes(pickle.dumps(Creates(marker)))
    said = generate(run), capsys.readouterr().err
    assert said[0] == 2 and "Traceback" not in said[1], said


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__']['open'](path, 'w') }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ self.__init__.__globals__.__builtins__.open(path, 'w') }}",
    "{{ cycler.__init__.__globals__.os.system('touch ' + path) }}",
    "{{ messages|attr('__class__') |attr('__base__') |attr('__subclasses__')() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}{{ 1/0 }}",
    "{% for i in range(10**12) %}{% endfor %}",
    "{{ 'x' * 10**12 }}",
    "{{ [0] * 10**12 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% include path %}",
    "{% import path as x %}",
    "{{ messages.append(1) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
)


@pytest.mark.parametrize("source", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(source, marker):
    template = ChatTemplate(source, {}, "evil")
    with pytest.raises(UserError, match="evil"):
        template.render([{"role": "user", "content": "x"}], add_generation_prompt=False, path=str(marker))


def test_a_tokenizer_brings_no_code(marker, tmp_path):
    (tmp_path / "tokenizer.json").write_text(huggingface.gpt2().to_str())
    keys = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(keys | {"trust_remote_code": True}))
    (tmp_path / "tokenization_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    assert load_tokenizer(tmp_path).encode("a")


def test_columns_of_pickles_are_bytes(marker, tmp_path):
    import pyarrow
    import pyarrow.parquet
    from array_record.python import array_record_module

    payload = pickle.dumps(Creates(marker))
    # Old versions of pyarrow unpickle an extension type that a file names.
    kind = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload}
    schema = pyarrow.schema([pyarrow.field("text", pyarrow.binary(), metadata=kind)])
    pyarrow.parquet.write_table(pyarrow.table([[payload]], schema=schema), tmp_path / "a.parquet")
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    writer.write(payload)
    writer.close()
    for name, kind in (("a.parquet", "parquet"), ("a.array_record", "arrayrecord")):
        with pytest.raises(UserError, match=name):
            list(open_source(kind, str(tmp_path / name)).documents())


def test_an_array_of_pickles_is_not_loaded(marker, tmp_path):
    from jaxllm.data.shards import _loaded

    np.save(tmp_path / "a.npy", np.array([Creates(marker)], object), allow_pickle=True)
    with pytest.raises(ValueError):
        _loaded(tmp_path / "a.npy")


@pytest.fixture
def evil_run(run, tmp_path) -> Path:
    """A run whose config names Python that would create `was-here`."""
    evil = tmp_path / "evil.py"
    evil.write_text(
        f"from jaxllm.layout.rules import Rules\nopen({str(tmp_path / 'was-here')!r}, 'w')\ntable = Rules()\n"
    )
    stored = json.loads((run / "config.json").read_text())
    stored["layout"] |= {"rules": f"{evil}:table", "schedule": f"{evil}:table"}
    stored["rollout"] |= {"rewards": f"{evil}:table"}
    (run / "config.json").write_text(json.dumps(stored))
    for file in (run / "checkpoints").rglob("*"):  # those of each checkpoint, too
        if file.is_file() and b'"megatron"' in file.read_bytes():
            file.write_text(file.read_text().replace('"megatron"', json.dumps(f"{evil}:table")))
    for listed in (run / "checkpoints").glob("*/files.json"):  # or the change would be taken for damage
        listed.unlink()
    return run


def test_a_stored_config_runs_no_python(evil_run, files, marker, tmp_path, capsys):
    assert generate(evil_run) == 0
    assert "is Python, which a stored config does not run" in capsys.readouterr().err
    assert main(["evaluate", f"--workdir={evil_run}", f"--input={files.text}"]) == 0
    assert main(["convert", f"--from={evil_run}", f"--to=hf:{tmp_path / 'hf'}"]) in (0, 2)
    for step, field in (("lora", "init_from"), ("dpo", "reference")):
        case = Case(step, [f"config.train.{field} = {str(evil_run)!r}"], [f"--config.model={evil_run}"])
        outcome = try_case(case, files, trains=True)
        assert outcome.kind == "valid", outcome.said


def test_python_that_a_flag_names_runs(evil_run, tmp_path):
    assert generate(evil_run, f"--config.layout.rules={tmp_path / 'evil.py'}:table") in (0, 2)
    assert (tmp_path / "was-here").exists()
