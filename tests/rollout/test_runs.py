"""Whole runs of reward, dpo, ppo and grpo: they learn, resume bit for bit, and share one base."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.generate import continuous
from jaxllm.generate.run import open_run
from jaxllm.report.run import read_run
from jaxllm.rollout.source import RolloutSource
from jaxllm.train import loop
from jaxllm.train.config import read_config
from jaxllm.train.metrics import TIMES, read_metrics
from jaxllm.train.watch.watchdog import Watchdog
from tests.benchmarks import alignment

TIMED = (*TIMES, "reshard_seconds", "rollout_tokens_per_second", "rollout_seconds")


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A small model that answers with random letters, its prompts and pairs."""
    return alignment.make_letters(tmp_path_factory.mktemp("letters"), steps=120, examples=1_500)


def ppo(letters, workdir, **ppo_fields):
    config = alignment.ppo_config(letters, letters.base.parent, steps=96)
    config.data.update(cache=str(letters.base.parent / "cache"))
    config.ppo.update(ppo_fields)
    return config


def lora(config):
    config.adapter.update(kind="lora", rank=4)
    config.optimizer.learning_rate = 5e-3
    return config


def trained(config, workdir, **how):
    if config.train.steps < 20:
        config.optimizer.warmup_steps = 0
    source = {"open_source": RolloutSource} if config.train_step in ("ppo", "grpo") else {}
    how = {"devices": jax.devices()[:1]} | source | how
    assert loop.train(read_config(config), workdir, quiet=True, **how) == loop.DONE
    return read_metrics(workdir / "metrics.jsonl")


@pytest.fixture(scope="module")
def reward_model(letters, tmp_path_factory):
    config = alignment.from_base(letters.base.parent, letters.base, "reward", letters.pairs, 60, 2e-3)
    config.model.scalar_head = True
    workdir = tmp_path_factory.mktemp("reward") / "run"
    return workdir, trained(config, workdir)


def test_ppo_raises_the_rule_it_is_rewarded_by(letters, tmp_path):
    """From chance to near the most in twelve rollouts, no further from the reference than it is let; with samples."""
    records = trained(ppo(letters, tmp_path), tmp_path / "run")
    told = [record for record in records if "reward" in record]
    assert told[0]["reward"] < 0.6 and records[-1]["eval_reward"] > 0.85
    assert max(record["kl"] for record in told) < 8
    assert all(record["log_prob_difference_max"] < 1e-4 for record in told)
    for name in ("entropy", "clip_fraction", "critic_loss", "critic_explained_variance"):
        assert np.isfinite(records[-1][name])
    assert told[-1]["response_length"] == pytest.approx(9, abs=0.5) and told[-1]["ended"] > 0.9
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples" / "00000001.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and set(samples[0]) >= {"prompt", "answer", "reward", "finish_reason"}
    shown = read_run(tmp_path / "run").samples
    assert len(shown) > len(samples)
    assert shown[-8][1:] == tuple(samples[0][name] for name in ("prompt", "answer", "reward"))


def test_the_first_update_starts_from_the_policy_that_wrote(letters, tmp_path):
    config = ppo(letters, tmp_path)
    config.train.update(steps=1, log_every=1)
    (record,) = trained(config, tmp_path / "run")
    assert record["ratio"] == pytest.approx(1, abs=1e-5) and record["policy_kl"] < 1e-6
    assert record["kl"] == pytest.approx(0, abs=1e-5) and record["clip_fraction"] == 0


def test_a_reward_model_ranks_pairs_and_ppo_against_it_raises_the_rule(letters, reward_model, tmp_path):
    workdir, records = reward_model
    assert records[-1]["eval_accuracy"] > 0.9 and records[-1]["eval_loss"] < 0.3
    config = ppo(letters, tmp_path, critic_init_from=str(workdir), kl_weight=0.2, kl_target=0.0)
    config.rollout.update(rewards="", reward_model=str(workdir))
    config.train.steps = 64
    before = alignment.mean_reward(letters.base, 100)
    records = trained(config, tmp_path / "run")
    told = [record for record in records if "reward_model" in record]
    assert told[-1]["reward_model"] > told[0]["reward_model"] + 1
    assert alignment.mean_reward(tmp_path / "run", 100) > before + 0.15


