"""Hugging Face -> jaxllm -> Hugging Face: the same bits, and transformers loads what was written."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch

from jaxllm.cli.main import main
from jaxllm.data.tokenizer_training import train_tokenizer
from jaxllm.errors import UserError
from jaxllm.generate.run import open_run, read_run_config
from jaxllm.interop.hf.config import read_model, write_model
from jaxllm.interop.hf.export import export_run
from jaxllm.interop.hf.load import import_directory, load_params, open_directory
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout, use_layout
from jaxllm.model import presets
from jaxllm.model.config import ModelConfig, differing
from jaxllm.model.spec import model_spec
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.config import Config, PrecisionConfig, config_dict
from jaxllm.train.optimizer import make_optimizer
from jaxllm.train.state import init_state
from tests.data import huggingface as tokenizers
from tests.interop.hf.models import LLAMA, MODELS, ROPE, VOCABULARY, make, save, stretched, torch, transformers

SHARD = 30_000  # bytes: several files


def to_run(folder: Path, workdir: Path, **layout) -> Path:
    import_directory(folder, workdir, Config(**layout), print)
    return workdir


def to_directory(workdir: Path, folder: Path, dtype: str | None = None, shard: int = SHARD) -> Path:
    export_run(workdir, folder, read_run_config(workdir), dtype, shard, print)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in safetensors.torch.load_file(file).items()}


def same_bits(first: Path, second: Path) -> None:
    ours, theirs = tensors(first), tensors(second)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


DTYPES = dict(zip(MODELS, ("float32", "bfloat16", "float16") * len(MODELS), strict=False))


@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
def test_same_bits(name, dtype, tmp_path, tokenizer):
    model = make(*MODELS[name], dtype=dtype)
    first = save(model, tmp_path / "first", tokenizer, max_shard_size=SHARD)
    second = to_directory(to_run(first, tmp_path / "run"), tmp_path / "second")
    same_bits(first, second)
    index = json.loads((second / "model.safetensors.index.json").read_text())
    found = tensors(second)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in found.values())
    assert set(index["weight_map"]) == set(found) and set(index["weight_map"].values()) == {
        file.name for file in second.glob("*.safetensors")
    }
    assert (second / "tokenizer.model").read_bytes() == (first / "tokenizer.model").read_bytes()
    if (first / "generation_config.json").exists():
        assert (second / "generation_config.json").read_bytes() == (first / "generation_config.json").read_bytes()
    assert (
        json.loads((second / "config.json").read_text()).items()
        >= json.loads((first / "config.json").read_text()).items()
    )
    kind = type(model)
    loaded, info = kind.from_pretrained(second, output_loading_info=True, dtype="auto", attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)
    assert type(transformers.AutoConfig.from_pretrained(second)) is kind.config_class


def test_a_file_of_several_dtypes_keeps_them(tmp_path):
    model = make("LlamaForCausalLM", LLAMA, dtype="bfloat16")
    model.model.norm.float()
    model.model.layers[1].self_attn.q_proj.half()
    first = save(model, tmp_path / "first")
    second = to_directory(to_run(first, tmp_path / "run"), tmp_path / "second", shard=10**9)
    same_bits(first, second)
    third = to_directory(tmp_path / "run", tmp_path / "third", dtype="float32")
    assert {tensor.dtype for tensor in tensors(third).values()} == {torch.float32}
    assert json.loads((third / "config.json").read_text())["dtype"] == "float32"


def test_one_whole_file_is_the_same_to_the_byte(tmp_path):
    first = save(make("LlamaForCausalLM", LLAMA), tmp_path / "first")
    second = to_directory(to_run(first, tmp_path / "run"), tmp_path / "second", shard=10**9)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "layout",
    [
        {"mesh": MeshConfig(data=4, model=2)},
        {"mesh": MeshConfig(data=2, model=4), "layout": LayoutConfig(zero_stage=3)},
        {"mesh": MeshConfig(data=2, pipeline=2, model=2)},
        {"mesh": MeshConfig(data=2, expert=2, model=2)},
        {"mesh": MeshConfig(replica=2, data=4), "layout": LayoutConfig(zero_stage=0)},
    ],
    ids=lambda layout: " ".join(f"{k}={v}" for k, v in dataclasses.asdict(layout["mesh"]).items() if v > 1),
)
@pytest.mark.parametrize("name", ["gpt2", "bloom", "mixtral"])
def test_every_layout_reads_the_same(name, layout, tmp_path):
    directory = open_directory(save(make(*MODELS[name]), tmp_path / "hf"))
    one = make_layout(MeshConfig(data=1), LayoutConfig(), devices=jax.devices()[:1])
    many = make_layout(layout["mesh"], layout.get("layout", LayoutConfig()))
    expected, found = load_params(directory, one), load_params(directory, many)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found)) or not layout.get("layout")


def test_names_without_the_prefix_and_with_buffers(tmp_path):
    """As GPT-2 lies on the hub: no "transformer.", causal masks, and a copy of the tied head."""
    whole = save(make(*MODELS["gpt2"]), tmp_path / "whole")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((whole / "config.json").read_bytes())
    content = {name.removeprefix("transformer."): tensor for name, tensor in tensors(whole).items()}
    buffers = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    copy = {"lm_head.weight": content["wte.weight"].clone()}
    safetensors.torch.save_file(content | buffers | copy, bare / "model.safetensors")
    same_bits(whole, to_directory(to_run(bare, tmp_path / "run"), tmp_path / "back"))
    copy["lm_head.weight"][5, 3] += 1
    safetensors.torch.save_file(content | copy, bare / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight differs from wte.weight.*tie_word_embeddings"):
        open_directory(bare)


def test_an_old_bert_of_pretraining(tmp_path, capsys):
    """gamma and beta, position ids, a pooler and the head that guesses the next sentence."""
    whole = save(make(*MODELS["bert"]), tmp_path / "whole")
    old = tmp_path / "old"
    old.mkdir()
    config = json.loads((whole / "config.json").read_text()) | {"architectures": ["BertForPreTraining"]}
    (old / "config.json").write_text(json.dumps(config))
    spell = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")  # noqa: E731
    content = {spell(name): tensor for name, tensor in tensors(whole).items()}
    assert any("gamma" in name for name in content)
    more = {"bert.pooler.dense.bias": torch.ones(32), "cls.seq_relationship.bias": torch.ones(2)}
    more |= {
        "bert.embeddings.position_ids": torch.arange(128)[None],
        "cls.predictions.decoder.bias": content["cls.predictions.bias"].clone(),
    }
    safetensors.torch.save_file(content | more, old / "model.safetensors")
    same_bits(whole, to_directory(to_run(old, tmp_path / "run"), tmp_path / "back"))
    said = capsys.readouterr().out
    assert "left out" in said and "bert.pooler.dense.bias" in said and "cls.seq_relationship.bias" in said


def test_a_model_trained_on_keeps_its_origin(tmp_path, tokenizer):
    """Import, one step that moves nothing, export: the same bits, dtype and unknown keys."""
    first = save(make("LlamaForCausalLM", LLAMA, dtype="bfloat16"), tmp_path / "first", tokenizer)
    config = json.loads((first / "config.json").read_text()) | {"my_own_key": [1, 2]}
    (first / "config.json").write_text(json.dumps(config))
    run = to_run(first, tmp_path / "run")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    argv = ["train", f"--workdir={tmp_path / 'tuned'}", f"--config={_experiment(tmp_path)}"]
    argv += [f"--config.model={run}", f"--config.train.init_from={run}", f"--config.data.tokenizer={run / 'tokenizer'}"]
    assert main(argv) == 0
    back = to_directory(tmp_path / "tuned", tmp_path / "back", shard=10**9)
    same_bits(first, back)
    assert json.loads((back / "config.json").read_text())["my_own_key"] == [1, 2]
    assert json.loads((tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()[0])["loss"] > 0


def _experiment(tmp_path: Path) -> Path:
    file = tmp_path / "experiment.py"
    file.write_text(f"""
