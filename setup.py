"""Builds powerflow_fast._C: one stable-ABI library with the CPU op and, where nvcc is found, the CUDA op.

Everything else about the package is in pyproject.toml. POWERFLOW_FAST_CUDA is the one build-time variable: unset, the
CUDA op is built if nvcc is there; `0` leaves it out; `90;100` builds it for these architectures and fails without nvcc.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Kept between builds, unlike the temporary folder that pip hands to an editable install: ninja rebuilds what changed.
OBJECTS = ROOT / "build" / "objects"
CSRC = ROOT / "csrc"
ARCHS = ("80", "90", "100")
MIN_TORCH = (2, 11)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the libtorch 2.11 ABI: loads on that and every later one
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps <this folder or sdist>"


def say(message: str) -> None:
    print(f"powerflow_fast: {message}", file=sys.stderr)


def torch_dir() -> tuple[Path | None, str]:
    """The installed torch, or why it can't be built against. Nothing is imported: headers and libraries are enough."""
    # pip's isolated build hides the environment's packages but runs with its prefix: build against the torch there.
    sys.path += [site for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")} - set(sys.path)]
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, "torch isn't installed where it is built"
    root = Path(spec.origin).parent
    version = str(runpy.run_path(str(root / "version.py"))["__version__"])
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        return None, f"torch {version} is older than {MIN_TORCH[0]}.{MIN_TORCH[1]}"
    return root, ""


def cxx() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")


def find_nvcc() -> tuple[Path | None, tuple[str, ...]]:
    """nvcc and the architectures to build for; (None, ()) for a library with the CPU op alone."""
    wanted = os.environ.get("POWERFLOW_FAST_CUDA", "")
    if wanted == "0":
        return None, ()
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    candidates = [home / "bin" / "nvcc" for home in homes] + [Path(path) for path in [shutil.which("nvcc")] if path]
    nvcc = next((path for path in candidates if path.is_file()), None)
    if nvcc is None:
        if wanted:
            raise SystemExit(f"powerflow_fast: POWERFLOW_FAST_CUDA={wanted} asks for CUDA, but there is no nvcc")
        return None, ()
    if wanted:
        return nvcc, tuple(wanted.replace(",", ";").split(";"))
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    return nvcc, tuple(arch for arch in ARCHS if f"sm_{arch}" in known)


def cuda_library_dir(nvcc: Path) -> Path:
    # the nvcc on PATH may be a script that calls the real one elsewhere: ask it where it lives
    dry_run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = next((line.split("TOP=", 1)[1] for line in dry_run.splitlines() if "TOP=" in line), "")
    for root in (Path(top.strip() or "."), nvcc.resolve().parent.parent):
        for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if (root / name / "libcudart_static.a").exists():
                return root / name
    raise SystemExit(f"powerflow_fast: no libcudart_static.a beside {nvcc}; POWERFLOW_FAST_CUDA=0 builds without CUDA")


class BuildLaTb(build_ext):
    """Compiles csrc/ itself (with ninja where there is one) and leaves the link to setuptools."""

    def build_extension(self, ext: Extension) -> None:
        nvcc, archs = find_nvcc()
        if nvcc is None:
            say("no nvcc (or POWERFLOW_FAST_CUDA=0): built with the CPU op only; CUDA tensors take plain torch")
        includes = ["-isystem", TORCH / "include"]
        common = ["-O3", "-std=c++20", STABLE_ABI, *includes]
        host = [cxx(), "-c", *common, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        module = ["-DPy_LIMITED_API=0x030A0000", f'-DPOWERFLOW_FAST_CUDA_ARCHS="{";".join(archs)}"']
        vectors = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
        rules = {
            "la_tb_cpu.cpp": [*host, *module, f"-I{sysconfig.get_path('include')}"],
            "head_cpu.cpp": [*host, *vectors],
        }
        if nvcc:
            codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
            codes += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]  # PTX for GPUs yet to come
            passed_on = ["-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=2"]
            rules["la_tb_cuda.cu"] = [nvcc, "-c", *common, "-DUSE_CUDA", *passed_on, *codes]
            ext.library_dirs.append(str(cuda_library_dir(nvcc)))
            ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
        ext.extra_objects = compile_all({name: [str(word) for word in rule] for name, rule in rules.items()})
        ext.depends = ext.extra_objects  # setuptools links again when an object is newer than the library
        ext.library_dirs.append(str(TORCH / "lib"))
        ext.libraries += ["torch_cpu", "c10"]
        # keep libtorch.so itself: with CUDA builds of torch it brings the symbols that the CUDA op looks up weakly
        ext.extra_link_args += ["-Wl,--no-as-needed,-ltorch,--as-needed"]
        super().build_extension(ext)


def compile_all(rules: dict[str, list[str]]) -> list[str]:
    OBJECTS.mkdir(parents=True, exist_ok=True)
    objects = {name: str(OBJECTS / f"{name}.o") for name in rules}
    ninja = shutil.which("ninja")
    if ninja is None:
        for name, rule in rules.items():
            subprocess.check_call([*rule, str(CSRC / name), "-o", objects[name]])
        return list(objects.values())
    lines = []
    for index, (name, rule) in enumerate(rules.items()):
        words = " ".join(f"'{word}'" for word in rule).replace("$", "$$")
        lines += [
            f"rule r{index}",
            f"  command = {words} -MD -MF $out.d $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            f"build {ninja_path(objects[name])}: r{index} {ninja_path(str(CSRC / name))}",
        ]
    (OBJECTS / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.check_call([ninja, "-C", str(OBJECTS)])
    return list(objects.values())


def ninja_path(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


TORCH, missing = torch_dir()
if not missing and sys.platform != "linux":
    missing = f"{sys.platform} isn't supported by the build"
if not missing and cxx() is None:
    missing = "there is no C++ compiler (set CXX or install g++)"
extension = Extension("powerflow_fast._C", sources=[], language="c++", py_limited_api=True)
if missing:
    say(f"left out the compiled op powerflow_fast._C: {missing}.")
    say(f"la_tb_loss will run in plain torch. To build it later: {REBUILD}")
setup(
    ext_modules=[] if missing else [extension],
    cmdclass={"build_ext": BuildLaTb},
    options={} if missing else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
