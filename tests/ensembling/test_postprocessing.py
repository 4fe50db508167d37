"""Settings of post-processing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.ensembling.postprocessing import Crf, PostProcessing, parse_postprocess
from smp_ensemble.exceptions import ConfigError

pixels = st.integers(0, 1000)
positive = st.floats(1e-3, 1e3)
weights = st.floats(0, 1e3)
crfs = st.builds(
    Crf,
    iterations=st.integers(1, 20),
    window=st.integers(1, 30).map(lambda radius: 2 * radius + 1),
    position_sigma=positive,
    position_weight=weights,
    bilateral_sigma=positive,
    colour_sigma=positive,
    bilateral_weight=weights,
)
settings = st.builds(
    PostProcessing, opening=pixels, closing=pixels, min_area=pixels, max_hole=pixels, crf=st.none() | crfs
)


@given(settings)
def test_json_brings_every_setting_back(one):
    text = json.dumps(one.to_dict())
    assert PostProcessing.from_dict(json.loads(text)) == one
    assert parse_postprocess(text) == one
    assert one.active == bool(one.to_dict())


def test_only_what_is_on_is_written():
    assert PostProcessing().to_dict() == {}
    assert not PostProcessing().active
    assert PostProcessing(closing=1, max_hole=9).to_dict() == {"closing": 1, "max_hole": 9}
    assert PostProcessing(crf=Crf(window=5)).to_dict() == {
        "crf": {
            "iterations": 5, "window": 5, "position_sigma": 3.0, "position_weight": 1.0, "bilateral_sigma": 10.0,
            "colour_sigma": 13.0, "bilateral_weight": 3.0,
        }
    }  # fmt: skip


def test_what_is_not_named_has_its_default():
    assert PostProcessing.from_dict({}) == PostProcessing()
    assert PostProcessing.from_dict({"crf": {}}) == PostProcessing(crf=Crf())
    assert PostProcessing.from_dict({"crf": None}) == PostProcessing()
    assert PostProcessing.from_dict({"crf": {"window": 7, "colour_sigma": 20}}).crf == Crf(window=7, colour_sigma=20.0)


def test_settings_as_typed():
    for nothing in ("", " ", "none", "None"):
        assert parse_postprocess(nothing) == PostProcessing()
    assert parse_postprocess('{"min_area": 64, "crf": {"iterations": 2}}') == PostProcessing(
        min_area=64, crf=Crf(iterations=2)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"min_areas": 3}, "unknown setting 'min_areas' of post-processing: did you mean 'min_area'"),
        ({"crf": {"windows": 3}}, "unknown setting 'windows' of crf: did you mean 'window'"),
        ({"min_area": 2.5}, "min_area as a whole number from 0, got 2.5"),
        ({"min_area": True}, "min_area as a whole number from 0, got True"),
        ({"opening": -1}, "opening as a whole number from 0, got -1"),
        ({"closing": "2"}, "closing as a whole number from 0, got '2'"),
        ({"max_hole": None}, "max_hole as a whole number from 0, got None"),
        ({"crf": 3}, "settings of crf as a JSON object"),
        ([1], "settings of post-processing as a JSON object"),
        ({"crf": {"iterations": 0}}, "crf.iterations as a whole number from 1, got 0"),
        ({"crf": {"window": 1}}, "crf.window as a whole number from 3, got 1"),
        ({"crf": {"window": 10}}, "crf.window as an odd number of pixels, got 10"),
        ({"crf": {"position_sigma": 0}}, "crf.position_sigma as a number above 0, got 0"),
        ({"crf": {"bilateral_sigma": "far"}}, "crf.bilateral_sigma as a number above 0, got 'far'"),
        ({"crf": {"colour_sigma": float("inf")}}, "crf.colour_sigma as a number above 0, got inf"),
        ({"crf": {"position_weight": -1.0}}, "crf.position_weight as a number from 0, got -1.0"),
        ({"crf": {"bilateral_weight": float("nan")}}, "crf.bilateral_weight as a number from 0, got nan"),
    ],
)
def test_what_makes_no_sense_is_refused(content, message):
    with pytest.raises(ConfigError) as error:
        PostProcessing.from_dict(content)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_text_and_other_types_are_refused():
    for text in ("auto", "{", "3"):
        with pytest.raises(ConfigError, match="JSON object|expected post-processing as"):
            parse_postprocess(text)
    with pytest.raises(ConfigError, match="crf as a Crf or None"):
        PostProcessing(crf={"window": 3})
