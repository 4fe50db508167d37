"""The command line: what is typed becomes options, and what is wrong becomes one line and exit code 2."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from smp_ensemble import cli
from smp_ensemble.exceptions import ConfigError, IntegrityError, Interrupted, TrainingError
from smp_ensemble.tracking import runs
from smp_ensemble.workflows.options import TrainOptions
from smp_ensemble.workflows.results import Report

ROOT = Path(__file__).parents[1]


@pytest.fixture
def work(monkeypatch):
    """Puts a function in the place of the workflow behind `train`; it is called with the options."""
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)

    def replace(function) -> None:
        monkeypatch.setitem(sys.modules, "smp_ensemble.workflows.stand_in", SimpleNamespace(work=function))
        command = cli.Command("stand_in:work", TrainOptions, "a stand-in", "smp-ensemble train")
        monkeypatch.setitem(cli.COMMANDS, "train", command)

    return replace


def typed(*arguments: str) -> TrainOptions:
    parsed = vars(cli.build_parser().parse_args(["train", *arguments]))
    return cli.parse_options(TrainOptions, parsed)


def required_of(options) -> dict[str, str]:
    return {known.name: "given" for known in fields(options) if known.metadata.get("required")}


def failing(error: BaseException):
    def work(options):
        raise error

    return work


def error_of(capsys) -> str:
    """The one line on stderr; nothing may be on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    return captured.err.removeprefix("error: ").rstrip("\n")


def load_generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


every_command = pytest.mark.parametrize("command", sorted(cli.COMMANDS))


@every_command
def test_no_options_and_empty_options_are_the_defaults(command):
    options = cli.COMMANDS[command].options
    required = required_of(options)
    empty = {known.name: "" for known in fields(options)} | required
    assert cli.parse_options(options, required) == cli.parse_options(options, empty) == options(**required)


@every_command
def test_a_default_that_is_typed_out_is_the_default(command):
    options = cli.COMMANDS[command].options
    required = required_of(options)
    written = {known.name: cli.default_text(known) for known in fields(options)} | required
    assert cli.parse_options(options, written) == options(**required)


@every_command
def test_help_names_every_option_and_its_default(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for known in fields(cli.COMMANDS[command].options):
        assert cli.flag(known.name) in shown
        assert known.metadata["help"].split()[0] in shown
    assert f"smp-ensemble {command}" in shown
    assert "--json" in shown


def test_the_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in cli.COMMANDS)


def test_values_take_the_type_of_their_option():
    options = typed(
        *("--epochs", "7", "--lr", "1e-3", "--freeze-encoder", "True", "--crop-size=64", "--folds", "3"),
        *("--model-options", '{"decoder_channels": [8, 4]}', "--encoder-weights", "imagenet", "--data", "a b"),
    )
    assert (options.epochs, options.lr, options.freeze_encoder, options.crop_size) == (7, 1e-3, True, 64)
    assert (options.folds, options.encoder_weights, options.data) == (3, "imagenet", "a b")
    assert options.model_options == {"decoder_channels": [8, 4]}


@pytest.mark.parametrize("word", ["none", "None", "null", ""])
def test_no_encoder_weights_may_be_said_in_words(word):
    assert typed("--encoder-weights", word).encoder_weights is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "ten"], "--epochs: expected a whole number above 0, got 'ten'"),
        (["--epochs", "0"], "--epochs: expected a whole number above 0, got 0"),
        (["--epochs", "1.5"], "--epochs: expected a whole number above 0, got '1.5'"),
        (["--seed", "x"], "--seed: expected a whole number, got 'x'"),
        (["--lr", "fast"], "--lr: expected a number, got 'fast'"),
        (["--freeze-encoder", "maybe"], "--freeze-encoder: expected true or false, got 'maybe'"),
        (["--model-options", "[8]"], "--model-options: expected a JSON object like {\"name\": 1}, got '[8]'"),
        (["--epoch", "5"], "train has no option '--epoch': did you mean '--epochs'? Known: --accelerator, "),
        (["--encoder_name", "x"], "train has no option '--encoder_name': did you mean '--encoder-name'?"),
        (["qqq"], "train has no option 'qqq': Known: "),
        (["--epochs"], "argument --epochs: expected one argument"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(work, capsys, arguments, message):
    work(failing(AssertionError("must not run")))
    assert cli.main(["train", *arguments]) == 2
    assert error_of(capsys).startswith(message)


def test_broken_json_says_what_was_expected(work, capsys):
    assert cli.main(["train", "--model-options", "{8}"]) == 2
    assert error_of(capsys).startswith("--model-options: expected a JSON object like {\"name\": 1}, got '{8}': ")


@pytest.mark.parametrize("arguments", [[], ["trian"]])
def test_no_command_or_an_unknown_one_lists_them(work, capsys, arguments):
    assert cli.main(arguments) == 2
    message = error_of(capsys)
    assert "COMMAND" in message
    assert not arguments or ("'trian'" in message and "train" in message)


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [(["evaluate"], "--model"), (["predict", "--model", "m"], "--input"), (["import"], "--files")],
)
def test_a_required_option_that_is_missing_is_named(work, capsys, arguments, missing):
    assert cli.main(arguments) == 2
    assert error_of(capsys).startswith(f"{missing} is required: ")


