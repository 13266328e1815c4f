"""Every family against transformers: logits, loss, gradients and greedy text, in float32."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.generate import decode
from jaxllm.generate.decode import Decoder
from jaxllm.generate.run import Run, open_run, read_run_config
from jaxllm.generate.sampling import Sampling
from jaxllm.interop.hf.export import as_in_file
from jaxllm.interop.hf.load import Directory, import_directory, load_params, open_directory
from jaxllm.interop.hf.tensors import file_tensors
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.layout.scope import map_leaves
from jaxllm.train.config import Config, PrecisionConfig
from tests.interop.hf.models import MODELS, ROPE, VOCABULARY, make, save, stretched, torch

LENGTHS = ((20, 12), (25,))  # two documents in one row; one and padding
WIDTH = 32


class Pair(NamedTuple):
    """One model in both forms."""

    theirs: object
    directory: Directory
    params: dict


def pair(model: tuple[str, dict], folder) -> Pair:
    theirs = make(*model)
    directory = open_directory(save(theirs, folder))
    layout = make_layout(MeshConfig(data=1), LayoutConfig(zero_stage=0), devices=jax.devices()[:1])
    return Pair(theirs, directory, load_params(directory, layout))


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory) -> Pair:
    return pair(MODELS[request.param], tmp_path_factory.mktemp(request.param))


def documents() -> list[np.ndarray]:
    draw = np.random.default_rng(1)
    return [draw.integers(3, VOCABULARY, length) for row in LENGTHS for length in row]


def packed() -> dict[str, np.ndarray]:
    """The documents in rows: tokens, positions and segments, 0 where there is padding."""
    batch = {name: np.zeros((len(LENGTHS), WIDTH), np.int32) for name in ("tokens", "positions", "segment_ids")}
    waiting = iter(documents())
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for segment, length in enumerate(lengths, start=1):
            place = row, slice(start, start + length)
            batch["tokens"][place] = next(waiting)
            batch["positions"][place] = np.arange(length)
            batch["segment_ids"][place] = segment
            start += length
    return batch


def places() -> list[tuple[int, slice]]:
    """Where each document lies in the batch."""
    return [(r, slice(sum(row[:i]), sum(row[: i + 1]))) for r, row in enumerate(LENGTHS) for i in range(len(row))]


def test_logits_of_padded_and_packed_rows(both):
    model, batch = both.directory.spec.merge(both.params), packed()
    ours = np.asarray(jax.jit(lambda **batch: model.head.logits(model(**batch)))(**batch))
    for place, tokens in zip(places(), documents(), strict=True):
        theirs = both.theirs(torch.tensor(tokens)[None]).logits[0].detach().numpy()
        np.testing.assert_allclose(ours[place], theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)


def test_token_types(tmp_path):
    theirs, directory, params = pair(MODELS["bert"], tmp_path)
    model, draw = directory.spec.merge(params), np.random.default_rng(4)
    tokens, types = draw.integers(3, VOCABULARY, (2, 20)), draw.integers(0, 2, (2, 20))
    ours = model.head.logits(model(jnp.asarray(tokens), token_types=jnp.asarray(types)))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), token_type_ids=torch.tensor(types)).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_loss_and_gradients(both):
    """Of the next token or, for BERT, of every third one from its own place; each tensor under its name in the file."""
    spec, batch, is_causal = both.directory.spec, packed(), both.directory.spec.config.causal
    mask = np.zeros((len(LENGTHS), WIDTH), bool)
    total, count = torch.zeros(()), 0
    for place, tokens in zip(places(), documents(), strict=True):
        ids = torch.tensor(tokens)
        logits = both.theirs(ids[None]).logits[0]
        scored = np.arange(1, len(tokens)) if is_causal else np.arange(0, len(tokens), 3)
        mask[place[0], place[1].start + scored] = True
        total = total + torch.nn.functional.cross_entropy(logits[scored - is_causal], ids[scored], reduction="sum")
        count += len(scored)
    both.theirs.zero_grad()
    (total / count).backward()

    def loss(params):
        model = spec.merge(params)
        hidden = model(**batch)
        score = model.head.next_token_loss if is_causal else model.head.token_loss
        found = score(hidden, batch["tokens"], jnp.asarray(mask))
        return found.total / found.weight

    found, gradients = jax.jit(jax.value_and_grad(loss))(both.params)
    np.testing.assert_allclose(found, float(total.detach()) / count, rtol=1e-5)
    by_path = map_leaves(lambda leaf, _: leaf, gradients, spec.axes)
    theirs = gradients_by_file_name(both.theirs)
    ours = {name: as_in_file(tensor, by_path) for name, tensor in file_tensors(both.directory.pieces).items()}
    assert set(ours) == set(theirs)
    largest = max(np.abs(gradient).max() for gradient in theirs.values())
    for name, gradient in ours.items():
        # Softmax does not see the bias of the keys: its gradient is rounding alone.
        near = 1e-4 * np.abs(theirs[name]).max() + 1e-7 * largest
        np.testing.assert_allclose(gradient, theirs[name], atol=near, rtol=0, err_msg=name)


def gradients_by_file_name(model) -> dict[str, np.ndarray]:
    """transformers stacks experts in memory, and writes a tensor each."""
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    mixtral = type(model).__name__.startswith("Mixtral")
    for name in [name for name in gradients if ".mlp.experts." in name]:
        block, _, stacked = name.rpartition(".")
        names = ("w1", "w3") if mixtral else ("gate_proj", "up_proj")
        for expert, gradient in enumerate(gradients.pop(name)):
            if stacked == "down_proj":
                gradients[f"{block}.{expert}.{'w2' if mixtral else 'down_proj'}.weight"] = gradient
            else:
                both = zip(names, np.split(gradient, 2), strict=True)
                gradients |= {f"{block}.{expert}.{part}.weight": values for part, values in both}
    return {name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name: g for name, g in gradients.items()}


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2_window", "qwen3", "bloom", "mixtral", "qwen3_moe"])
def test_greedy_text_of_an_imported_run(name, tmp_path, tokenizer):
    theirs = make(*MODELS[name])
    run = imported(theirs, tmp_path, tokenizer)
    compare_text(theirs, run, [documents()[0], documents()[1]], 64)


def imported(theirs, tmp_path, tokenizer) -> Run:
    config = Config(mesh=MeshConfig(data=4, model=2))
    import_directory(save(theirs, tmp_path / "hf", tokenizer), tmp_path / "run", config, print)
    stored = dataclasses.replace(read_run_config(tmp_path / "run"), precision=PrecisionConfig(compute="float32"))
    one = dataclasses.replace(stored, mesh=MeshConfig(data=4, model=2), layout=LayoutConfig(zero_stage=0))
    return open_run(tmp_path / "run", one)


def compare_text(theirs, run: Run, prompts: list[np.ndarray], length: int) -> None:
    decoder = Decoder(run.spec, run.weights, run.layout)
    settings = [Sampling(temperature=0)] * len(prompts)
    ours = np.stack(list(decoder.generate([list(p) for p in prompts], settings, length, 0)), axis=1)
    theirs.generation_config.eos_token_id = None
    for row, prompt in zip(ours, prompts, strict=True):
        with torch.no_grad():
            text = theirs.generate(torch.tensor(prompt)[None], do_sample=False, max_new_tokens=length)
        np.testing.assert_array_equal(row, text[0, len(prompt) :].numpy())


@pytest.mark.parametrize("kind", ROPE)
def test_greedy_text_after_a_long_prompt_of_a_stretched_model(kind, tmp_path, tokenizer, monkeypatch):
    """Of 90 tokens, read in three parts, where 32 were trained on; dynamic scaling goes on changing with the text."""
    monkeypatch.setattr(decode, "CHUNK", 32)
    theirs = make(*stretched(kind))
    tokens = np.random.default_rng(3).integers(3, VOCABULARY, 90)
    compare_text(theirs, imported(theirs, tmp_path, tokenizer), [tokens, tokens[:20]], 30)


@pytest.mark.parametrize("kind", ROPE)
def test_scaled_rope_beyond_the_original_length(kind, tmp_path):
    """At 96 positions where 32 were trained on; and, for what changes with it, in a text of 20."""
    theirs, directory, params = pair(stretched(kind), tmp_path)
    assert directory.spec.config.rope_original_length == 32 and directory.spec.config.max_length == 128
    model = directory.spec.merge(params)
    tokens = np.random.default_rng(2).integers(3, VOCABULARY, 96)
    for length in (20, 96):
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens[:length])[None]).logits[0].numpy()
        ours = model.head.logits(model(jnp.asarray(tokens[None, :length])))[0]
        np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
