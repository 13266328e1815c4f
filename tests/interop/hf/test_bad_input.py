"""Broken and foreign directories: each is refused in one or two lines, exit code 2, and nothing is left behind."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

from jaxllm.cli.main import main
from jaxllm.errors import UserError
from jaxllm.interop.hf.config import read_model
from jaxllm.interop.hf.files import parse_size
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from tests.interop.hf.models import GPT2, LLAMA, MODELS, make, save, torch
from tests.mistakes import mistake

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A directory in shards."""
    return save(make("LlamaForCausalLM", LLAMA), tmp_path_factory.mktemp("good"), max_shard_size=30_000)


@pytest.fixture
def folder(good, tmp_path) -> Path:
    """A copy in one file, to be broken."""
    copy = tmp_path / "hf"
    copy.mkdir()
    (copy / "config.json").write_bytes((good / "config.json").read_bytes())
    safetensors.torch.save_file(content(good), copy / WEIGHTS)
    return copy


def content(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in safetensors.torch.load_file(file).items()}


def refused(folder: Path, capsys) -> str:
    """What is said about an import; nothing may be left beside the folder."""
    said = mistake(["convert", "--from", f"hf:{folder}", "--to", str(folder.parent / "run")], capsys)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return said


def change(key: str, value) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))

    return apply


def tensors(edit: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = content(folder)
        edit(found)
        safetensors.torch.save_file(found, folder / WEIGHTS)

    return apply


def truncate(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-100])


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Explodes()))


class Explodes:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was opened')",))


O_PROJ = "model.layers.1.self_attn.o_proj.weight"
BROKEN = {
    "no config.json": (lambda f: (f / "config.json").unlink(), "there is no config.json in it"),
    "broken config.json": (lambda f: (f / "config.json").write_text('{"a": 1,\n oh}'), "config.json:2: not JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "a JSON object is expected, not a list"),
    "unknown architecture": (
        change("architectures", ["LlamaForCausalML"]),
        "LlamaForCausalML is unknown here. Known are BertForMaskedLM, ",
    ),
    "no architecture": (lambda f: (f / "config.json").write_text("{}"), "names no architecture"),
    "a key is missing": (
        lambda f: rewrite_without(f, "hidden_size"),
        "LlamaForCausalLM: the key hidden_size is missing",
    ),
    "a key of another type": (change("hidden_size", "32"), 'hidden_size="32" must be a int'),
    "quantized": (change("quantization_config", {"quant_method": "gptq"}), "quantized (gptq)"),
    "missing tensor": (tensors(lambda t: t.pop(O_PROJ)), f"no tensor {O_PROJ}."),
    "missing tensors": (change("num_hidden_layers", 3), "no tensor model.layers.2.input_layernorm.weight and 8 more."),
    "unexpected tensor": (tensors(lambda t: t.update(x=torch.ones(2))), "no place for the tensor x in its files"),
    "more layers than said": (change("num_hidden_layers", 1), "no place for the tensor model.layers.1."),
    "misshapen tensor": (
        tensors(lambda t: t.update({O_PROJ: torch.ones(32, 31)})),
        f"{O_PROJ} is [32, 31], but config.json makes it [32, 32].",
    ),
    "another size": (change("intermediate_size", 44), "but config.json makes it [32, 44]."),
    "another dtype": (tensors(lambda t: t.update({O_PROJ: t[O_PROJ].double()})), f"{O_PROJ} is of type F64"),
    "truncated": (truncate, "is not a whole safetensors file"),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"\0" * 5), "is not a whole safetensors file"),
    "a pickle": (only_a_pickle, "pytorch_model.bin is not opened: a pickle can run code"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no weights: neither model.safetensors nor"),
}