def test_dpo_raises_the_win_rate(letters, tmp_path):
    config = alignment.from_base(letters.base.parent, letters.base, "dpo", letters.pairs, 60, 1e-3)
    config.dpo.update(beta=0.3, nll_weight=0.5)
    config.train.log_every = 1
    records = trained(config, tmp_path / "run")
    nll = 0.5 * records[0]["nll_chosen"]
    assert records[0]["loss"] - nll == pytest.approx(np.log(2), abs=1e-4)  # the reference is where it starts
    assert records[-1]["eval_reward_accuracy"] > 0.85
    assert alignment.win_rate(tmp_path / "run", letters.base, 200) > 0.65


def test_the_reference_may_be_computed_once(letters, tmp_path):
    """Precomputed log-probabilities give the losses of those computed alongside; a resumed run finds them again."""
    config = alignment.from_base(letters.base.parent, letters.base, "dpo", letters.pairs, 6, 1e-3)
    config.optimizer.schedule = "constant"
    config.train.update(log_every=1, checkpoint_every=3)
    alongside = trained(config, tmp_path / "alongside")
    config.dpo.reference = "precomputed"
    config.train.steps = 3
    trained(config, tmp_path / "once")
    config.train.steps = 6
    once = trained(config, tmp_path / "once")
    assert len(once) == 6
    for one, other in zip(once, alongside, strict=True):
        for name in ("loss", "grad_norm", "reward_margin"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)
    assert once[-1]["eval_loss"] == pytest.approx(alongside[-1]["eval_loss"], rel=1e-4)
    (tmp_path / "once" / "reference_log_probs.npz").unlink()
    config.train.steps = 7
    refuse(config, tmp_path / "once", "reference_log_probs.npz cannot be read: the log-probabilities of the reference")


def test_grpo_learns_what_is_verified_and_nothing_from_a_coin(tmp_path):
    """Four letters reversed: the part of exact answers to held-out questions rises; the control's does not."""
    base, prompts, held_out = alignment.make_reversal(tmp_path, 120, letters=4, examples=3_000)
    found = {}
    for reward in ("is_exact", "coin"):
        config = alignment.grpo_config(base, prompts, tmp_path, reward, 80)
        config.model.update(embed_dim=96, mlp_dim=256)
        trained(config, tmp_path / reward)
        found[reward] = alignment.exact(tmp_path / reward, held_out, 1.0)
    before = alignment.exact(base, held_out, 1.0)
    assert found["is_exact"] > before + 0.3, (before, found)
    assert found["coin"] < before + 0.1, (before, found)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_killed_run_goes_on_bit_for_bit_in_the_middle_of_an_epoch(letters, tmp_path, kind):
    """The rollout, its order, the adaptive weight and what is told are those of a run never interrupted."""
    config = ppo(letters, tmp_path, epochs=2, kl_target=0.01, kl_horizon=100.0)
    config.rollout.update(prompts=32, samples=2)
    config.data.batch_size = 16
    config = lora(config) if kind == "lora" else config
    config.train.update(steps=13, log_every=1, checkpoint_every=11)
    whole = trained(config, tmp_path / "whole")
    killed = []

    class Killed(RolloutSource):
        def stepped(self, metrics):
            super().stepped(metrics)
            killed.append(1)
            if len(killed) == 11:  # the third of the second rollout's eight steps
                os.kill(os.getpid(), signal.SIGTERM)

    changed = read_config(config)
    assert (
        loop.train(changed, tmp_path / "killed", devices=jax.devices()[:1], quiet=True, open_source=Killed)
        == loop.PREEMPTED
    )
    again = trained(config, tmp_path / "killed")
    untimed = lambda records: [{k: v for k, v in r.items() if k not in TIMED} for r in records]  # noqa: E731
    assert len(again) == 13 and untimed(again) == untimed(whole)
    assert len({record["kl_weight"] for record in again if "kl_weight" in record}) == 2


@pytest.mark.parametrize("step, kind, number", [("ppo", "lora", 0), ("grpo", "full", 1)])
def test_rollouts_under_layouts(letters, tmp_path, step, kind, number):
    """One rollout and what is learned from it: pipelined and ZeRO 3 training, other meshes for writing."""
    if step == "ppo":
        config = ppo(letters, tmp_path)
    else:
        config = alignment.grpo_config(letters.base, letters.prompts, letters.base.parent, "good_letters", 1)
        config.grpo.kl_weight = 0.04
    config = lora(config) if kind == "lora" else config
    config.optimizer.epsilon = 1e-4
    config.rollout.update(prompts=8, samples=8)
    config.data.update(batch_size=32)
    config.train.update(steps=3, log_every=1)
    expected = trained(config, tmp_path / "one", devices=jax.devices()[:1])
    mesh, layout, rollout = [
        ({"pipeline": 2, "data": 2, "model": 2}, {"num_microbatches": 2, "zero_stage": 1}, {"model": 1}),
        ({"data": 8}, {"zero_stage": 3}, {"data": 4, "model": 2}),
    ][number]
    changed = config.copy_and_resolve_references()
    changed.mesh.update(mesh)
    changed.layout.update(layout | {"scan_layers": True})
    changed.rollout.mesh.update(rollout)
    found = trained(changed, tmp_path / "layout", devices=jax.devices())
    written = [(tmp_path / run / "samples" / "00000001.jsonl").read_text() for run in ("one", "layout")]
    answers = [[json.loads(line)["answer"] for line in text.splitlines()] for text in written]
    assert answers[0] == answers[1]
    for one, other in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", *(["critic_loss"] if step == "ppo" else [])):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), (mesh, name, one["step"])


