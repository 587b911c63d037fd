#!/usr/bin/env bash
# A GPU machine that is had for minutes and has no network: install, test and measure in one call.
#
#   OUT=folder bash benchmarks/gpu.sh call1|call2|PART ... [--carry FOLDER] [--commit HASH] [--seconds N] [--rehearse] [--run ".."]
#
# Needs a python3 (or $PYTHON) with torch for CUDA, triton, pytest, pytest-timeout and pytest-xdist; the parts that
# train need transformers and accelerate. FOLDER (default .carry, `prepare_gpu.sh` makes it) has the package's wheel,
# wheels of peers, archives, and maybe the triton-cache.tgz of an earlier visit. Everything is installed into folders
# under build/: the machine's own packages stay as they are. Archives stay unpacked for the next call, so that what is
# too large for one can come in two: a call without a wheel unpacks and ends.
#
#   call1   what a first visit must know: products, tests on the device, kernel by kernel times, first headlines,
#           the Hopper tile kernels beside Triton's
#   call2   what is published: the suites with all peers, an update of a whole model, tests of the trainer
#
# Each part has its own time limit: a part that hangs costs no other. Rows, logs and the Triton cache come back as two
# archives in $OUT, whatever happens; the last lines are a table of the parts and a summary of the rows. --rehearse does
# all that on a CPU with tiny shapes and measures nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

carry=.carry commit="" rehearse="" extra="" seconds=540 parts=()
while (($#)); do
  case "$1" in
    --carry) carry="$2"; shift 2 ;;
    --commit) commit="$2"; shift 2 ;;
    --seconds) seconds="$2"; shift 2 ;; # that all parts may take
    --run) extra="$2"; shift 2 ;;       # more arguments of run.py
    --rehearse) rehearse=1; shift ;;
    call1) parts+=(products tests kernels headlines tiles); shift ;;
    call2) parts+=(tests loss head update la-tb kernels trainer sweeps); shift ;;
    *) parts+=("$1"); shift ;;
  esac
done
python="${PYTHON:-python3}"
OUT="${OUT:-build/gpu-out}"
site=build/gpu-site work=build/gpu-work kept=$PWD/build/gpu-kept
rm -rf "$site" "$work" && mkdir -p "$OUT" "$site/own" "$site/peers" "$work"/{rows,tables,trainer}
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="$PWD/build/triton-cache"
mkdir -p "$TRITON_CACHE_DIR"
report=()

save() { # what there is so far: a call that is cut off leaves it
  tar -C "$work" -czf "$OUT/results.part" . && mv "$OUT/results.part" "$OUT/results.tgz"
}

finish() {
  printf '%s\n' "" "${report[@]}"
  "$python" benchmarks/render.py --results "$work/rows" --summary 2>&1 | cut -c1-420
  save
  # a few files of a kernel are enough to load it
  tar -C "$TRITON_CACHE_DIR" --exclude='*.llir' --exclude='*.ptx' --exclude='*.ttir' -czf "$OUT/triton-cache.tgz" .
}

part() { # part NAME SECONDS LINES COMMAND ...: at most SECONDS; the log's last LINES lines are shown
  local name="$1" limit="$2" lines="$3" start=$SECONDS status
  shift 3
  ((limit < seconds - SECONDS)) || limit=$((seconds - SECONDS))
  if ((limit < 8)); then
    report+=("$(printf '%-12s left out: no time' "$name")")
    return
  fi
  timeout --kill-after=5 "$limit" "$@" >"$work/$name.log" 2>&1
  status=$?
  save
  report+=("$(printf '%-12s exit %-4s %4s s of %s' "$name" "$status" "$((SECONDS - start))" "$limit")")
  echo "== [$SECONDS s] ${report[-1]}"
  tail -n "$lines" "$work/$name.log" | cut -c1-220
}

install() { # install FOLDER FILE ...
  local target="$1"; shift
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation --no-compile \
    --no-cache-dir --upgrade --target "$target" "$@"
}

tests() { # tests ARGUMENT ...; not `python -m pytest`: kernels/ would shadow a package of that name
  local workers=()
  [[ -n "$rehearse" ]] || workers=(-n 16)
  "$python" -c "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))" \
    -q -p no:cacheprovider --timeout 60 --no-header "${workers[@]}" --junitxml "$work/tests.xml" "$@"
}