def rewrite_without(folder: Path, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("break_it", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_directories(break_it, says, folder, capsys):
    break_it(folder)
    assert says in refused(folder, capsys)


def test_broken_shards(good, tmp_path, capsys):
    copy = tmp_path / "hf"
    copy.mkdir()
    for file in good.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    shard = sorted(copy.glob("*.safetensors"))[1]
    kept = shard.read_bytes()
    shard.unlink()
    said = refused(copy, capsys)
    assert f"into {shard.name}, but there is no such file" in said
    shard.write_bytes(kept[: len(kept) // 2])
    assert f"{shard.name} is not a whole safetensors file" in refused(copy, capsys)
    shard.write_bytes(kept)
    (copy / "model-twice.safetensors").write_bytes(kept)
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["twice"] = "model-twice.safetensors"
    (copy / INDEX).write_text(json.dumps(index))
    assert f"is in {shard.name} too" in refused(copy, capsys)
    for broken, says in {
        "{": "not JSON",
        "{}": "has no weight_map",
        '{"weight_map": {"a": "../x"}}': "puts a into ../x",
    }.items():
        (copy / INDEX).write_text(broken)
        assert says in refused(copy, capsys)


def test_a_failure_while_writing_leaves_nothing(folder, capsys, monkeypatch):
    """Whatever it is; the exit code of a full disk is the user's."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save_params", fail)
    assert "no space left on the disk; nothing was written" in refused(folder, capsys)


FLAGS = {
    "nothing": ([], "say what to convert"),
    "two runs": (["--from=no/such", "--to=b"], "no such folder"),
    "two directories": (["--from=hf:a", "--to=hf:b"], "one of the two is a WORKDIR"),
    "a directory and an adapter": (["--from=hf:a", "--to=peft:b"], "the way is through one"),
    "a base for a model": (["--from=hf:a", "--to=b", "--base=c"], "--base c is for --from peft:DIR"),
    "an adapter without a base": (["--from=peft:a", "--to=b"], "say which model it is for, --base WORKDIR"),
    "not there": (["--from=hf:no/such", "--to=b"], "no such folder. It is a local one; nothing is downloaded"),
    "a dtype for a run": (["--from=hf:a", "--to=b", "--dtype=bfloat16"], "--dtype bfloat16 is for --to hf:DIR"),
    "unknown dtype": (["--from=a", "--to=hf:b", "--dtype=int8"], "--dtype"),
    "another model": (["--from=hf:a", "--to=b", "--config.model.num_layers=2"], "a conversion changes no model"),
    "a mesh that does not fit": (["--from=hf:{folder}", "--to=b", "--config.mesh.model=3"], "config.mesh"),
    "no run": (["--from=no/such", "--to=hf:b"], "no such folder"),
    "a directory for a run": (["--from={folder}", "--to=hf:b"], "Write --from hf:"),
    "a size": (["--from={folder}", "--to=hf:b", "--max_shard_size=big"], "write a size such as 5GB"),
    "a target that exists": (["--from=hf:{folder}", "--to={folder}"], "exists. Give a new folder"),
}


@pytest.mark.parametrize(("argv", "says"), FLAGS.values(), ids=FLAGS.keys())
def test_flags(argv, says, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert says in mistake(["convert", *[flag.format(folder=folder) for flag in argv]], capsys)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5k", 1500), ("10", 10)])
def test_sizes(text, size):
    assert parse_size(text) == size


# What another model would compute: (model of tests/interop/hf/models.py, key, value, what is said).
NOT_COMPUTED = [
    ("llama", "attention_bias", True, "attention_bias=true is not computed here; only false is"),
    ("llama", "mlp_bias", True, "mlp_bias=true"),
    ("llama", "hidden_act", "gelu_10", 'hidden_act="gelu_10" is not computed here; one of gelu'),
    ("llama", "partial_rotary_factor", 0.5, "partial_rotary_factor=0.5"),
    ("llama", "rope_parameters", {"rope_type": "longrope", "long_factor": [1]}, 'rope_type="longrope"'),
    ("llama", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
    ("llama", "rope_parameters", {"full_attention": {"rope_type": "default"}}, "one set for all layers is"),
    ("llama", "rope_scaling", {"type": "su", "factor": 2}, 'rope_type="su"'),
    ("llama", "rope_scaling", {"type": "linear", "factor": 0.5}, "factor=0.5"),
    ("llama", "rope_scaling", {"type": "yarn", "factor": 2, "truncate": False}, "truncate=false"),
    ("llama", "rope_scaling", {"type": "yarn", "factor": 2, "novel": 3}, "novel of rope_type yarn=3"),
    ("llama", "rope_scaling", {"type": "dynamic", "factor": 2, "original_max_position_embeddings": 9}, "=9"),
    ("qwen2_window", "layer_types", ["full_attention", "sliding_attention"], "layer_types="),
    ("qwen2_window", "layer_types", ["chunked_attention"] * 2, "layer_types="),
    ("qwen3", "attention_bias", True, "attention_bias=true"),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx=true"),
    ("gpt2", "scale_attn_weights", False, "scale_attn_weights=false"),
    ("gpt2", "add_cross_attention", True, "add_cross_attention=true"),
    ("bloom", "apply_residual_connection_post_layernorm", True, "apply_residual_connection_post_layernorm=true"),
    ("bert", "is_decoder", True, "is_decoder=true"),
    ("bert", "position_embedding_type", "relative_key", 'position_embedding_type="relative_key"'),
]


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, dict]:
    """The config.json of each model, as transformers writes it."""
    found = {}
    for name in {row[0] for row in NOT_COMPUTED}:
        folder = tmp_path_factory.mktemp(name)
        make(*MODELS[name]).config.save_pretrained(folder)
        architecture = {"architectures": [MODELS[name][0]]}
        found[name] = json.loads((folder / "config.json").read_text()) | architecture
    return found


@pytest.mark.parametrize(("name", "key", "value", "says"), NOT_COMPUTED)
def test_what_is_not_computed_is_refused(name, key, value, says, configs, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(configs[name]))
    read_model(file)
    file.write_text(json.dumps(configs[name] | {key: value}))
    with pytest.raises(UserError) as refusal:
        read_model(file)
    assert str(file) in str(refusal.value) and says in str(refusal.value)


def test_windows_of_some_layers_are_refused(configs, tmp_path):
    """transformers 4 counts the layers that see everything."""
    file = tmp_path / "config.json"
    config = {key: value for key, value in configs["qwen2_window"].items() if key != "layer_types"}
    window = {"use_sliding_window": True, "sliding_window": 7}
    for layers, sees in ((0, 7), (2, 0), (28, 0)):
        file.write_text(json.dumps(config | window | {"max_window_layers": layers}))
        assert read_model(file).model.sliding_window == sees
    file.write_text(json.dumps(config | window | {"max_window_layers": 1}))
    with pytest.raises(UserError, match="layer_types"):
        read_model(file)


def test_code_of_the_directory_is_not_run(folder, capsys):
    change("auto_map", {"AutoModel": "modeling.Mine"})(folder)
    (folder / "modeling.py").write_text("raise SystemExit('code of the directory was run')")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Explodes()))  # beside safetensors: passed over
    assert main(["convert", "--from", f"hf:{folder}", "--to", str(folder.parent / "run")]) == 0
    assert "auto_map is ignored" in capsys.readouterr().err


def test_a_value_that_float16_cannot_hold(tmp_path, capsys):
    model = make("GPT2LMHeadModel", GPT2)
    with torch.no_grad():
        model.transformer.wpe.weight[3, 4] = -70_000.0
    folder = save(model, tmp_path / "hf")
    assert main(["convert", "--from", f"hf:{folder}", "--to", str(tmp_path / "run")]) == 0
    argv = ["convert", "--from", str(tmp_path / "run"), "--to", f"hf:{tmp_path / 'back'}", "--dtype=float16"]
    capsys.readouterr()
    assert "transformer.wpe.weight has the value 70000, and float16 ends at 65504" in mistake(argv, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]
