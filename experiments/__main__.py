"""The command line: `python -m experiments demo | list | run STUDY | pretrain | report`.

Help and `list` need a plain install only, and no JAX. The other commands are imported when they are
asked for, and so is all that they need.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from experiments.catalogue import study_names, study_title
from experiments.errors import ExperimentError, explain_missing
from experiments.methods import METHODS


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Shows the message and exits with status 2."""
        self.exit(2, f"Error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command. A mistake in what was asked for is shown as one line, with exit status 2.

    Args:
        arguments: Of the command line; this process's by default.
    """
    parser = make_parser()
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        if command is None:
            parser.print_help()
        elif command == "list":
            list_all()
        else:
            _run_command(command, options)
    except ExperimentError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def _run_command(name: str, options: dict[str, object]) -> None:
    try:
        from experiments import commands

        getattr(commands, name)(**options)
    except ModuleNotFoundError as error:
        raise explain_missing(error) from error


def list_all() -> None:
    """Lists the studies and the methods."""
    console = Console(highlight=False, soft_wrap=True)
    console.print("[bold]Studies[/bold]  (python -m experiments run STUDY)")
    for name in study_names():
        console.print(f"  {name:28}{study_title(name)}")
    console.print("[bold]Methods[/bold]  (--method)")
    for name, method in METHODS.items():
        console.print(f"  {name:28}{method.summary}")


def make_parser() -> Parser:
    """Returns the parser, whose options are the arguments of the functions in `commands`."""
    parser = Parser(
        prog="python -m experiments", description="Fine-tuning experiments with LoRA optimizers."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add_command(name: str, text: str) -> Parser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    demo = add_command("demo", "Adapts a small ViT: AdamW, PoLoRA, AltLoRA+ and SDS-LoRA.")
    add_command("list", "Lists the studies and the methods.")
    run = add_command("run", "Runs a study, one JSON file a run, and shows what came out.")
    pretrain = add_command("pretrain", "Pretrains a small decoder on books, for --model.")
    report = add_command("report", "Writes the stored results into the documentation.")

    demo.add_argument("--quick", action="store_true", help="a short version, for CI")
    run.add_argument("study", metavar="STUDY", help="name of a study; `list` shows them")
    run.add_argument("--task", help="another task than the study's, with its own defaults")
    run.add_argument("--model", help="name on the Hugging Face hub, or a folder")
    run.add_argument(
        "--data-dir", type=Path, help="folder that holds the data sets: `mnist`, `sst2`, …"
    )
    run.add_argument("--smoke", action="store_true", help="a few steps, to see it work")
    run.add_argument("--jobs", type=_positive, default=1, help="processes that work side by side")
    run.add_argument("--resume", action="store_true", help="go on from the results that are there")
    run.add_argument(
        "--save-adapter",
        action="store_true",
        help="write what each finished run has trained beside its result, as .safetensors",
    )
    for command in (demo, run):
        command.add_argument("--out", type=Path, help="folder for results and figure")
        command.add_argument(
            "--fresh",
            action="store_true",
            help="delete the results that are there, with their adapters, and begin anew",
        )
    run.add_argument("--steps", type=int, help="same as --override plan.steps=N")
    for name, kind, text in (
        ("--variant", str, "only this"),
        ("--method", str, "only this"),
        ("--learning-rate", float, "in place of the sweep"),
        ("--seed", int, "in place of the seeds"),
        ("--override", str, "key=value, e.g. task_options.rank=4"),
    ):
        run.add_argument(name, type=kind, action="append", default=[], help=f"{text}; repeatable")

    pretrain.add_argument("--data-dir", type=Path, help="folder that holds `books/books.txt.xz`")
    pretrain.add_argument(
        "--out", type=Path, help="folder to make; build/decoders/wWIDTH by default"
    )
    for name, size, text in (
        ("--width", 256, "features of a token"),
        ("--depth", 4, "layers"),
        ("--steps", 3000, "updates"),
        ("--batch-size", 16, "windows of 128 tokens a step"),
    ):
        pretrain.add_argument(name, type=_positive, default=size, help=f"{text}; {size} by default")
    pretrain.add_argument(
        "--learning-rate", type=_rate, help="peak rate of AdamW; 0.4 / width by default"
    )

    report.add_argument(
        "--check", action="store_true", help="write nothing; fail if the pages are not up to date"
    )
    for name, default, text in (
        ("--results", "experiments/results", "folder with one folder of results a study"),
        ("--docs", "docs/results", "folder of the pages"),
        ("--readme", "README.md", "file with the markers"),
    ):
        report.add_argument(
            name, type=Path, default=Path(default), help=f"{text}; {default} by default"
        )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    main()
