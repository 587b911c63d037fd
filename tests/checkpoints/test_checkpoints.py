from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from powerflow_fast.checkpoints import folder as checkpoint_module
from powerflow_fast.checkpoints.folder import latest_checkpoint, load_checkpoint, rotate, save_checkpoint
from powerflow_fast.checkpoints.optimizer_state import optimizer_from_tensors, optimizer_to_tensors
from powerflow_fast.checkpoints.output_dir import prepare_output_dir
from powerflow_fast.errors import CheckpointError, OutputDirError
from powerflow_fast.tools import provenance
from powerflow_fast.tools.random_state import get_rng_state, set_rng_state


def save(output_dir, step, value=None):
    tensors = {"model": {"w": torch.full((5,), float(step if value is None else value))}}
    return save_checkpoint(output_dir / f"checkpoint-{step}", tensors=tensors, state={"step": step})


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_round_trip_is_bit_exact(tmp_path):
    tensors = {
        "model": {
            "a": torch.randn(3, 4),
            "bf16": torch.randn(7).bfloat16(),
            "nan": torch.tensor([float("nan"), -0.0]),
            "scalar": torch.tensor(2**40),
            "empty": torch.zeros(0, 3),
            "columns": torch.randn(4, 3).T,
            "bytes": torch.get_rng_state(),
        },
        "log_z": {},
    }
    state = {"step": 3, "text": "é", "x": 0.1 + 0.2, "nested": [1, None, True]}
    path = save_checkpoint(tmp_path / "checkpoint-3", tensors=tensors, state=state)
    assert names(tmp_path) == ["checkpoint-3"]
    loaded = load_checkpoint(path)
    assert loaded.state == state and loaded.tensors.keys() == tensors.keys() and loaded.tensors["log_z"] == {}
    for name, expected in tensors["model"].items():
        found = loaded.tensors["model"][name]
        assert found.dtype == expected.dtype and found.shape == expected.shape, name
        assert found.contiguous().view(-1).view(torch.uint8).equal(expected.contiguous().view(-1).view(torch.uint8)), (
            name
        )


def test_tied_tensors_are_stored_once_and_views_are_copied(tmp_path):
    embedding, head = nn.Embedding(100, 8), nn.Linear(8, 100, bias=False)
    head.weight = embedding.weight
    whole = torch.arange(2000.0)
    tensors = {
        "tied": {"embedding": embedding.weight, "head": head.weight},
        "views": {"part": whole[:5], "all": whole, "square": whole.view(40, 50)},
    }
    path = save_checkpoint(tmp_path / "checkpoint-1", tensors=tensors, state={})
    assert (path / "tied.safetensors").stat().st_size < 2 * 100 * 8 * 4
    loaded = load_checkpoint(path).tensors
    assert loaded["tied"]["head"] is loaded["tied"]["embedding"]
    assert loaded["tied"]["head"].equal(embedding.weight)
    for name, tensor in tensors["views"].items():
        assert loaded["views"][name].equal(tensor)


def test_latest_skips_what_is_incomplete_or_foreign(tmp_path):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "none") is None
    for step in (9, 10, 100):
        save(tmp_path, step)
    (tmp_path / "checkpoint-100" / "model.safetensors").unlink()
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-300").write_text("a file")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def damage_truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damage_flip(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "state.json").unlink(), r"incomplete: state\.json is missing"),
        (lambda p: (p / "manifest.json").unlink(), r"manifest\.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "damaged"),
        (lambda p: (p / "manifest.json").write_text("[]"), "damaged"),
        (lambda p: (p / "manifest.json").write_text('{"schema": 99, "files": {}}'), "format 99, this version reads 1"),
        (damage_truncate, r"incomplete: model\.safetensors has \d+ bytes instead of \d+"),
        (damage_flip, r"model\.safetensors.*damaged"),
    ],
)
def test_damage_is_found_and_named(tmp_path, damage, message):
    path = save(tmp_path, 4)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        load_checkpoint(tmp_path / "checkpoint-1")


def test_saving_again_replaces(tmp_path):
    save(tmp_path, 4, value=1)
    path = save(tmp_path, 4, value=2)
    assert load_checkpoint(path).tensors["model"]["w"][0] == 2 and names(tmp_path) == ["checkpoint-4"]


def test_killed_between_the_two_renames_of_a_replacement(tmp_path):
    save(tmp_path, 3)
    save(tmp_path, 4).rename(tmp_path / "checkpoint-4.old")
    latest = latest_checkpoint(tmp_path)
    assert latest.name == "checkpoint-4.old" and load_checkpoint(latest).state == {"step": 4}
    save(tmp_path, 4, value=7)
    assert latest_checkpoint(tmp_path).name == "checkpoint-4"
    save(tmp_path, 5)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]


