#!/usr/bin/env bash
# The GPU suites in one command, on a machine without a network:
#
#   OUT=folder bash benchmarks/gpu.sh [--wheel FILE] [--peers FOLDER] [--rehearse] [arguments of run.py ...]
#
# Needs a python3 (or $PYTHON) with torch for CUDA, triton, pytest and pytest-timeout; the suite gpu-update needs
# transformers and accelerate too, and its TRL provider datasets. Installs the wheel (default: the newest of dist/, or one
# built here) and the wheels of peers in FOLDER with --no-deps into folders under build/, so that the machine's packages
# stay as they are. Then run.py: the tests in tests/gpu, and the suites `gpu gpu-loss la-tb gpu-update gpu-n gpu-rollout`
# if none are named, each stopped after --time-limit seconds (default 420; a case that has begun is finished). JSONL rows and logs go
# to $OUT (default build/gpu-out); the last lines are a short table. --rehearse does all that on a CPU with tiny shapes and
# measures nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wheel="" peers="" arguments=()
while (($#)); do
  case "$1" in
    --wheel) wheel="$2"; shift 2 ;;
    --peers) peers="$2"; shift 2 ;;
    --rehearse) arguments+=(--rehearse --limit 1 --min-reps 2 --max-reps 2); shift ;;
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

[[ -n "$wheel" ]] || wheel="$(ls -t dist/powerflow_fast-*.whl 2>/dev/null | head -n 1)"
echo "installing ${wheel:-a wheel built from this folder}"
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
named=""
for argument in ${arguments[@]+"${arguments[@]}"}; do
  case "$argument" in gpu | gpu-* | cpu | cpu-* | la-tb) named=1 ;; esac
done
[[ -n "$named" ]] || arguments=(gpu gpu-loss la-tb gpu-update gpu-n gpu-rollout ${arguments[@]+"${arguments[@]}"})
"$python" benchmarks/run.py --peers "$site/peers" --out "$OUT" --time-limit 420 "${arguments[@]}" 2>&1 | tee "$OUT/run.log"
status=${PIPESTATUS[0]}
"$python" benchmarks/render.py --results "$OUT" --summary
echo "run.py: exit $status"
exit "$status"
