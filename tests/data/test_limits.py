"""What is refused before it is decoded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.data.limits import FILES, SERVED, VARIABLES, Limits, limits_from
from smp_ensemble.exceptions import ConfigError, DataError, InputError

NAMES = sorted(VARIABLES)


@given(st.sampled_from(NAMES), st.integers(1, 1 << 40), st.integers(0, 1 << 41))
def test_as_many_as_the_limit_are_taken_and_one_more_is_not(name, limit, found):
    limits = Limits(**{name: limit})
    Limits().check(name, found, "of them")
    if found <= limit:
        limits.check(name, found, "of them")
    else:
        with pytest.raises(InputError, match=rf"^expected at most {limit} of them, got {found}: .*{VARIABLES[name]}$"):
            limits.check(name, found, "of them")


def test_sizes_by_hand():
    limits = Limits(image_pixels=100)
    limits.check_size(10, 10, 3, "a")
    limits.check_size(10, 10, 16, "a")
    limits.check_size(5, 10, 32, "a")
    with pytest.raises(DataError, match=r"^cannot read image a: 1 x 101 pixels are more than the 100 allowed: cut it "):
        limits.check_size(1, 101, 3, "a")
    with pytest.raises(DataError, match="a: 10 x 10 pixels of 17 bands are more than the 100 allowed"):
        limits.check_size(10, 10, 17, "a")
    Limits().check_size(1 << 40, 1 << 40, 1 << 16, "a")


def test_defaults_of_servers_are_tighter_than_those_of_files():
    for name in NAMES:
        file, served = getattr(FILES, name), getattr(SERVED, name)
        assert served is not None
        assert file is None or served <= file
    assert SERVED.image_pixels == 4096 * 4096


@given(st.dictionaries(st.sampled_from(NAMES), st.none() | st.integers(1, 1 << 50)))
def test_the_environment_sets_what_it_names_and_nothing_else(values):
    environment = {VARIABLES[name]: "None" if value is None else f" {value} " for name, value in values.items()}
    found = limits_from({**environment, "PATH": "/bin"}, SERVED)
    assert found == Limits(**{**{name: getattr(SERVED, name) for name in NAMES}, **values})


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "1e6", "¹", "٣"])
def test_a_wrong_limit_is_named(text):
    with pytest.raises(ConfigError, match=f"expected SMP_ENSEMBLE_MAX_PASSES as a whole number .* got '{text}'"):
        limits_from({"SMP_ENSEMBLE_MAX_PASSES": text}, FILES)


def test_an_empty_variable_sets_nothing():
    assert limits_from({"SMP_ENSEMBLE_MAX_PASSES": ""}, SERVED) == SERVED
