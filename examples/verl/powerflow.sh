#!/usr/bin/env bash
# PowerFlow on verl, one node. train.parquet has the columns of any verl data set: prompt (chat messages), data_source,
# and reward_model, e.g. {"ground_truth": ""}.
#   MODEL=Qwen/Qwen2.5-1.5B TRAIN=train.parquet examples/verl/powerflow.sh [more overrides]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# With this, an installation that verl can't use with PowerFlow stops the run with the reason.
export VERL_USE_EXTERNAL_MODULES=powerflow_fast.integrations.verl

python -m verl.trainer.main_ppo --config-path="$here" --config-name=powerflow \
  powerflow.alpha="${ALPHA:-4}" \
  actor_rollout_ref.model.path="${MODEL:?a hub name or a folder}" \
  data.train_files="${TRAIN:?a parquet file}" \
  data.val_files="${VAL:-$TRAIN}" \
  data.train_batch_size=64 \
  data.max_prompt_length=1024 \
  data.max_response_length=2048 \
  actor_rollout_ref.actor.ppo_mini_batch_size=32 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  trainer.n_gpus_per_node="${GPUS:-1}" \
  trainer.save_freq=50 \
  trainer.total_epochs=1 \
  "$@"
