"""What `quantserve calibrate` measured on this machine: the file, its age, and whether it is of this machine."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantserve.errors import UsageError
from quantserve.predict.machine import EngineCost, measured_at
from quantserve.system.homes import expand, look
from quantserve.target import Target

VARIABLE = "QUANTSERVE_CALIBRATION"
VERSION = 2
STALE_DAYS = 90
DISTURBED = 0.1
_FIELDS = ("cpu", "cores", "features")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measurements of one machine.

    Attributes:
        created: when, ISO 8601 in UTC.
        machine: fingerprint: processor, cores, instruction sets.
        versions: of torch, the kernels and vLLM.
        threads: that computed together.
        read_bytes_per_s, matmul_flops_per_s: of memory, and of large bfloat16 products.
        kernels: key -> (rows, seconds per weight), rising rows. The key is method and bits, ``squeezellm-4``; where a
            method has several kernels, the ``KernelProfile.key`` of each and bits, ``awq_codebook-4``.
        calls: key -> seconds of one call beside its weights, which small matrices feel.
        about: key -> the kernel that was measured.
        engine: costs of the engine; None when they were not measured and defaults hold.
        eager: the same for a model that is not compiled.
        seconds: the whole measurement took.
        disturbed: share of the threads' time that went to other processes meanwhile.
        notes: remarks, such as that it is old.
    """

    created: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    threads: int
    read_bytes_per_s: float
    matmul_flops_per_s: float
    kernels: Mapping[str, tuple[tuple[int, float], ...]]
    calls: Mapping[str, float] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    engine: EngineCost | None = None
    eager: EngineCost | None = None
    seconds: float = 0.0
    disturbed: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def date(self) -> str:
        """The day it was measured."""
        return self.created[:10]

    @property
    def age_days(self) -> float:
        """Days since then; 0 for a clock that ran ahead."""
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(self.created)).total_seconds() / 86400)

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        values = asdict(self)
        del values["notes"]
        return {"version": VERSION, **values}

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """Read what `to_json` gave. Raises ValueError for anything else."""
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise ValueError(f"no calibration of version {VERSION}; run `quantserve calibrate` again")
        try:
            created = datetime.fromisoformat(data["created"])
            engine, eager = (EngineCost(**data[key]) if data.get(key) else None for key in ("engine", "eager"))
            made = cls(
                created=(created if created.tzinfo else created.replace(tzinfo=UTC)).isoformat(),
                machine=dict(data["machine"]),
                versions=dict(data["versions"]),
                threads=int(data["threads"]),
                read_bytes_per_s=_positive(data["read_bytes_per_s"]),
                matmul_flops_per_s=_positive(data["matmul_flops_per_s"]),
                kernels={
                    str(key): tuple(sorted((int(_positive(rows)), _positive(seconds)) for rows, seconds in table))
                    for key, table in data["kernels"].items()
                    if table
                },
                calls={str(key): _not_negative(value) for key, value in data.get("calls", {}).items()},
                about={str(key): str(value) for key, value in data.get("about", {}).items()},
                engine=engine,
                eager=eager,
                seconds=float(data.get("seconds", 0.0)),
                disturbed=float(data.get("disturbed", 0.0)),
            )
            for value in [value for costs in (engine, eager) if costs for value in asdict(costs).values()]:
                if isinstance(value, int | float) and not 0 <= value < 1e3:
                    raise ValueError(f"engine cost {value!r}")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not as written by `quantserve calibrate`: {error!r}") from None
        return made


def _positive(value: object) -> float:
    number = float(value)  # type: ignore[arg-type]
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{value!r} is not a positive number")
    return number


def _not_negative(value: object) -> float:
    return _positive(value) if value else 0.0


def disturbance(calibration: Calibration) -> str:
    """What to say of a measurement that other processes disturbed."""
    return (
        f"other processes took {calibration.disturbed:.0%} of the threads' time during the calibration: run "
        "`quantserve calibrate` again when the machine is quiet"
    )


def default_path() -> Path:
    """Where the calibration is kept: ``QUANTSERVE_CALIBRATION``, else quantserve's folder of the user's cache."""
    if given := os.environ.get(VARIABLE):
        return expand(given)
    return look(os.environ).cache / "calibration.json"