from jaxllm.train.config import base_config

def get_config():
    config = base_config()
    config.data.update(path={str(tmp_path / "text.txt")!r}, cache={str(tmp_path)!r})
    config.data.update(length=32, batch_size=8, held_out="")
    config.optimizer.update(learning_rate=1e-30, weight_decay=0.0, warmup_steps=0)
    config.train.update(steps=1, eval_every=0)
    return config
""")
    return file


def test_init_from_refuses_another_model(tmp_path, tokenizer, capsys):
    run = to_run(save(make("LlamaForCausalLM", LLAMA), tmp_path / "first", tokenizer), tmp_path / "run")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    argv = ["train", f"--workdir={tmp_path / 'new'}", f"--config={_experiment(tmp_path)}", f"--config.model={run}"]
    argv += [f"--config.train.init_from={run}", f"--config.data.tokenizer={run / 'tokenizer'}"]
    changes = {
        "config.model.rope_theta: 10000.0 there, 5000.0 here": "--config.model.rope_theta=5000",
        "config.model.norm_epsilon: 1e-05 there, 0.1 here": "--config.model.norm_epsilon=0.1",
        "would be trained anew": "--config.data.tokenizer=bpe:310",
        "there is no checkpoint in it": f"--config.train.init_from={tmp_path}",
        "Import it first: jaxllm convert --from hf:": f"--config.train.init_from={tmp_path / 'first'}",
        "holds imported parameters": f"--workdir={run}",
    }
    for says, flag in changes.items():
        assert main([*argv, flag]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "new" / "checkpoints").exists() or not list((tmp_path / "new" / "checkpoints").iterdir())
    assert main([*argv, "--config.model.rope_scaling=yarn", "--config.model.rope_original_length=64"]) == 2
    assert "was trained on 128 tokens" in capsys.readouterr().err
    longer = ["--config.model.rope_scaling=yarn", "--config.model.rope_factor=2", "--config.model.max_length=256"]
    assert main([*argv, *longer, "--config.data.length=256"]) == 0
    exported = json.loads((to_directory(tmp_path / "new", tmp_path / "back") / "config.json").read_text())
    assert exported["rope_parameters"]["rope_type"] == exported["rope_scaling"]["rope_type"] == "yarn"
    assert exported["max_position_embeddings"] == 256


@pytest.mark.parametrize("kind", ["default", *ROPE])
def test_both_forms_of_rope_are_written_and_read(kind, tmp_path):
    architecture, config = stretched(kind) if kind != "default" else ("LlamaForCausalLM", LLAMA)
    file = save(make(architecture, config), tmp_path / "hf") / "config.json"
    read = read_model(file)
    _, keys = write_model(read.model, read.keys)
    assert keys["rope_theta"] == keys["rope_parameters"]["rope_theta"] == 10_000.0
    assert (keys["rope_scaling"] is None) == (kind == "default")
    longer = write_model(dataclasses.replace(read.model, max_length=999), read.keys)[1]
    assert longer["max_position_embeddings"] == (32 if kind == "dynamic" else 999)
    old = {key: value for key, value in keys.items() if key != "rope_parameters"}  # transformers 4
    new = {key: value for key, value in keys.items() if key not in ("rope_theta", "rope_scaling")}
    fresh = write_model(read.model, None)[1]
    for form in (old, new, keys, fresh):
        file.write_text(json.dumps(form))
        assert not differing(read_model(file).model, read.model)
        assert read_model(file).model.max_length == read.model.max_length
        theirs = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
        assert theirs.rope_parameters["rope_theta"] == 10_000.0
        assert theirs.rope_parameters["rope_type"] == ("default" if kind == "default" else ROPE[kind]["rope_type"])


PRESETS = {
    "GPT2LMHeadModel": presets.gpt2(),
    "LlamaForCausalLM": presets.llama31_8b(),
    "MistralForCausalLM": presets.mistral_7b(),
    "Qwen2ForCausalLM": presets.qwen2_7b(),
    "Qwen3ForCausalLM": presets.qwen3_8b(),
    "BloomForCausalLM": presets.bloom_560m(),
    "BertForMaskedLM": presets.bert_base(),
    "MixtralForCausalLM": presets.mixtral_8x7b(),
    "Qwen3MoeForCausalLM": presets.qwen3_235b_a22b(),
}


@pytest.mark.parametrize("architecture", PRESETS)
def test_a_model_of_ours_finds_its_family(architecture, tmp_path):
    model = ModelConfig(**PRESETS[architecture]).resolved(VOCABULARY)
    family, keys = write_model(model, None)
    assert family.architecture == architecture
    (tmp_path / "config.json").write_text(json.dumps(keys))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.vocab_size, theirs.num_hidden_layers) == (VOCABULARY, model.num_layers)


def test_a_model_that_nobody_has_is_refused():
    model = ModelConfig(
        positions="rope", norm="rmsnorm", gated_mlp=True, use_bias=False, activation="silu", qk_norm=True
    )
    model = dataclasses.replace(model, norm_position="post").resolved(VOCABULARY)
    with pytest.raises(UserError, match=r"config.model.norm_position='post' \(Qwen3ForCausalLM has 'pre'\)"):
        write_model(model, None)


def test_a_tokenizer_json_is_carried_both_ways(tmp_path, capsys):
    """As on the hub: the imported model is prompted in text, and transformers opens what is exported."""
    first = save(make("LlamaForCausalLM", LLAMA | {"vocab_size": 400}), tmp_path / "first")
    theirs = tokenizers.save("llama3", first)
    (first / "generation_config.json").unlink()  # its ids are then those of config.json
    run = to_run(first, tmp_path / "run")
    assert json.loads((run / "tokenizer" / "generation_config.json").read_text())["eos_token_id"] == 2
    argv = ["generate", f"--workdir={run}", "--prompt=the quick", "--max_new_tokens=3", "--temperature=0", "--json"]
    capsys.readouterr()
    assert main(argv) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 3
    second = to_directory(run, tmp_path / "second")
    for file in first.glob("*token*"):
        assert (second / file.name).read_bytes() == file.read_bytes(), file.name
    opened = transformers.AutoTokenizer.from_pretrained(second)
    assert opened("the quick 曹操")["input_ids"] == theirs("the quick 曹操")["input_ids"]


@pytest.fixture
def ours_on_disk(tmp_path, tokenizer) -> Path:
    """A WORKDIR as training leaves it: a Llama of float32 compute."""
    workdir = tmp_path / "ours"
    tokenizer.save(workdir / "tokenizer")
    sizes = {"num_layers": 2, "embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48, "max_length": 64}
    config = Config(model=ModelConfig(**presets.llama2_7b(**sizes)), precision=PrecisionConfig(compute="float32"))
    (workdir / "config.json").write_text(json.dumps(config_dict(config)))
    spec = model_spec(config.model.resolved(tokenizer.vocab_size))
    optimizer = make_optimizer(config.optimizer, config.train.steps, spec.axes)
    layout = make_layout(MeshConfig(data=4, model=2), LayoutConfig())
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(init_state(spec, optimizer, layout, seed=0), {}, config_dict(config), {})
    return workdir


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_transformers_reads_the_tokenizer_of_an_export_as_we_do(kind, ours_on_disk, tmp_path):
    """By its class, not by that of the model's family, which for a GPT-2 loses half of the text."""
    names = [*presets.__dict__, *transformers.AutoTokenizer.__dict__]  # words enough for either kind
    ours = train_tokenizer([f"the quick fox: {' '.join(names)}\n却说曹操"] * 3, kind=kind, vocab_size=320)
    shutil.rmtree(ours_on_disk / "tokenizer")
    ours.save(ours_on_disk / "tokenizer")
    folder = to_directory(ours_on_disk, tmp_path / "hf")
    (folder / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("the quick fox", "def main():\n    return 1\n", "héllo 却说  two  spaces", " lead", "a\n\nb\tc"):
        assert theirs(text)["input_ids"] == [ours.bos_id, *ours.encode(text)], text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


def test_a_run_of_ours_becomes_a_directory(ours_on_disk, tmp_path):
    """Trained here, without an origin: the family is found, and transformers computes what we compute."""
    folder = to_directory(ours_on_disk, tmp_path / "hf")
    opened = open_run(ours_on_disk)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = np.arange(3, 23)[None]
    ours = opened.spec.merge(opened.weights)
    with use_layout(opened.layout):
        logits = ours.head.logits(ours(jax.numpy.asarray(np.repeat(tokens, 8, 0))))[0]
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (opened.tokenizer.bos_id, opened.tokenizer.eos_id)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == opened.tokenizer.eos_id
