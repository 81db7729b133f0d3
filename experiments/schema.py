"""The result of one run: its schema, where it was made, and a file written whole or not at all."""

import functools
import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import jax
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experiments.errors import ExperimentError

SCHEMA_VERSION: Literal[2] = 2
Status = Literal["finished", "diverged", "failed"]


class Record(BaseModel):
    """Base of all that is stored: unknown fields are errors, and infinities survive as text."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Plan(Record):
    """How long to train and by which schedule: the same for every method of a study.

    The learning rate rises linearly over `warmup_fraction` of the steps and falls to zero by a
    cosine; with `decay="none"` it is constant from the first step on, without a warm-up. The task's
    head, where it has one, is trained by AdamW at `head_learning_rate` on the same schedule,
    whatever the method of the adapters, so that
    only the adapters differ. Every `probe_every` steps, if at all, the gradients are looked at.
    """

    steps: int = Field(gt=0)
    eval_every: int = Field(gt=0)
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    decay: Literal["cosine", "none"] = "cosine"
    head_learning_rate: float = Field(gt=0)
    probe_every: int | None = Field(default=None, gt=0)


class RunConfig(Record):
    """Everything that determines a run's numbers, apart from code and machine.

    `study` and `variant` say which comparison it belongs to.
    """

    study: str
    variant: str
    task: str
    task_options: dict[str, Any]
    data: dict[str, str]
    method: str
    method_options: dict[str, Any]
    learning_rate: float = Field(gt=0)
    plan: Plan
    seed: int = Field(ge=0)

    def file_name(self) -> str:
        """Returns a readable file name that differs whenever the configuration does."""
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:8]
        name = f"{self.variant or self.task}-{self.method}"
        return f"{name}-lr{self.learning_rate:g}-seed{self.seed}-{digest}.json"


class Scores(Record):
    """Means over one split: the loss, and what the task's answers can be scored by.

    `solved` is the share of problems that generated answers solve, at the end of a run alone.
    """

    loss: float
    accuracy: float | None = None
    matthews: float | None = None
    solved: float | None = None


class CurvePoint(Record):
    """One evaluation on the way. `seconds` counts training only, without compilation."""

    step: int
    seconds: float
    validation: Scores


class ProbePoint(Record):
    """How the adapters treat the full gradient G at one step, means over the adapted layers.

    Attributes:
        step: The step, from 1.
        rank_a: Effective rank of the gradient of `a`.
        rank_b: Effective rank of the gradient of `b`.
        gradient_alignment: Cosine of G and the change of ΔK along the gradients of the factors.
        step_alignment: Cosine of -G and the change of ΔK that the optimizer made.
        step_rank: Effective rank of that change.
        delta_rank: Effective rank of ΔK after it.
        step_norm: Spectral norm of the change.
    """

    step: int
    rank_a: float
    rank_b: float
    gradient_alignment: float
    step_alignment: float
    step_rank: float | None = None
    delta_rank: float | None = None
    step_norm: float | None = None


class Environment(Record):
    """Where the run was made."""

    python: str
    packages: dict[str, str]
    device: str
    device_count: int
    cpu_count: int | None
    platform: str
    git_commit: str | None
    git_dirty: bool | None


class RunResult(Record):
    """One run, as stored in one JSON file.

    `trainable_parameters` counts what gradients train, `trained_bytes` the shadows and frames too.
    `step_ratio` is the time of a step in units of the baseline's, measured in the same process.
    `train_losses` are means of `losses_every` successive steps.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    config: RunConfig
    status: Status
    error: str | None = None
    environment: Environment
    trainable_parameters: int
    trained_bytes: int
    optimizer_state_bytes: int
    step_temporary_bytes: int | None
    compile_seconds: float
    wall_seconds: float
    median_step_seconds: float | None
    step_ratio: float | None = None
    steps_done: int
    losses_every: int
    train_losses: list[float]
    curve: list[CurvePoint]
    probes: list[ProbePoint] = Field(default_factory=list)
    best: CurvePoint | None
    final: dict[str, Scores]

    @property
    def validation_loss(self) -> float:
        """Final validation loss; infinite when the run did not finish."""
        return self.final["validation"].loss if self.status == "finished" else float("inf")

    def write(self, folder: Path) -> Path:
        """Writes the result into `folder`, in one atomic step.

        Args:
            folder: Where to write; made if it does not exist.

        Returns:
            The file written.

        Raises:
            ExperimentError: There is a result of the same configuration, and not of a failed run,
                or the disk is full or not writable. No partly written result is left in either
                case.
        """
        path = folder / self.config.file_name()
        if path.exists() and read_result(path).status != "failed":
            raise ExperimentError(f"{path} exists; pass --fresh to delete it, or another --out")
        temporary = folder / f".{path.name}.{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(self.model_dump_json() + "\n")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise ExperimentError(f"cannot write {path}: {error}") from error
        return path


def read_result(path: Path) -> RunResult:
    """Reads one result.

    Raises:
        ExperimentError: The file is unreadable, corrupted, of another schema version, or its name
            is not that of its configuration.
    """
    try:
        result = RunResult.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(f"cannot read {path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ExperimentError(
            f"{path} is not a result of schema {SCHEMA_VERSION} ({where}: {first['msg']}); "
            "move it away, or choose another --out"
        ) from error
    if path.name != result.config.file_name():
        raise ExperimentError(
            f"{path} holds the configuration of {result.config.file_name()}: it was renamed or "
            "edited; move it away, or choose another --out"
        )
    return result


@functools.cache
def current_environment() -> Environment:
    """Describes this process's machine, versions and commit."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "lowrank-optax")
    commit = _git("rev-parse", "HEAD")
    code = ("--untracked-files=no", "--", "lowrank_optax/*.py", "experiments/*.py")
    changes = _git("status", "--porcelain", *code) if commit else None
    return Environment(
        python=platform.python_version(),
        packages={name: _version(name) for name in packages},
        device=jax.devices()[0].device_kind,
        device_count=jax.device_count(),
        cpu_count=os.cpu_count(),
        platform=platform.platform(),
        git_commit=commit,
        git_dirty=None if changes is None else bool(changes),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # as this one in a bare checkout


def _git(*arguments: str) -> str | None:
    """Asks git about this source tree; None where there is no git, repository or commit."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=Path(__file__).resolve().parent.parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
