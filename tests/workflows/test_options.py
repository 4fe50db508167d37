"""Options: how typed text becomes a value."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.typing import KINDS
from smp_ensemble.workflows.options import (
    EnsembleOptions,
    EvaluateOptions,
    ImportOptions,
    MainOptions,
    PredictOptions,
    TrainOptions,
    option,
    parse_bool,
    parse_json,
    parse_positive,
    parse_weights,
)

json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4), st.lists, max_leaves=4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("TRUE", True),
        ("1", True),
        ("yes", True),
        ("on", True),
        ("False", False),
        ("0", False),
        ("off", False),
    ],
)
def test_booleans(text, value):
    assert parse_bool(text) is value


@given(st.dictionaries(st.text(max_size=4), json_values, max_size=3))
def test_json_objects_come_back(value):
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize("text", ["[1]", "1", "null", '"a"', "{", "{'a': 1}", "[" * 100_000])
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(ConfigError, match="expected a JSON object like"):
        parse_json(text)


@given(st.integers(1, 10**12))
def test_whole_numbers_above_0(number):
    assert parse_positive(str(number)) == number


@pytest.mark.parametrize("text", ["0", "-3", "1.0", "1e3", "two", "nan", "1" * 5000])
def test_other_numbers_are_refused(text):
    with pytest.raises(ConfigError, match="expected a whole number above 0, got"):
        parse_positive(text)


def test_a_boolean_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="expected true or false, got 'maybe'"):
        parse_bool("maybe")


@pytest.mark.parametrize(("text", "value"), [("none", None), ("NULL", None), ("", None), ("imagenet", "imagenet")])
def test_encoder_weights(text, value):
    assert parse_weights(text) == value


def test_options_are_frozen_and_their_dictionaries_their_own():
    with pytest.raises(FrozenInstanceError):
        TrainOptions().epochs = 3
    TrainOptions().model_options["depth"] = 3
    assert TrainOptions().model_options == {}


def test_options_go_by_name_alone():
    with pytest.raises(TypeError):
        TrainOptions("data")


def test_main_is_the_union_of_train_and_ensemble():
    union = {known.name for known in (*fields(TrainOptions), *fields(EnsembleOptions))}
    assert {known.name for known in fields(MainOptions)} == union


def test_commands_that_need_training_images_choose_a_part_of_them():
    parts = {"folds", "bootstrap", "fold"}
    for options in (TrainOptions, MainOptions, EvaluateOptions, ImportOptions):
        assert parts <= {known.name for known in fields(options)}
    assert not parts & {known.name for known in fields(EnsembleOptions)}  # all folds share its validation data
    assert "-P folds=5 -P fold=3" in {known.name: known for known in fields(TrainOptions)}["fold"].metadata["help"]


def test_help_tells_the_kinds_apart():
    known = {known.name: known for known in fields(PredictOptions)}["kind"]
    assert known.default in KINDS
    assert known.default in known.metadata["help"]


def test_an_option_knows_how_to_read_itself():
    made = option(3, "so many", required=True)
    assert made.default == 3
    assert made.metadata["parse"]("7") == 7
    assert made.metadata["required"]
