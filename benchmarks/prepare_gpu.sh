#!/usr/bin/env bash
# Makes the folder that gpu.sh takes to a machine without a network: `bash benchmarks/prepare_gpu.sh [FOLDER]`.
#
#   FOLDER/powerflow_fast-*.whl   built here
#   FOLDER/peers/*.whl            pure wheels, installed there with --no-deps
#   FOLDER/first/*.tar.xz         the CUTLASS DSL, which Liger's Hopper kernel is compiled by, without its compiler
#   FOLDER/second/*.tar.xz        the compiler
#
# 64 MiB may travel in one call, and the DSL takes 60 of them: with `first` in one call and `second` in the next, on a
# machine that is still held, both fit. A wheel is taken as it is: run this again after a change.
# Needs $PYTHON (default python3) of the machine's Python version, 3.12, with torch and nvcc at hand, and xz.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="${1:-.carry}"
python="${PYTHON:-python3}"
peers=(liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0 verl==0.9.1 unsloth-zoo==2026.10.9)
dsl=(nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base nvidia-cutlass-dsl-libs-core nvidia-cutlass-dsl-libs-cu13)
pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }

mkdir -p "$folder/peers"
rm -f "$folder"/powerflow_fast-*.whl
pip wheel --no-deps --no-build-isolation --wheel-dir "$folder" .
pip download --no-deps --only-binary=:all: --dest "$folder/peers" "${peers[@]}"
[[ ! -f "$folder/second/cutlass-compiler.tar.xz" ]] || exit 0

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"/{first,second}
pip install --no-deps --no-compile --target "$work" "${dsl[@]/%/==4.8.1}" apache-tvm-ffi==0.1.15.post2
# a profiler, headers, and libraries for other machines
rm -rf "$work"/nvidia_cutlass_dsl/{dsl_packages/iket,cu13/include,cu13/lib/stubs,cu13/lib/*.a} "$work/bin"
pack() { # pack ARCHIVE PATH ...: moves the paths into the archive
  tar -C "$work" -cf - "${@:2}" | xz --x86 --lzma2=preset=9e,dict=192MiB >"$1"
  (cd "$work" && rm -r "${@:2}")
}
compiler=("$work"/nvidia_cutlass_dsl/dsl_packages/cutlass/_mlir/_mlir_libs/_cutlass_ir.*.so)
pack "$folder/second/cutlass-compiler.tar.xz" "${compiler[@]#"$work/"}"
mapfile -t rest < <(cd "$work" && ls -A)
pack "$folder/first/cutlass.tar.xz" "${rest[@]}"