run() { # run ARGUMENT ... of run.py
  local options=(--peers "$site/peers" --out "$work/rows")
  if [[ -f "$work/tests.xml" ]]; then options+=(--tests-report "$work/tests.xml"); else options+=(--skip-tests); fi
  [[ -z "$commit" ]] || options+=(--commit "$commit")
  [[ -z "$rehearse" ]] || options+=(--rehearse --min-reps 2 --max-reps 2)
  # shellcheck disable=SC2086
  "$python" benchmarks/run.py "${options[@]}" "$@" $extra
}
export -f tests run
export python rehearse commit extra site work

for archive in "$carry"/{first,second}/*.tar.xz; do
  [[ ! -f "$archive" ]] || { mkdir -p "$kept" && tar -C "$kept" -xJf "$archive" && echo "[$SECONDS s] unpacked $archive"; }
done
for archive in "$carry"/{,first/}triton-cache.tgz; do
  [[ ! -f "$archive" ]] || tar -C "$TRITON_CACHE_DIR" -xzf "$archive"
done
compgen -G "$carry/powerflow_fast-*.whl" >/dev/null || exit 0
trap finish EXIT
if ! install "$site/own" "$carry"/powerflow_fast-*.whl >"$work/install.log" 2>&1; then
  tail -n 30 "$work/install.log"
  exit 1
fi
for file in "$carry"/peers/*.whl; do # one by one: a wheel that doesn't fit leaves the others
  install "$site/peers" "$file" >>"$work/install.log" 2>&1 || echo "not installed: $(basename "$file")"
done
# the installed package, not this checkout's folder; the DSL's own .pth adds the second of its folders
export PYTHONPATH="$PWD/$site/own:$kept:$kept/nvidia_cutlass_dsl/dsl_packages${PYTHONPATH:+:$PYTHONPATH}"
echo "[$SECONDS s] installed; $("$python" -c 'import torch, triton; print(torch.__version__, triton.__version__)')"
[[ -n "$rehearse" ]] || nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit,memory.total --format=csv,noheader

# What compiles or tunes itself for most of a minute is left out of the suites; Liger's kernel, of three shapes.
liger="liger scaled CE" slow=("naive compiled" "verl triton" "powerflow_fast torch" "powerflow_fast one pass torch")
few="powerflow_fast,powerflow_fast one pass,powerflow_fast composed,naive,gemm,trl chunked,liger scaled CE"
few+=",cut-cross-entropy exact,eager packed,eager padded,unsloth fused"
for name in "${parts[@]}"; do
  case "$name" in
    products) part products 30 120 "$python" benchmarks/product_rates.py --out "$work/tables" ;;
    tests) part tests 80 40 bash -c 'tests tests/gpu' ;;
    kernels) part kernels 30 130 "$python" benchmarks/kernel_times.py --out "$work/tables" --commit "$commit" ;;
    tiles) part tiles 65 60 "$python" benchmarks/tile_times.py --out "$work/tables" --plans 64x4/2 32x8/4 --limit 60 ;;
    headlines)
      IFS=, read -ra names <<<"$few"
      part headlines 60 60 bash -c 'run gpu-loss gpu la-tb --limit 2 --budget 0.4 --time-limit 20 --providers "$@"' _ "${names[@]}" ;;
    loss)
      part loss 65 40 bash -c 'run "$@"' _ gpu-loss --limit 3 --budget 0.6 --time-limit 45 --without "${slow[@]}"
      part loss-rest 30 40 bash -c 'run "$@"' _ gpu-loss --skip 3 --budget 0.5 --time-limit 22 --without "${slow[@]}" "$liger" ;;
    head) part head 65 90 bash -c 'run "$@"' _ gpu --budget 0.4 --time-limit 50 --without "${slow[@]}" "$liger" ;;
    update) part update 50 30 bash -c 'run gpu-update --budget 6 --min-reps 2 --max-reps 3 --time-limit 40' ;;
    la-tb) part la-tb 15 20 bash -c 'run la-tb --budget 0.4 --time-limit 10 --without "eager packed compiled"' ;;
    trainer) part trainer 40 60 bash -c 'work=$work/trainer tests --tb=short --maxfail 5 tests/training/test_{train,update}.py' ;;
    sweeps) part sweeps 60 60 bash -c 'run "$@"' _ gpu-n --budget 0.4 --time-limit 40 --without "${slow[@]}" "$liger" ;;
    *) echo "no such part: $name" ;;
  esac
done
