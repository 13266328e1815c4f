"""WORKDIR/samples/STEP.jsonl: some answers of a rollout, with what they were worth."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxllm.data.prompts import Prompt
from jaxllm.rollout.verdict import Verdict
from jaxllm.rollout.writer import Written


def write_samples(
    workdir: Path, step: int, prompts: Sequence[Prompt], written: Written, verdict: Verdict, count: int
) -> None:
    """One JSON object an answer, the first `count`, of the rollout that `step` is the first to learn from."""
    if jax.process_index():
        return
    lines = []
    for row, (prompt, text) in enumerate(list(zip(prompts, written.texts, strict=True))[:count]):
        parts = {name: float(values[row]) for name, values in verdict.parts.items()}
        answer = written.answers[row]
        record = {"prompt": prompt.text, "answer": text, "reward": float(verdict.rewards[row]), "rewards": parts}
        record |= {"tokens": len(answer.tokens), "finish_reason": answer.finish_reason}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    folder = workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{step:08d}.jsonl").write_text("".join(lines), encoding="utf-8")
