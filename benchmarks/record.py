"""Records: what a benchmark found, with its command, and where it ran."""

import functools
import hashlib
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jaxlib
import numpy as np
import optax
from rich.console import Console

ROOT = pathlib.Path(__file__).resolve().parent.parent
CODE = ("lowrank_optax", "benchmarks", "experiments")
QUIET = Console(quiet=True)


class Item(NamedTuple):
    """One row of a record.

    Args:
        key: its name.
        find: makes it.
        kind: rows of one kind take about as long as each other.
        seconds: what the first of its kind takes, where that is known to be long.
    """

    key: str
    find: Callable[[], dict[str, Any]]
    kind: str = ""
    seconds: float = 0.0


class Part(NamedTuple):
    """A part of a record.

    Args:
        content: what it says besides its rows.
        items: the rows.
        shown: what of a row is printed.
    """

    content: dict[str, Any]
    items: Sequence[Item]
    shown: Sequence[str]


class LeftOutError(Exception):
    """A row cannot be made, for want of another one; it counts as one for which time was short."""


class Record:
    """A record of many parts, on the disk after every row.

    Args:
        out: the JSON file; what it holds already is kept.
        benchmark: name of the benchmark.
        begin: when it began, by `time.monotonic`.
        settings: what makes rows comparable, as the device does.

    Raises:
        ValueError: the file is no such record, or of another device, or of other settings.
    """

    def __init__(self, out: pathlib.Path, benchmark: str, begin: float, **settings: Any) -> None:
        self.out, self.benchmark, self.begin, self.settings = out, benchmark, begin, settings
        before = _read_record(out) if out.exists() else {"calls": [], "parts": {}}
        for name, own in ({"device": environment()["device"]} | settings).items():
            if before.get(name, own) != own:
                raise ValueError(f"{out} has another {name} ({before[name]}): pass another --out")
        self.calls = [*before["calls"], {"command": command_of(benchmark), **_code()}]
        self.parts: dict[str, Any] = before["parts"]

    def require_same(self, name: str, part: Part) -> None:
        """Refuses to add rows to those of another size.

        Raises:
            ValueError: what the record holds of the part differs in what it says besides its rows.
        """
        there = self.parts.get(name, part.content)
        for key, own in part.content.items():
            if (found := there.get(key, own)) != own:
                raise ValueError(
                    f"{self.out}, part {name!r}, was measured with another {key} ({found}, now "
                    f"{own}): pass another --out"
                )

    def say(self, text: str) -> None:
        """Prints a line, with the seconds so far; a log shows it at once."""
        print(f"{time.monotonic() - self.begin:4.0f} s  {text}", flush=True)

    def write(self) -> None:
        """Writes all that was found."""
        content = {**self.settings, "calls": self.calls, "parts": self.parts}
        write_record(self.out, self.benchmark, QUIET, **content)

    def carry_out(self, name: str, part: Part, until: float) -> None:
        """Makes the rows of a part that are not there, each one whatever became of the others.

        Args:
            name: the part's name.
            part: the part.
            until: when it is to end, by `time.monotonic`; what would take longer is "skipped".
        """
        found = self.parts.get(name, {}).get("items", {})
        is_done = lambda row: "error" not in row and not row.get("wrong")
        todo = [item for item in part.items if not is_done(found.get(item.key, {"error": ""}))]
        skipped = [item.key for item in todo]
        self.parts[name] = {**part.content, "items": found, "skipped": skipped}
        self.write()
        longest: dict[str, float] = {}
        for item in todo:
            begin = time.monotonic()
            if begin + longest.get(item.kind, item.seconds) > until:
                continue
            try:
                row = item.find()
            except LeftOutError as reason:
                self.say(f"{name}, {item.key}: left out: {reason}")
                continue
            except Exception as error:
                text = f"{type(error).__name__}: {error}"[:2000]
                row = {"error": text, "traceback": traceback.format_exc()[-4000:]}
            seconds = time.monotonic() - begin
            longest[item.kind] = max(seconds, longest.get(item.kind, 0.0))
            row = {key: _plain(row[key]) for key in row}
            found[item.key] = {"call": len(self.calls) - 1, "seconds": seconds} | row
            skipped.remove(item.key)
            self.write()
            self.say(f"{name}, {item.key}: {_line(found[item.key], part.shown)}")
        if skipped:
            self.say(f"{name}: not done: {'; '.join(skipped)}")

    def leave_out(self, name: str, reason: str) -> None:
        """Notes why a part is not carried out."""
        rest = {"skipped": ["all that is not here"], "reason": reason}
        self.parts[name] = {"items": {}, **self.parts.get(name, {}), **rest}
        self.write()
        self.say(f"{name}: left out: {reason}")

    def is_fine(self) -> bool:
        """Prints what is "wrong" or failed; returns whether nothing is."""
        rows = {
            f"{name}, {key}": row
            for name, part in self.parts.items()
            for key, row in part["items"].items()
        }
        wrong = [key for key, row in rows.items() if row.get("wrong")]
        failed = [key for key, row in rows.items() if "error" in row]
        self.say(f"{len(rows) - len(failed)} rows in {self.out}")
        for what, keys in (("WRONG", wrong), ("FAILED", failed)):
            if keys:
                self.say(f"{what}: {'; '.join(keys)}")
        return not wrong and not failed


def _read_record(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): move it away") from error
    if not isinstance(found, dict) or not {"calls", "parts"} <= found.keys():
        raise ValueError(f"{path} is no record of this benchmark: pass another --out")
    return found


def _plain(value: Any) -> Any:
    """Infinities as text, for which JSON has no numbers."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _line(row: Mapping[str, Any], shown: Sequence[str]) -> str:
    if "error" in row:
        return f"FAILED: {row['error'].splitlines()[0]}"
    texts = {key: f"{row[key]:.4g}" for key in shown if isinstance(row[key], float)}
    line = ", ".join(f"{key} {texts.get(key, row[key])}" for key in shown)
    return f"WRONG: {line}" if row.get("wrong") else line


def command_of(benchmark: str) -> str:
    """Returns the command that runs now."""
    return f"python -m benchmarks.{benchmark} {shlex.join(sys.argv[1:])}"


def write_record(out: pathlib.Path, benchmark: str, console: Console, **content: Any) -> None:
    """Writes what a benchmark found as JSON, in one step, with its command and where it ran."""
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": command_of(benchmark), **environment(), **content}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    console.print(f"written to {out}")


@functools.cache
def environment() -> dict[str, Any]:
    """Versions, code, machine and device, for a benchmark's record."""
    device = jax.devices()[0]
    return {
        "versions": {m.__name__: m.__version__ for m in (jax, jaxlib, flax, optax, np)},
        **_code(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "device": device.device_kind,
        "backend": device.platform,
    }


@functools.cache
def _code() -> dict[str, Any]:
    """Says what ran: a digest of the files too, for a copy of them may have no repository."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return {
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
        "source": f"sha256 {digest.hexdigest()[:12]}",
    }


def _git(*arguments: str) -> str | None:
    """Asks git about this source tree; None where there is no git or no repository."""
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