def test_a_rollout_tells_that_it_is_alive(letters, tmp_path, monkeypatch):
    """Each time its rows have got some tokens: it may take longer than config.train.hang_timeout."""
    write, goes_on = continuous._Work.write, Watchdog.goes_on
    calls, silent = [], []  # of the decoder, in all and since the last sign of life

    def counted(work):
        calls.append(1)
        silent.append(1)
        assert len(silent) == 1
        return write(work)

    monkeypatch.setattr(continuous._Work, "write", counted)
    monkeypatch.setattr(Watchdog, "goes_on", lambda watchdog, doing: (silent.clear(), goes_on(watchdog, doing)))
    config = ppo(letters, tmp_path)
    config.rollout.slots = 8
    config.train.update(steps=1, log_every=1)
    trained(config, tmp_path / "run")
    assert len(calls) >= config.rollout.prompts * config.rollout.samples // 8


def test_early_stop_by_the_divergence(letters, tmp_path):
    """A rollout is given up once the policy has gone so far from the one that wrote."""
    config = ppo(letters, tmp_path, stop_kl=1e-7)
    config.train.update(steps=6, log_every=1)
    records = trained(config, tmp_path / "run")
    assert [record["rollout"] for record in records if "rollout" in record][-1] > 2
    assert any(record.get("stopped_early") for record in records)


def test_the_actor_of_a_run_is_used_like_any_model(letters, tmp_path):
    """Its checkpoint opens without the critic; a run may start from it."""
    config = ppo(letters, tmp_path)
    config.train.update(steps=2)
    trained(config, tmp_path / "run")
    assert "critic" not in open_run(tmp_path / "run").weights
    onward = alignment.from_base(letters.base.parent, tmp_path / "run", "dpo", letters.pairs, 1, 1e-3)
    trained(onward, tmp_path / "onward")


def refuse(config, workdir, says):
    with pytest.raises(UserError, match=says):
        trained(config, workdir)


def test_bad_input(letters, reward_model, tmp_path):
    """One or two lines, before anything is compiled."""
    config = ppo(letters, tmp_path)
    make = lambda: config.copy_and_resolve_references()  # noqa: E731
    long = make()
    long.rollout.max_new_tokens = 20
    refuse(long, tmp_path, r"prompts.jsonl:1: this prompt has \d+ tokens, and a row has room for 4")
    folded = make()
    folded.rollout.mesh.model = 3
    refuse(folded, tmp_path, "config.rollout.mesh")
    none = make()
    none.rollout.rewards = ""
    refuse(none, tmp_path, "config.train_step=ppo needs a reward")
    odd = make()
    odd.rollout.prompts = 33
    refuse(odd, tmp_path, "33 answers.*no multiple of config.data.batch_size=32. Nearest: prompts=32 or 64")
    noisy = make()
    noisy.model.dropout = 0.1
    refuse(noisy, tmp_path, "config.model.dropout=0.1: ppo learns from how probable an answer was")
    wrong = make()
    wrong.rollout.reward_model = str(letters.base)
    refuse(wrong, tmp_path, "train_step=sft, which gives texts no score")
    other = make()
    other.train.reference = str(reward_model[0])
    refuse(other, tmp_path, "config.train.reference=.* is another model")
    alone = alignment.from_base(letters.base.parent, letters.base, "reward", letters.pairs, 1, 1e-3)
    refuse(alone, tmp_path, "Set --config.model.scalar_head=True")
    critic = lora(make())
    critic.ppo.critic_init_from = str(reward_model[0])
    refuse(critic, tmp_path, "is no start for this run's critic.*adapter.kind")
    grpo = make()
    grpo.train_step = "grpo"
    refuse(grpo, tmp_path, "config.rollout.samples=1: grpo holds the answers to one prompt against each other")
