#!/usr/bin/env bash
# From a pretrained model to one that is aligned: fine-tuning, a reward model, PPO against it. Each stage is a run of its
# own; a stage that is done is not done again, so the same command goes on after an interruption.
#
#   launch/rlhf.sh BASE OUT CONVERSATIONS.jsonl PAIRS.jsonl PROMPTS.jsonl [--config.group.field=value ...]
#
# BASE is the WORKDIR of the pretrained model. Flags go to every stage: the mesh, the precision. Those of one stage are in
# SFT_FLAGS, REWARD_FLAGS and PPO_FLAGS. JAXLLM is the command: on a cluster, say, JAXLLM="srun jaxllm".
set -euo pipefail

[ $# -ge 5 ] || { sed -n '5p' "$0" >&2; exit 2; }
base=$1 out=$2 conversations=$3 pairs=$4 prompts=$5
shift 5
configs="$(cd "$(dirname "$0")/../configs" && pwd)"
jaxllm=${JAXLLM:-jaxllm}

stage() { # NAME START DATA [FLAGS …]: its run is in OUT/NAME
  local name=$1 start=$2 data=$3
  shift 3
  echo "--- $name" >&2
  # shellcheck disable=SC2086
  $jaxllm train --config "$configs/$name.py:$start" --workdir "$out/$name" --config.data.path="$data" "$@"
}

# shellcheck disable=SC2086
{
  stage sft "$base" "$conversations" "$@" ${SFT_FLAGS:-}
  stage reward "$out/sft" "$pairs" "$@" ${REWARD_FLAGS:-}
  stage ppo "$out/sft" "$prompts" --config.rollout.reward_model="$out/reward" \
    --config.ppo.critic_init_from="$out/reward" "$@" ${PPO_FLAGS:-}
}
echo "--- done: jaxllm chat --workdir $out/ppo" >&2
