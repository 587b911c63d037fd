"""Builds the sdist and the wheel, installs them in every way the README names into clean environments, and runs them.

Run by ``make packaging`` with the repository's environment, whose installed packages the clean environments borrow: a
link per package, so that nothing is downloaded twice and pip still sees their metadata.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(sysconfig.get_path("purelib"))
REBUILD = ["--no-build-isolation", "--force-reinstall", "--no-deps"]

SMOKE = """
import importlib.util, sys, warnings
import torch, transformers
import powerflow_fast
from powerflow_fast.kernels.linear_logprob_reference import linear_logprobs_ref
expected = sys.argv[1] == "compiled"
where = importlib.util.find_spec("powerflow_fast").origin
assert where.startswith(sys.argv[2]), where
kernels = importlib.util.find_spec("kernels")
assert kernels is None or "linear_logprob_fwd" not in str(kernels), kernels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from powerflow_fast.ops.extension import extension_status
    from powerflow_fast.ops import linear_logprobs
    from powerflow_fast.ops import la_tb_loss
    hidden, weight, labels = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8), torch.arange(6)
    logps = linear_logprobs(hidden, weight, labels)
    torch.testing.assert_close(logps, linear_logprobs_ref(hidden, weight, labels))
    cu, zero = torch.tensor([0, 2, 6], dtype=torch.int32), torch.zeros(2)
    out = la_tb_loss(logps, zero, zero, cu, alpha=4.0)
    out.loss.backward()
means = torch.stack([logps[:2].mean(), logps[2:].mean()])
torch.testing.assert_close(out.loss, means.square().mean())
assert hidden.grad.abs().sum() > 0
status = extension_status()
assert status.available == expected, status
told = [str(w.message) for w in caught if "runs in plain torch" in str(w.message)]
assert len(told) == (0 if expected else 1), told
print("  ", powerflow_fast.__version__, status.reason)
"""


def run(*command: object, **options) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise SystemExit(f"packaging: failed ({done.returncode}): {' '.join(str(word) for word in command)}")
    return done.stdout + done.stderr


class Environment:
    """A virtual environment without pip: the repository's pip installs into it."""

    def __init__(self, path: Path):
        run(sys.executable, "-m", "venv", "--without-pip", path)
        self.path, self.python = path, path / "bin" / "python"
        self.site = path / SITE.relative_to(sys.prefix)

    def borrow_packages(self) -> None:
        for entry in SITE.iterdir():
            ours = entry.name.startswith(("powerflow_fast", "__editable__", "__pycache__"))
            if not ours and not (self.site / entry.name).exists():
                (self.site / entry.name).symlink_to(entry)

    def pip_install(self, *arguments: object, **variables: str) -> str:
        # a caller's PYTHONPATH would make packages visible that the environment doesn't have
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
        return run(sys.executable, "-m", "pip", "--python", self.python, "install", "-v", *arguments, env=env)

    def smoke(self, extension: str, where: Path | None = None) -> None:
        print(run(self.python, "-I", "-c", SMOKE, extension, where or self.site, cwd=self.path), end="")


def copy_of_the_sources(to: Path) -> Path:
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # a deleted file stays in the index until the next commit
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def check_contents(sdist: Path, wheel: Path, sources: Path) -> None:
    modules = {str(p.relative_to(sources)) for p in (sources / "powerflow_fast").rglob("*.py")}
    kernels = {f"kernels/{p.name}" for p in (sources / "kernels").glob("*.py")}
    csrc = {f"csrc/{p.name}" for p in (sources / "csrc").iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name for name in names if ".dist-info/" in name}
    expected = modules | {f"powerflow_fast/{name}" for name in kernels}
    expected |= {"powerflow_fast/py.typed", "powerflow_fast/_C.abi3.so"}
    assert names - info == expected, f"wheel: missing {expected - names}, unexpected {names - info - expected}"
    assert any(name.endswith("licenses/LICENSE") for name in info), info
    assert "-cp310-abi3-" in wheel.name, wheel.name
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    expected = modules | kernels | csrc | {"LICENSE", "setup.py", "pyproject.toml", "powerflow_fast/py.typed"}
    assert expected <= names, f"sdist: missing {expected - names}"
    assert not any(name.endswith((".so", ".o", ".pyc")) for name in names), names


def step(title: str, start: float) -> None:
    print(f"[{time.monotonic() - start:4.0f} s] {title}", flush=True)


def main() -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="powerflow-packaging-") as name:
        work = Path(name)
        sources = copy_of_the_sources(work / "sources")

        step("sdist, and a wheel from it", start)
        run(sys.executable, "-m", "build", "--sdist", "--outdir", work / "dist", sources)
        (sdist,) = (work / "dist").glob("*.tar.gz")
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", work / "dist", sdist)
        (wheel,) = (work / "dist").glob("*.whl")
        check_contents(sdist, wheel, sources)

        step("wheel in a clean environment, its dependencies resolved", start)
        clean = Environment(work / "clean")
        clean.borrow_packages()
        clean.pip_install(wheel)
        clean.smoke("compiled")
        run(clean.path / "bin" / "powerflow-fast", "--help")

        step("pip install . and pip install -e .", start)
        clean.pip_install("--force-reinstall", "--no-deps", sources)
        clean.smoke("compiled")
        clean.pip_install("--force-reinstall", "--no-deps", "--editable", sources)
        clean.smoke("compiled", sources)

        step("sdist without torch: says what is left out, runs in plain torch", start)
        bare = Environment(work / "bare")
        said = bare.pip_install("--no-deps", sdist)
        assert "left out the compiled op powerflow_fast._C: torch isn't installed" in said, said
        assert f"pip install {' '.join(REBUILD)}" in said, said
        bare.borrow_packages()
        bare.smoke("plain torch")

        step("the rebuild command, without nvcc and without ninja", start)
        tools = work / "tools"
        tools.mkdir()
        for tool in ("g++", "as", "ld"):
            (tools / tool).symlink_to(shutil.which(tool))
        said = bare.pip_install(*REBUILD, sdist, POWERFLOW_FAST_CUDA="0", PATH=str(tools))
        assert "ninja:" not in said, said
        assert "built with the CPU op only" in said, said
        bare.smoke("compiled")
    step("packaging: all of it works", start)


if __name__ == "__main__":
    main()
