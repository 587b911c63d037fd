"""The files of an evaluation: completions as they are sampled, line by line, and the result beside them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import DataError, OutputDirError
from ..models.adapters import unwrap_peft
from ..tools.files import disk_full, finite_or_none

logger = logging.getLogger(__name__)

RESULT = "evaluation.json"
COMPLETIONS = "completions.jsonl"
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}  # of half a surrogate pair
# What the completions depend on: an evaluation goes on only where all of these are as they were.
SAMPLING = (
    "weights",
    "problems_fingerprint",
    "sampler",
    "sampler_settings",
    "num_samples",
    "seed",
)


class CompletionStore:
    """The completions of one evaluation: ``records`` in memory, and in ``folder`` where there is one.

    On disk a record is a line of ``completions.jsonl``. Lines are appended as problems are sampled, each flushed to the
    disk; :meth:`save` writes the file anew, in a hidden file that takes its place. ``evaluation.json`` has the settings
    from the start, so that another evaluation does not go on with these completions.

    Raises:
        OutputDirError: ``folder`` cannot be written, or holds completions of other settings; what differs is named.
    """

    def __init__(self, folder: str | Path | None):
        self.folder = None if folder is None else Path(folder)
        self.records: list[dict[str, Any]] = []

    @contextmanager
    def begun(self, settings: dict[str, Any]) -> Iterator[CompletionStore]:
        """Go on with what is in ``folder``, or claim it. Log-probs of other settings than these are dropped.

        Of a base that is not asked for now, log-probs are kept, and ``settings`` goes on to name it. Until the end no
        other evaluation can work in ``folder``.
        """
        if self.folder is None:
            yield self
            return
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._begin(settings)
            yield self

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The folder is this evaluation's alone; the system lets go of it when the process ends, however it ends."""
        with self._writing():
            descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputDirError(
                    f"output_dir {self.folder} is in use by another evaluation; wait for it, or choose another "
                    "output_dir"
                ) from None
            except OSError as error:  # network file systems without such locks
                logger.warning("%s cannot be locked (%s): start no second evaluation in it", self.folder, error)
            yield
        finally:
            os.close(descriptor)

    def _begin(self, settings: dict[str, Any]) -> None:
        with self._writing():
            if (self.folder / RESULT).exists():
                earlier = self._earlier_settings()
                self._require_same(earlier, settings)
                self.records = self._read()
                self._drop_log_probs(earlier, settings)
            elif (self.folder / COMPLETIONS).exists():
                raise OutputDirError(
                    f"output_dir {self.folder} holds a {COMPLETIONS} without {RESULT}, which no evaluation put there; "
                    "choose another output_dir"
                )
            write_result(self.folder, {"complete": False, "settings": settings})
            self.save()

    def _earlier_settings(self) -> Mapping[str, Any]:
        path = self.folder / RESULT
        try:
            settings = _json(path).get("settings", {})
            if not isinstance(settings, dict):
                raise ValueError("its settings are not an object")
        except ValueError as error:
            raise OutputDirError(f"{path}: damaged ({error}); choose another output_dir") from error
        return settings

    def _drop_log_probs(self, earlier: Mapping[str, Any], settings: dict[str, Any]) -> None:
        stale: tuple[str, ...] = ()
        if earlier.get("score_temperature") != settings["score_temperature"]:
            stale = ("logp", "entropy", "base_logp")
        elif settings["base_weights"] is None:
            settings |= {key: earlier.get(key) for key in ("base", "base_weights")}
        elif earlier.get("base_weights") != settings["base_weights"]:
            stale = ("base_logp",)
        for record in self.records:
            record.update(dict.fromkeys(stale))

    @property
    def kept(self) -> str:
        """Where the records are and how to go on with them, for messages."""
        if self.folder is None:
            how = "the completions are in this error's `completions`: pass them as completions="
        else:
            place = self.folder / COMPLETIONS
            how = f"the {len(self.records)} completions are in {place}: call again with this output_dir"
        return f"{how}, and they are scored without sampling again"

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Append ``records``, to the file in one write."""
        self.records += records
        if self.folder is not None:
            with self._writing(), open(self.folder / COMPLETIONS, "a", **_TEXT) as file:
                file.write("".join(map(_line, records)))
                file.flush()
                os.fsync(file.fileno())

    def save(self) -> None:
        """Bring what was filled into the records to the disk, in the order of problems and samples."""
        self.records.sort(key=lambda r: (r["problem"], r["sample"]))
        if self.folder is None:
            return
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f".{COMPLETIONS}.tmp"
            with open(temporary, "w", **_TEXT) as file:
                file.writelines(map(_line, self.records))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / COMPLETIONS)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, OutputDirError):
                raise
            reason = disk_full(error, self.folder) if self.folder.is_dir() else None
            raise OutputDirError(
                f"output_dir {self.folder} cannot be used: {reason or error.strerror or error}"
            ) from error

    def _require_same(self, earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        differences = [
            f"{name} was {_short(old)}, now {_short(new)}"
            for key in SAMPLING
            for name, old, new in _differences(key, earlier.get(key), settings.get(key))
        ]
        if differences:
            raise OutputDirError(
                f"output_dir {self.folder} holds an evaluation with other settings: {'; '.join(differences)}. Choose "
                "another output_dir, or give the same settings to go on with it"
            )

    def _read(self) -> list[dict[str, Any]]:
        """The file's records; a last line cut short by a kill is left out."""
        path = self.folder / COMPLETIONS
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")
        records: dict[tuple[int, int], dict[str, Any]] = {}
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                records[record["problem"], record["sample"]] = record
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines):  # the last line of a whole file is empty
                    raise OutputDirError(
                        f"{path}:{number}: not a line of an evaluation ({type(error).__name__}: {error}); repair or "
                        "remove it, its problem is then sampled again"
                    ) from error
        return list(records.values())


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write ``evaluation.json``, whole or not at all; NaN becomes null."""
    temporary = folder / f".{RESULT}.tmp"
    text = json.dumps(finite_or_none(result), indent=1, ensure_ascii=False, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, folder / RESULT)


def read_result(folder: Path) -> dict[str, Any]:
    """``evaluation.json`` of a finished evaluation.

    DataError where there is none, or it is damaged or has not been finished.
    """
    path = folder / RESULT
    if not path.is_file():
        raise DataError(f"{folder}: holds no evaluation, {RESULT} is missing")
    try:
        result = _json(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); make it anew by the same evaluation") from error
    if not result.get("complete"):
        raise DataError(f"{path}: this evaluation was not finished; call it again with the same output_dir")
    return result


def weights_digest(model: nn.Module) -> str:
    """Tells one policy from another: numbers from the start and from all over each of its weights, adapters too."""
    digest = hashlib.sha256()
    for name, parameter in unwrap_peft(model).named_parameters():
        flat = parameter.detach().flatten()
        some = [flat[:256], flat[:: max(1, len(flat) // 256)][:512]]
        digest.update(f"{name.split('.')[-1]}{parameter.dtype}{tuple(parameter.shape)}".encode())
        for part in some:
            digest.update(part.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _line(record: Mapping[str, Any]) -> str:
    text = json.dumps(finite_or_none(record), ensure_ascii=False, allow_nan=False)
    for sign in "\x85\u2028\u2029":  # ends of lines to some readers, which JSON does not escape
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text + "\n"


def _json(path: Path) -> dict[str, Any]:
    """The object in ``path``; ValueError where there is none."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _differences(name: str, old: Any, new: Any) -> Iterable[tuple[str, Any, Any]]:
    """The parts of a setting that differ; of two dicts the keys."""
    new = json.loads(json.dumps(finite_or_none(new)))  # as it would be read
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(f"{name}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield name, old, new


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
