"""Tiny models of transformers with their runs, and random adapters for them: made by PEFT, and made here."""

import dataclasses
import functools
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxllm.generate.run import cast_for_use, read_run_config, restore_for_use
from jaxllm.interop.hf.load import import_directory, write_json
from jaxllm.interop.merge import adapted_spec
from jaxllm.interop.peft.export import export_adapter
from jaxllm.interop.peft.load import import_adapter
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.lora_trees import started
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.config import Config, config_dict
from jaxllm.train.initial import ORIGIN, newest_identity
from tests.interop.hf.models import MODELS, VOCABULARY, make, save, torch, transformers

peft = pytest.importorskip("peft")

TOKENS = np.random.default_rng(1).integers(3, VOCABULARY, (2, 20))
ONE = make_layout(MeshConfig(data=1), LayoutConfig(zero_stage=0), devices=jax.devices()[:1])
# What PEFT warns of that loses nothing.
HARMLESS = (
    "fan_in_fan_out is set to",
    ".*is_gradient_checkpointing",
    ".*pattern keys did not match any targeted module",
)


class Base(NamedTuple):
    """A model in both forms."""

    name: str
    directory: Path
    run: Path

    def theirs(self):
        """A fresh copy of the model of transformers."""
        kind = getattr(transformers, MODELS[self.name][0])
        return kind.from_pretrained(self.directory, attn_implementation="eager").eval()


@functools.cache
def make_base(name: str, folder: Path) -> Base:
    """With a tokenizer in `folder / "tokenizer"`."""
    base = Base(name, save(make(*MODELS[name]), folder / name / "hf"), folder / name / "run")
    shutil.copytree(folder / "tokenizer", base.directory, dirs_exist_ok=True)
    import_directory(base.directory, base.run, Config(), silent)
    return base


def silent(line: str) -> None:
    """Takes what a conversion says."""


def made_by_peft(base: Base, folder: Path, kind: str = "LoraConfig", **fields: Any) -> np.ndarray:
    """Writes an adapter of PEFT's with random weights to `folder`. Returns the logits of the adapted model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base.theirs(), getattr(peft, kind)(**fields)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif ".lora_" in name or "prompt_encoder" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return logits_of(model)


def logits_of(model) -> np.ndarray:
    """Those of the tokens, without those of virtual ones before them."""
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()[:, -TOKENS.shape[1] :]


def loaded_by_peft(base: Base, folder: Path):
    """The model with the adapter in `folder`; PEFT must find every tensor that it looks for, and no other."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for harmless in HARMLESS:
            warnings.filterwarnings("ignore", harmless)
        model = peft.PeftModel.from_pretrained(base.theirs(), folder).eval()
    result = peft.set_peft_model_state_dict(model, peft.utils.load_peft_weights(str(folder), device="cpu"))
    virtual = {"prompt_embeddings"} & set(result.unexpected_keys)  # goes into no parameter of that name
    assert set(result.unexpected_keys) == virtual
    assert not [name for name in result.missing_keys if ".lora_" in name]
    if virtual:
        kept = safetensors.numpy.load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
        np.testing.assert_array_equal(model.prompt_encoder["default"].embedding.weight.detach().numpy(), kept)
    return model


def logits_here(workdir: Path) -> np.ndarray:
    """Those of a run, in float32; of an adapter's beside its base."""
    config = read_run_config(workdir)
    spec = adapted_spec(workdir, config)
    _, params = restore_for_use(workdir, config, spec, ONE, silent)

    @jax.jit
    def logits(weights, tokens):
        model = spec.merge(weights)
        return model.head.logits(model(tokens))

    tokens = np.pad(TOKENS, [(0, 0), (config.adapter.places, 0)])
    found = logits(cast_for_use(params, spec, ONE, "float32"), jnp.asarray(tokens))
    return np.asarray(found)[:, config.adapter.places :]


@functools.cache
def parameters_of(base: Path):
    """Those of the run of a model."""
    config = read_run_config(base)
    return restore_for_use(base, config, adapted_spec(base, config), ONE, silent)[1]


def made_here(base: Base, workdir: Path, adapter: AdapterConfig) -> Path:
    """Writes the run of an adapter with random weights, as if it had been trained."""
    of_base = read_run_config(base.run)
    train = dataclasses.replace(of_base.train, init_from=str(base.run))
    step = "prompt" if adapter.places else "lora"
    config = dataclasses.replace(of_base, train_step=step, adapter=adapter, train=train)
    spec, params = adapted_spec(base.run, config), parameters_of(base.run)

    def drawn(path, leaf):
        """Also of what stands still, so that nothing is what it began as by chance."""
        return leaf + 0.15 * jax.random.normal(jax.random.fold_in(jax.random.key(0), len(str(path))), leaf.shape)

    own = jax.jit(lambda params: jax.tree_util.tree_map_with_path(drawn, spec.own(started(spec, params, 1))))(params)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save_params(own, config_dict(config), newest_identity(base.run))
    write_json(workdir / "config.json", config_dict(config))
    for folder in ("tokenizer", ORIGIN):
        shutil.copytree(base.run / folder, workdir / folder)
    return workdir


def to_run(base: Base, folder: Path, workdir: Path) -> Path:
    import_adapter(folder, base.run, workdir, read_run_config(base.run), silent)
    return workdir


def to_peft(workdir: Path, folder: Path) -> Path:
    export_adapter(workdir, folder, dataclasses.replace(read_run_config(workdir), mesh=MeshConfig()), silent)
    return folder
