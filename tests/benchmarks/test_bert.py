"""The baseline of the BERT benchmark computes what it says, and a short run of it is below that already."""

import math
from collections import Counter
from pathlib import Path

import pytest

from jaxllm.data.config import DataConfig
from jaxllm.data.dataset import prepare
from jaxllm.data.masking import MASKED_ROWS
from tests.benchmarks import bert
from tests.benchmarks.sanguo import final_evaluation, train

WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext2_valid.txt"


def test_the_unigram_by_hand(tmp_path):
    """Counted again token by token from the text: every held-out row is one window here."""
    (tmp_path / "text.txt").write_text("".join(f"the dog {i} saw a fox\n" for i in range(60)), encoding="utf-8")
    config = DataConfig(path=f"{tmp_path}/text.txt", cache=f"{tmp_path}/cache", tokenizer="bpe:290", held_out="0.1")
    data = prepare(config, length=16, kind=MASKED_ROWS, progress=False)
    counts = Counter(data.train[0].read(0, data.train[0].index.tokens).tolist())
    total = sum(counts.values()) + 290
    targets = bert.held_out_targets(data).tolist()
    nats = [-math.log((counts[token] + 1) / total) for token in targets]
    assert bert.unigram_loss(data) == pytest.approx(sum(nats) / len(nats))
    assert math.fsum(math.exp(x) for x in bert.unigram(data)) == pytest.approx(1)
    assert len(targets) > 10


@pytest.mark.skipif(not WIKITEXT.exists(), reason=f"{WIKITEXT} is not there")
def test_a_short_run_is_below_the_unigram(tmp_path, monkeypatch):
    """By half a nat, after a tenth of the benchmark's steps. At the unigram is who learned nothing from the context."""
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, compiled to be fast
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    flags = ("--config.train.steps=100", "--config.train.eval_every=0", "--config.train.checkpoint_every=0")
    train(bert.CONFIG, str(WIKITEXT), tmp_path / "run", *flags)
    loss, baseline = final_evaluation(tmp_path / "run")["eval_loss"], bert.unigram_loss(bert.data_of(tmp_path / "run"))
    assert loss < baseline - 0.5