def test_rotate(tmp_path):
    for step in (1, 2, 10, 20):
        save(tmp_path, step)
    rotate(tmp_path, None)
    assert len(names(tmp_path)) == 4
    damage_truncate(tmp_path / "checkpoint-20")  # does not count: the newest good one is 10
    rotate(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2", "checkpoint-20"]
    rotate(tmp_path, 0)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20"]


@pytest.mark.parametrize("how", ["safetensors", "os"])
def test_full_disk(tmp_path, monkeypatch, how):
    save(tmp_path, 1)

    def fail(*args, **kwargs):
        if how == "os":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise checkpoint_module.SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    with pytest.raises(CheckpointError) as error:
        save(tmp_path, 2)
    assert f"no space left on the disk that holds {tmp_path.resolve()}" in str(error.value)
    assert "MiB) free" in str(error.value) and "kept" in str(error.value)
    assert names(tmp_path) == ["checkpoint-1"] and latest_checkpoint(tmp_path).name == "checkpoint-1"
    monkeypatch.undo()
    save(tmp_path, 2)


def test_a_short_file_counts_as_a_full_disk(tmp_path, monkeypatch):
    save(tmp_path, 1)
    original = checkpoint_module.save_file

    def short(tensors, path, **options):
        original(tensors, path, **options)
        os.truncate(path, 10)

    monkeypatch.setattr(checkpoint_module, "save_file", short)
    with pytest.raises(CheckpointError, match="no space left on the disk"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1"]


_FILL = """
import os, resource, shutil, sys
from pathlib import Path
import torch
from powerflow_fast.checkpoints.folder import latest_checkpoint, load_checkpoint, save_checkpoint
from powerflow_fast.errors import CheckpointError
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for step in range(1, 50):
    tensors = {"model": {"w": torch.full((step * 40_000,), float(step))}}
    try:
        save_checkpoint(folder / f"checkpoint-{step}", tensors=tensors, state={"step": step})
    except CheckpointError as error:
        message = str(error)
        break
newest = latest_checkpoint(folder)
kept = load_checkpoint(newest)
assert step > 1 and kept.state == {"step": step - 1} and bool((kept.tensors["model"]["w"] == step - 1).all())
assert sorted(p.name for p in folder.iterdir()) == sorted(f"checkpoint-{k}" for k in range(1, step))
print(shutil.disk_usage(folder).free, message)
"""


@pytest.mark.parametrize("how", ["tmpfs", "rlimit"])
def test_a_really_full_disk(tmp_path, how):
    """Saves until a small disk (or the limit on a file's size) is full: the last whole checkpoint stays readable."""
    command = [sys.executable, "-c", _FILL, str(tmp_path), "0" if how == "tmpfs" else "500000"]
    if how == "tmpfs":
        # The mount lies in a namespace of its own, which ends with the process.
        mount = f'mount -t tmpfs -o size=2m none {tmp_path} && exec "$@"'
        inside = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
        if (
            not shutil.which("unshare")
            or subprocess.run([*inside, mount, "sh", "true"], capture_output=True).returncode
        ):
            pytest.skip("this machine does not allow a mount of its own")
        command = [*inside, mount, "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    free, message = done.stdout.split(" ", 1)
    # only a mount of its own is written to by nobody else
    free = free if how == "tmpfs" else r"\d+"
    assert str(tmp_path) in message and "Earlier checkpoints are kept" in message
    assert re.search(rf"\b{free} bytes", message)
    assert (f"mounted at {tmp_path}, 2.0 MiB" if how == "tmpfs" else "limit on the size of a file") in message


def test_other_save_errors(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot save the checkpoint"):
        save(tmp_path / "file", 1)
    with pytest.raises(CheckpointError, match="no file name"):
        save_checkpoint(tmp_path / "checkpoint-1", tensors={"../x": {}}, state={})


KILLS = """
import os, random, signal, sys, time
from pathlib import Path

import torch

from powerflow_fast.checkpoints.folder import latest_checkpoint, load_checkpoint, rotate, save_checkpoint

torch.set_num_threads(1)  # children are forked: no thread pool may exist yet
folder, rng, done = Path(sys.argv[1]), random.Random(0), 0


def save_for_ever(step, report):
    while True:
        step += 1
        tensors = {"model": {str(i): torch.full((50_000,), float(step)) for i in range(4)}, "z": {"b": torch.zeros(3)}}
        # Every other save replaces the one before it.
        save_checkpoint(folder / f"checkpoint-{step - step % 2}", tensors=tensors, state={"step": step})
        rotate(folder, 2)
        os.write(report, b"%d\\n" % step)


for kill in range(12):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(done, write)
    os.close(write)
    with os.fdopen(read) as reports:
        first = reports.readline()
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        reported = int([first, *reports][-1])
    os.waitpid(child, 0)
    loaded = load_checkpoint(latest_checkpoint(folder))
    done = loaded.state["step"]
    assert done in (reported, reported + 1), (done, reported)
    assert all((t == done).all() for t in loaded.tensors["model"].values())
    print(kill, done, *sorted(p.name for p in folder.iterdir()))
"""


def test_a_kill_at_any_moment_leaves_the_latest_readable(tmp_path):
    result = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 12
    # The kills did fall into saves: some left their unfinished folder behind.
    assert any(".tmp" in line for line in lines), result.stdout
    assert all(len(line.split()) <= 2 + 4 for line in lines), result.stdout


def parameters(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    return {
        n: nn.Parameter(torch.randn(s, dtype=dtype, device=device)) for n, s in (("a", (4, 3)), ("b", (5,)), ("c", ()))
    }


def updates(params, optimizer, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):

        def closure():
            for p in params.values():
                p.grad = torch.randn(p.shape, generator=generator).to(p)
            return sum(p.detach().float().sum() for p in params.values())

        optimizer.step(closure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "build",
    [
        lambda g: torch.optim.AdamW(g, lr=0.1, betas=(0.8, 0.95), amsgrad=True),
        lambda g: torch.optim.AdamW(g, lr=torch.tensor(0.1), foreach=False),
        lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9, nesterov=True),
        lambda g: torch.optim.SGD(g, lr=0.1),
        lambda g: torch.optim.Adafactor(g, lr=0.1),
        lambda g: torch.optim.RMSprop(g, lr=0.1, centered=True, momentum=0.5),
        lambda g: torch.optim.ASGD(g, lr=0.1),
    ],
)
def test_optimizers_continue_bit_exactly(tmp_path, build, dtype):
    def groups(params):
        return [{"params": [params["a"], params["c"]], "lr": 0.2}, {"params": [params["b"]], "weight_decay": 0.1}]

    params = parameters(dtype)
    optimizer = build(groups(params))
    updates(params, optimizer, 3, seed=1)
    optimizer.param_groups[0]["lr"] = 0.123456789
    tensors, meta = optimizer_to_tensors(optimizer, params)
    path = save_checkpoint(
        tmp_path / "checkpoint-3", tensors={"optimizer": tensors, "model": params}, state={"optimizer": meta}
    )
    updates(params, optimizer, 3, seed=2)

    loaded = load_checkpoint(path)
    again = {n: nn.Parameter(t.clone()) for n, t in loaded.tensors["model"].items()}
    resumed = build(groups(again))
    optimizer_from_tensors(resumed, again, loaded.tensors["optimizer"], loaded.state["optimizer"])
    assert resumed.param_groups[0]["lr"] == 0.123456789
    for new, old in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert new.keys() == old.keys()
        for key in new.keys() - {"params"}:
            assert type(new[key]) is type(old[key]) and new[key] == old[key], key
    updates(again, resumed, 3, seed=2)
    for name in params:
        assert again[name].equal(params[name]), name
    for p, q in zip(params.values(), again.values(), strict=True):
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        for key, value in optimizer.state[p].items():
            other = resumed.state[q][key]
            assert type(value) is type(other)
            assert value.equal(other) and value.dtype == other.dtype if torch.is_tensor(value) else value == other


def test_nested_optimizer_state_survives():
    params = {"w": nn.Parameter(torch.randn(6))}

    def closure():
        loss = (params["w"] ** 4).sum()
        params["w"].grad = 4 * params["w"].detach() ** 3
        return loss

    optimizer = torch.optim.LBFGS([params["w"]], max_iter=3)
    optimizer.step(closure)
    tensors, meta = optimizer_to_tensors(optimizer, params)
    tensors = {n: t.clone() for n, t in tensors.items()}  # they are the optimizer's own, which goes on
    start = params["w"].detach().clone()
    optimizer.step(closure)
    end = params["w"].detach().clone()
    params["w"].data.copy_(start)
    resumed = torch.optim.LBFGS([params["w"]], max_iter=3)
    optimizer_from_tensors(resumed, params, tensors, json.loads(json.dumps(meta)))
    resumed.step(closure)
    assert params["w"].equal(end) and not end.equal(start)


def test_state_in_a_wider_dtype_than_its_parameter_is_not_cast():
    params = parameters(torch.bfloat16)
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    optimizer.state[params["a"]]["master"] = torch.full((4, 3), 1 / 3)
    tensors, meta = optimizer_to_tensors(optimizer, params)
    resumed = torch.optim.SGD(params.values(), lr=0.1)
    optimizer_from_tensors(resumed, params, tensors, meta)
    restored = resumed.state[params["a"]]["master"]
    assert restored.dtype == torch.float32 and restored.equal(torch.full((4, 3), 1 / 3))
    restored.zero_()
    assert tensors["state.a.master"].any(), "the optimizer must own its state"


def test_a_wrapped_optimizer_is_opened():
    params = parameters()

    class Wrapper:
        optimizer = torch.optim.AdamW(params.values())

    updates(params, Wrapper.optimizer, 1, seed=0)
    tensors, meta = optimizer_to_tensors(Wrapper(), params)
    assert meta["class"] == "AdamW"
    optimizer_from_tensors(Wrapper(), params, tensors, meta)


def test_optimizers_that_do_not_fit_are_refused():
    params = parameters()
    optimizer = torch.optim.AdamW(params.values())
    tensors, meta = optimizer_to_tensors(optimizer, params)
    with pytest.raises(CheckpointError, match=r"of a AdamW with .*this is a SGD"):
        optimizer_from_tensors(torch.optim.SGD(params.values()), params, tensors, meta)
    with pytest.raises(CheckpointError, match=r"\[3\] parameters, this is .*\[2\] parameters"):
        optimizer_from_tensors(torch.optim.AdamW([params["a"], params["b"]]), params, tensors, meta)
    renamed = {"z" if n == "a" else n: p for n, p in params.items()}
    with pytest.raises(CheckpointError, match="differ in name or order"):
        optimizer_from_tensors(optimizer, renamed, tensors, meta)
    with pytest.raises(CheckpointError, match="has no name"):
        optimizer_to_tensors(optimizer, {"a": params["a"]})
    optimizer.state[params["a"]]["odd"] = object()
    with pytest.raises(CheckpointError, match=r"cannot store state\.a\.odd, a object"):
        optimizer_to_tensors(optimizer, params)


def test_rng_states_round_trip_through_a_checkpoint(tmp_path):
    path = save_checkpoint(tmp_path / "checkpoint-1", tensors={"rng": get_rng_state()}, state={})
    expected = torch.rand(3)
    states = load_checkpoint(path).tensors["rng"]
    assert all(t.dtype == torch.uint8 for t in states.values())
    set_rng_state({**states, "cuda.99": states["cpu"]})
    assert torch.rand(3).equal(expected)


def test_no_pickle():
    source = Path(checkpoint_module.__file__).read_text()
    assert "torch.load" not in source and "torch.save" not in source and "import pickle" not in source


def test_prepare_output_dir(tmp_path):
    path = prepare_output_dir(tmp_path / "a" / "b", run_record={"config": {"alpha": 4}}, resume=False)
    record = json.loads((path / "run.json").read_text())
    assert record["config"] == {"alpha": 4} and record["started"].keys() == {"time", "version", "commit"}
    assert names(path) == ["run.json"]
    save(path, 5)
    with pytest.raises(
        OutputDirError, match=r"already holds a run \(newest checkpoint: checkpoint-5\).*another output_dir"
    ):
        prepare_output_dir(path, run_record={}, resume=False)
    prepare_output_dir(path, run_record={"config": {"alpha": 9}}, resume=True)
    again = json.loads((path / "run.json").read_text())
    assert again["config"] == {"alpha": 4} and again["started"] == record["started"] and len(again["resumed"]) == 1
    # A folder with other files is fine, and so is resuming into a new one.
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("")
    prepare_output_dir(tmp_path / "c", run_record={}, resume=True)
    assert names(tmp_path / "c") == ["notes.txt", "run.json"]


def test_unusable_output_dirs(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirError, match=r"output_dir .*file is not writable: "):
        prepare_output_dir(tmp_path / "file", run_record={}, resume=False)
    with pytest.raises(OutputDirError, match="not writable: Not a directory"):
        prepare_output_dir(tmp_path / "file" / "below", run_record={}, resume=False)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    with pytest.raises(OutputDirError, match=r"run\.json: not valid JSON"):
        prepare_output_dir(tmp_path / "broken", run_record={}, resume=True)

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(OutputDirError, match="not writable: Permission denied"):
        prepare_output_dir(tmp_path / "new", run_record={}, resume=False)


def test_the_commit_is_that_of_this_package_only(tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *args], check=True)

    (tmp_path / "powerflow_fast").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "powerflow_fast" / "tools" / "provenance.py"))
    assert provenance.git_commit() is None
    git("init", "-q")
    (tmp_path / "x").write_text("1")
    git("add", "x")
    git("commit", "-q", "-m", "x")
    commit = provenance.git_commit()
    assert len(commit) == 40
    (tmp_path / "x").write_text("2")
    assert provenance.git_commit() == f"{commit}-dirty"
