"""Plugins by name: found through entry points, loaded late, and every mistake explained."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble import registry
from smp_ensemble.exceptions import ConfigError

GROUP = "smp_ensemble.combiners"


@pytest.fixture
def install(monkeypatch):
    """Pretends that distributions with these entry points of `GROUP` are the only ones installed."""

    def install(*points: tuple[str, str, str]) -> None:
        found = []
        for dist, name, value in points:
            distribution = SimpleNamespace(name=dist)
            distribution.entry_points = [EntryPoint(name, value, GROUP)._for(distribution)]
            found.append(distribution)
        monkeypatch.setattr(registry, "distributions", lambda: found)

    return install


@pytest.mark.parametrize("group", registry.GROUPS)
def test_everything_that_is_installed_loads(group):
    assert all(callable(registry.load(group, name)) for name in registry.names(group))


def test_built_ins_come_through_entry_points():
    assert {"single", "snapshot"} <= set(registry.names("smp_ensemble.trainers"))
    assert registry.load(GROUP, "mean").__name__ == "Mean"


def test_names_are_sorted_and_nothing_is_imported(install):
    install(("b", "zebra", "colorsys:rgb_to_hsv"), ("a", "ant", "no_such_module:thing"))
    sys.modules.pop("colorsys", None)
    assert registry.names(GROUP) == ["ant", "zebra"]
    assert "colorsys" not in sys.modules
    assert registry.load(GROUP, "zebra").__name__ == "rgb_to_hsv"


def test_an_unknown_name_lists_what_is_installed_and_the_nearest(install):
    install(("a", "mean", "math:sqrt"), ("a", "vote", "math:cos"))
    with pytest.raises(ConfigError, match=r"^unknown combiner 'maen': did you mean 'mean'\? Known: mean, vote$"):
        registry.load(GROUP, "maen")


def test_an_empty_group_says_so(install):
    install()
    with pytest.raises(ConfigError, match="unknown combiner 'mean': Known: none"):
        registry.load(GROUP, "mean")


def test_two_distributions_with_one_name_are_both_named(install):
    install(("ours", "mean", "math:sqrt"), ("theirs", "mean", "math:cos"))
    with pytest.raises(
        ConfigError, match=r"'mean' is claimed by ours \(math:sqrt\) and theirs \(math:cos\): uninstall"
    ):
        registry.load(GROUP, "mean")


def test_a_copy_that_a_model_brought_along_hides_nothing(install):
    """MLflow puts a model's code first on the path; the installed copy is the one that counts."""
    install(("ours", "mean", "old_module:Mean"), ("ours", "mean", "math:sqrt"), ("ours", "vote", "math:cos"))
    assert registry.names(GROUP) == ["mean", "vote"]
    assert registry.load(GROUP, "mean")(4.0) == 2.0


def test_one_object_that_is_found_twice_is_no_conflict(install):
    install(("ours", "mean", "math:sqrt"), ("ours", "mean", "math:sqrt"))
    assert registry.load(GROUP, "mean")(4.0) == 2.0


@pytest.mark.parametrize("value", ["no_such_module:thing", "math:no_such_function"])
def test_a_broken_plugin_is_named_with_its_reason(install, value):
    install(("theirs", "odd", value))
    with pytest.raises(ConfigError, match=rf"combiner 'odd' \({value}\) cannot be imported: .*no_such"):
        registry.load(GROUP, "odd")


@given(st.lists(st.text("abcdef", min_size=3, max_size=8), min_size=1, max_size=6, unique=True), st.data())
def test_the_nearest_of_a_known_name_is_itself_in_any_case(known, data):
    name = data.draw(st.sampled_from(known))
    assert registry.nearest(name.upper(), known) == f"did you mean '{name}'? Known: {', '.join(sorted(known))}"


def test_long_lists_are_cut_and_counted():
    text = registry.nearest("nothing like it", [f"encoder{index:03}" for index in range(100)])
    assert text.startswith("Known: encoder000, ")
    assert text.endswith("encoder039, ... (100 in all)")