def fingerprint(target: Target) -> dict[str, Any]:
    """What makes a machine another machine: its processor, cores and instruction sets."""
    return {"cpu": cpu_name(), "cores": target.cores, "features": sorted(target.features)}


def cpu_name() -> str:
    """The processor's name, with family and model where Linux tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown processor"
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    name = found.get("model name", "unknown processor").strip()
    return f"{name} (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else name


def save(calibration: Calibration, path: Path) -> None:
    """Write the file, whole or not at all.

    Raises:
        UsageError: it cannot be written there.
    """
    text = json.dumps(calibration.to_json(), indent=1) + "\n"
    draft = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(draft).replace(path)
    except OSError as error:
        if draft:
            with contextlib.suppress(OSError):
                Path(draft).unlink()
        raise UsageError(
            f"cannot write the calibration to {path}: {error.strerror or error}\n  fix: give another file with --out"
        ) from None


def load(path: Path) -> Calibration:
    """Read a file.

    Raises:
        ValueError: it is no calibration.
        OSError: it cannot be read.
    """
    try:
        return Calibration.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None


@dataclass(frozen=True, slots=True)
class Found:
    """The calibration to use for a target, or why there is none.

    Attributes:
        calibration: with its notes filled in; None when nothing usable is there.
        note: why it is not used; "" when it is, or when none was ever made.
    """

    calibration: Calibration | None = None
    note: str = ""


def find_calibration(target: Target) -> Found:
    """The stored calibration when the target is this machine's CPU and the file is of this machine.

    One of another machine is not used; an old one is, and says so.
    """
    if target.device != "cpu":
        return Found()
    path = default_path()
    try:
        calibration = load(path)
    except FileNotFoundError:
        return Found()
    except (OSError, ValueError) as error:
        return Found(note=f"the calibration {path} cannot be used: {error}")
    here = fingerprint(target)
    differing = [name for name in _FIELDS if calibration.machine.get(name) != here[name]]
    if differing:
        was = ", ".join(f"{name} {calibration.machine.get(name)}" for name in differing)
        now = ", ".join(f"{name} {here[name]}" for name in differing)
        return Found(note=f"the calibration of {calibration.date} is of another machine ({was}; here {now}): not used")
    notes = []
    if calibration.age_days > STALE_DAYS:
        notes.append(
            f"the calibration is {calibration.age_days:.0f} days old (of {calibration.date}): run `quantserve "
            "calibrate` again"
        )
    if calibration.disturbed > DISTURBED:
        notes.append(disturbance(calibration))
    if calibration.engine is None:
        notes.append("the engine's own cost is a default, not measured here: `quantserve calibrate --engine` does")
    return Found(replace(calibration, notes=tuple(notes)))


# Rows of x -> calls: three requests of 512 prompt tokens, and 128 tokens each decoded in batches of 16, of 4 and alone.
_WORK = ((512, 3), (16, 8), (4, 32), (1, 128))


@dataclass(frozen=True, slots=True)
class Fastest:
    """Which of several kernels a calibration of this machine makes the fastest.

    Attributes:
        key: of the fastest, as in `Calibration.kernels`.
        date: of the calibration.
        seconds: by key: of one million weights for three requests of 512 tokens in and 128 out, decoded in batches of
            16, of 4 and alone.
    """

    key: str
    date: str
    seconds: Mapping[str, float]


def fastest_kernel(target: Target, keys: Sequence[str]) -> Fastest | None:
    """The kernel that was fastest on this machine; None when not all of them were measured here.

    Args:
        target: only a CPU target has a calibration.
        keys: ``awq_codebook-4``, ``awq_vllm-4``: the ``KernelProfile.key`` of each and the bits.
    """
    calibration = find_calibration(target).calibration
    if calibration is None or not all(key in calibration.kernels for key in keys):
        return None
    seconds = {
        key: 1e6 * sum(calls * measured_at(calibration.kernels[key], rows) for rows, calls in _WORK) for key in keys
    }
    return Fastest(min(keys, key=lambda key: seconds[key]), calibration.date, seconds)
