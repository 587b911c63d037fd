#!/usr/bin/env bash
# The GPU suites in one command, on a machine without a network that is had for minutes:
#
#   OUT=folder bash benchmarks/gpu.sh [--check] [--wheel FILE] [--peers FOLDER] [--rehearse] [arguments of run.py ...]
#
# Needs a python3 (or $PYTHON) with torch for CUDA, triton, pytest and pytest-timeout (with pytest-xdist the tests take
# a fraction of the time); the suite gpu-update needs transformers and accelerate too, and its TRL provider datasets.
# A wheel is taken as it is: build it anew after a change.
# Installs the wheel (default: the newest of dist/, or one built here) and the wheels of peers in FOLDER with --no-deps
# into folders under build/, so that the machine's packages stay as they are. Then:
#
#   --check  what a first visit needs to know: tests/gpu, the trainer's tests on the device, the candidate kernels
#            against the library's, and each suite's first case once, with what every provider's first call costs
#   else     run.py: the tests of each operation, and the suites `gpu gpu-loss la-tb gpu-update gpu-n gpu-rollout` if
#            none are named, each stopped after --time-limit seconds (default 70; a case that has begun is finished)
#
# JSONL rows and logs go to $OUT (default build/gpu-out); the last lines are a short table. --rehearse does all that on
# a CPU with tiny shapes and measures nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wheel="" peers="" check="" rehearse="" arguments=()
while (($#)); do
  case "$1" in
    --check) check=1; shift ;;
    --wheel) wheel="$2"; shift 2 ;;
    --peers) peers="$2"; shift 2 ;;
    --rehearse) rehearse=1; arguments+=(--rehearse --limit 1 --min-reps 2 --max-reps 2); shift ;;
    *) arguments+=("$1"); shift ;;
  esac
done
python="${PYTHON:-python3}"
OUT="${OUT:-build/gpu-out}"
site=build/gpu-site
rm -rf "$site" && mkdir -p "$OUT" "$site/own" "$site/peers"

install() { # install FOLDER WHAT
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation --no-compile \
    --upgrade --target "$1" "$2" >>"$OUT/install.log" 2>&1
}

say() { echo "[$SECONDS s] $*"; }

run_tests() { # run_tests LOG ARGUMENT ...; not `python -m pytest`: kernels/ would shadow a package of that name
  local log="$1"; shift
  "$python" -c "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))" \
    -q -p no:cacheprovider "${workers[@]}" "$@" >"$OUT/$log" 2>&1
  say "$log: $(tail -n 1 "$OUT/$log")"
  grep -E "^(FAILED|ERROR)" "$OUT/$log" | cut -c1-160 | head -n 20
}

[[ -n "$wheel" ]] || wheel="$(ls -t dist/powerflow_fast-*.whl 2>/dev/null | head -n 1)"
say "installing ${wheel:-a wheel built from this folder}"
if ! install "$site/own" "${wheel:-.}"; then
  tail -n 30 "$OUT/install.log"
  exit 1
fi
if [[ -n "$peers" ]]; then
  for file in "$peers"/*.whl; do # one by one: a wheel that doesn't fit leaves the others
    install "$site/peers" "$file" || echo "not installed: $(basename "$file"), see install.log"
  done
fi

export PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD/$site/own${PYTHONPATH:+:$PYTHONPATH}" # the installed package, not this checkout's folder
workers=()
"$python" -c "import xdist" 2>/dev/null && workers=(-n "$(($(nproc) > 8 ? 8 : $(nproc)))")
named=""
for argument in ${arguments[@]+"${arguments[@]}"}; do
  case "$argument" in gpu | gpu-* | cpu | cpu-* | la-tb) named=1 ;; esac
done

if [[ -n "$check" ]]; then
  [[ -n "$named" ]] || arguments=(la-tb gpu-update gpu gpu-loss gpu-rollout ${arguments[@]+"${arguments[@]}"})
  run_tests tests-gpu.log tests/gpu
  run_tests tests-trainer.log tests/test_{trainer,resume,update,packing,self_check,models,optim,checkpoint}.py \
    tests/test_{rollout,rollout_continuous,liger,out_of_memory,logprobs,linear_la_tb,quantization}.py
  [[ -n "$rehearse" ]] || "$python" benchmarks/candidates/check.py --out "$OUT" 2>&1 | tee "$OUT/candidates.log" | tail -n 40
  arguments+=(--skip-tests --limit 1 --min-reps 1 --max-reps 2 --budget 1)
else
  [[ -n "$named" ]] || arguments=(gpu gpu-loss la-tb gpu-update gpu-n gpu-rollout ${arguments[@]+"${arguments[@]}"})
  arguments=(--budget 2 --time-limit 70 "${arguments[@]}") # what is named twice counts as it is named last
fi
"$python" benchmarks/run.py --peers "$site/peers" --out "$OUT" "${arguments[@]}" 2>&1 | tee "$OUT/run.log"
status=${PIPESTATUS[0]}
"$python" benchmarks/render.py --results "$OUT" --summary
say "run.py: exit $status"
exit "$status"
