"""The command line, thin: options -> workflows. One line for an error, exit code 2 where the user can mend it."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import traceback
from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any, NoReturn

from smp_ensemble import registry
from smp_ensemble.exceptions import ConfigError, InputError, Interrupted, SmpEnsembleError, UndeliveredError
from smp_ensemble.workflows import options as workflow_options
from smp_ensemble.workflows.results import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
UNDELIVERED = 3  # all is done, and waits on local disk for `smp-ensemble sync`
SIGNALLED = 128  # and the signal's number: 130 after Ctrl-C, 143 after SIGTERM


@dataclass(frozen=True)
class Command:
    """One command: where it lives, which options it takes, what it does.

    Attributes:
        target: `module:function` below `smp_ensemble.workflows`; imported when it is called.
        options: Its dataclass of options.
        summary: One line.
        example: How one calls it.
    """

    target: str
    options: type[Any]
    summary: str
    example: str


COMMANDS = {
    "main": Command(
        "main:main", workflow_options.MainOptions,
        "the whole way: train, select, combine, evaluate, register",
        "smp-ensemble main --data my_data --epochs 40 --cycles 4 --register-as buildings",
    ),
    "train": Command(
        "train:train", workflow_options.TrainOptions,
        "data -> snapshots in MLflow, each with its scores",
        "smp-ensemble train --data my_data --arch fpn --encoder-name resnet34 --encoder-weights imagenet",
    ),
    "ensemble": Command(
        "ensemble:ensemble", workflow_options.EnsembleOptions,
        "snapshots -> one model, scored against its best member, registered if asked",
        "smp-ensemble ensemble --data my_data --where \"metrics.val_iou > 0.6\" --register-as buildings",
    ),
    "soup": Command(
        "soup:soup", workflow_options.SoupOptions,
        "snapshots -> one snapshot whose weights are their average, batch norm refreshed",
        "smp-ensemble soup --data my_data --where \"params.trainer = 'snapshot'\" --selector greedy",
    ),
    "distill": Command(
        "distill:distill", workflow_options.DistillOptions,
        "an ensemble -> one student that learned from its predictions, and what it kept",
        "smp-ensemble distill --model models:/buildings@champion --data my_data --unlabelled more_images/ --epochs 40",
    ),
    "evaluate": Command(
        "evaluate:evaluate", workflow_options.EvaluateOptions,
        "any model of ours -> scores and overlays",
        "smp-ensemble evaluate --model models:/buildings@champion --data my_data --split test",
    ),
    "predict": Command(
        "predict:predict", workflow_options.PredictOptions,
        "images -> files: masks, probabilities, overlays, or run lengths as a contest CSV",
        "smp-ensemble predict --model models:/buildings@champion --input photos/ --output masks/",
    ),
    "export": Command(
        "export:export", workflow_options.ExportOptions,
        "any model of ours -> one file, ONNX or torch.export's, that runs without this package",
        "smp-ensemble export --model models:/buildings@champion --format onnx --output buildings.onnx",
    ),
    "snapshots": Command(
        "snapshots:snapshots", workflow_options.SnapshotsOptions,
        "a table of tracked snapshots, best first, and the link to the tracking UI",
        "smp-ensemble snapshots --where \"params.arch = 'unet'\" --limit 10",
    ),
    "sync": Command(
        "sync:sync", workflow_options.SyncOptions,
        "what waits on local disk for a tracking server that was away -> MLflow",
        "smp-ensemble sync",
    ),
    "import": Command(
        "import_checkpoints:import_checkpoints", workflow_options.ImportOptions,
        "checkpoints that exist already -> tracked snapshots, scored",
        "smp-ensemble import --files \"old/*.pt\" --arch unet --encoder-name resnet34 --data my_data",
    ),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that a run of `mlflow run` can be ended as FAILED first."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def flag(name: str) -> str:
    """`--crop-size` of `crop_size`."""
    return f"--{name.replace('_', '-')}"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; every option comes from a dataclass field."""
    parser = _Parser(
        prog="smp-ensemble",
        description="Ensembles for semantic segmentation: train one, keep its snapshots in MLflow, serve the ensemble.",
        epilog="Every option is a parameter of the same name of `mlflow run . -e COMMAND -P name=value`.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=f"{name}: {command.summary}.",
            epilog=f"example: {command.example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        for known in fields(command.options):
            sub.add_argument(
                flag(known.name),
                dest=known.name,
                metavar=known.name.rpartition("_")[2].upper(),
                default=argparse.SUPPRESS,
                help=f"{known.metadata['help']} (default: {default_text(known) or 'none'})".replace("%", "%%"),
            )
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--debug", action="store_true", help="print the whole traceback of an error")
    return parser


def default_text(known: Field[Any]) -> str:
    """An option's default as one would type it; empty where there is none."""
    default = known.default
    if known.default_factory is not MISSING:
        default = known.default_factory()
    if default is None or default == "":
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    return json.dumps(default) if isinstance(default, dict) else str(default)


def parse_options(options: type[Any], typed: dict[str, str]) -> Any:
    """Turns what was typed into a dataclass of options; an empty value stands for the default.

    Raises:
        ConfigError: A value of the wrong type, or a required one that is missing.
    """
    values = {}
    for known in fields(options):
        text = typed.get(known.name, "")
        if text == "":
            if known.metadata.get("required"):
                raise ConfigError(f"{flag(known.name)} is required: {known.metadata['help']}")
            continue
        try:
            values[known.name] = known.metadata["parse"](text)
        except ConfigError as error:
            raise ConfigError(f"{flag(known.name)}: {error}") from error
        except ValueError as error:
            wanted = {int: "a whole number", float: "a number"}.get(known.metadata["parse"], "another value")
            raise ConfigError(f"{flag(known.name)}: expected {wanted}, got '{text}'") from error
    return options(**values)


def run(arguments: Sequence[str]) -> Report:
    """Parses a command line and runs its command."""
    parser = build_parser()
    parsed, unknown = parser.parse_known_args(arguments)
    command = COMMANDS[parsed.command]
    typed = {name: value for name, value in vars(parsed).items() if name not in {"command", "json", "debug"}}
    if unknown:
        known = [flag(known.name) for known in fields(command.options)]
        raise ConfigError(f"{parsed.command} has no option '{unknown[0]}': {registry.nearest(unknown[0], known)}")
    chosen = parse_options(command.options, typed)
    module, _, function = command.target.partition(":")
    work: Callable[[Any], Any] = getattr(importlib.import_module(f"smp_ensemble.workflows.{module}"), function)
    result = work(chosen)
    return result if isinstance(result, Report) else result.report()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("smp_ensemble").setLevel(logging.INFO)
    # With a tracking server MLflow prints two lines for every run that ends, before our table or our JSON.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    try:
        report = run(arguments)
    except Interrupted as error:
        _fail(_with_notes(error), arguments)
        return SIGNALLED + error.signal_number
    except KeyboardInterrupt as error:
        _fail(_with_notes(error, "interrupted"), arguments)
        return INTERRUPTED
    except InputError as error:
        _fail(str(error), arguments)
        return BAD_INPUT
    except SmpEnsembleError as error:
        only_waits = isinstance(error, UndeliveredError)
        _fail(_with_notes(error), arguments, end_run=not only_waits)
        return UNDELIVERED if only_waits else FAILED
    except Exception as error:  # noqa: BLE001 (the last line of defence: one line for people, --debug for the rest)
        _fail(_with_notes(error, f"{type(error).__name__}: {error} (--debug shows where)"), arguments)
        return FAILED
    print(report.json() if "--json" in arguments else report.text())
    return 0


def _with_notes(error: BaseException, message: str | None = None) -> str:
    """An error's message, with what the workflow says on how to go on."""
    return "; ".join([str(error) if message is None else message, *getattr(error, "__notes__", ())])


def _fail(message: str, arguments: Sequence[str], *, end_run: bool = True) -> None:
    """Says what is wrong in one line, and ends the run of `mlflow run` with that reason."""
    if "--debug" in arguments:
        traceback.print_exc()
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    if end_run and os.environ.get("MLFLOW_RUN_ID"):  # importing MLflow takes seconds: a typing error should not
        from smp_ensemble.tracking.runs import fail_project_run

        fail_project_run(line)


if __name__ == "__main__":
    sys.exit(main())