def test_an_option_cannot_be_shortened(work, capsys):
    assert cli.main(["train", "--epoc", "5"]) == 2
    assert "did you mean '--epochs'" in error_of(capsys)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("two\nlines"), 2, "two lines"),
        (IntegrityError("a file was changed"), 1, "a file was changed"),
        (RuntimeError("a defect"), 1, "RuntimeError: a defect (--debug shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_of_a_workflow_is_one_line(work, capsys, error, code, line):
    work(failing(error))
    assert cli.main(["train"]) == code
    assert error_of(capsys) == line


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (Interrupted("interrupted in epoch 2", signal.SIGINT), 130, "interrupted in epoch 2; to go on: x"),
        (Interrupted("interrupted in epoch 2", signal.SIGTERM), 143, "interrupted in epoch 2; to go on: x"),
        (KeyboardInterrupt(), 130, "interrupted; to go on: x"),
        (TrainingError("no room is left"), 1, "no room is left; to go on: x"),
        (RuntimeError("a defect"), 1, "RuntimeError: a defect (--debug shows where); to go on: x"),
    ],
)
def test_what_a_workflow_notes_on_an_error_is_said_with_it(work, capsys, error, code, line):
    error.add_note("to go on: x")
    work(failing(error))
    assert cli.main(["train"]) == code
    assert error_of(capsys) == line


def test_debug_shows_where(work, capsys):
    work(failing(ConfigError("wrong")))
    assert cli.main(["train", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("error: wrong\n")


def test_the_run_of_mlflow_run_ends_with_the_reason(work, capsys, monkeypatch):
    reasons = []
    monkeypatch.setattr(runs, "fail_project_run", reasons.append)
    work(failing(ConfigError("wrong")))
    cli.main(["train"])
    assert reasons == []
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    cli.main(["train"])
    assert reasons == ["wrong"]


def test_a_result_is_a_table_or_json(work, capsys):
    report = Report({"iou": 0.51234, "none": float("nan")}, [{"name": "a", "iou": 0.51234}], ["a note"])
    work(lambda options: report)
    assert cli.main(["train"]) == 0
    assert capsys.readouterr().out == "name     iou\n----  ------\na     0.5123\na note\n"
    assert cli.main(["train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"iou": 0.51234, "none": None}


def test_results_that_know_their_report_are_asked_for_it(work, capsys):
    @dataclass
    class Result:
        epochs: int

        def report(self) -> Report:
            return Report({"epochs": self.epochs})

    work(lambda options: Result(options.epochs))
    assert cli.main(["train", "--epochs", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"epochs": 3}


@pytest.mark.parametrize(("name", "function"), [("MLproject", "mlproject"), ("docs/commands.md", "commands_page")])
def test_written_files_follow_from_the_options(name, function):
    written = (ROOT / name).read_text(encoding="utf-8")
    assert written == getattr(load_generator(), function)(), "run: python docs/generate.py"


def test_mlproject_offers_every_command_and_option():
    points = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))["entry_points"]
    assert set(points) == set(cli.COMMANDS)
    for name, command in cli.COMMANDS.items():
        parameters, line = points[name]["parameters"], points[name]["command"]
        assert set(parameters) == {known.name for known in fields(command.options)}
        assert line.startswith(f"python -m smp_ensemble.cli {name} ")
        for known in fields(command.options):
            assert f"{cli.flag(known.name)} {{{known.name}}}" in line
            assert ("default" in parameters[known.name]) != bool(known.metadata.get("required"))


@every_command
def test_every_option_has_help_and_a_parser(command):
    for known in fields(cli.COMMANDS[command].options):
        assert known.metadata["help"]
        assert callable(known.metadata["parse"])
        assert known.default is not MISSING or known.default_factory is not MISSING


@every_command
def test_every_command_is_there(command):
    module, _, function = cli.COMMANDS[command].target.partition(":")
    assert callable(getattr(importlib.import_module(f"smp_ensemble.workflows.{module}"), function))
