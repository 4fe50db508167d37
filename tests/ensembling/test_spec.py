"""`ensemble.json`: written as read, and nothing strange in it gets through."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.ensembling.spec import ENSEMBLE_FILE, EnsembleSpec, MemberEntry, read_spec, write_spec
from smp_ensemble.exceptions import IntegrityError
from smp_ensemble.typing import MODES, Task

NORMALIZATION = {"kind": "none", "mean": [0.0], "std": [1.0], "maximum": 255.0}
FILES = {"config.json": "a" * 64, "model.safetensors": "b" * 64}

numbers = st.floats(2**-20, 1e6)
texts = st.text(min_size=1, max_size=5)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def make_entry(index: int = 0, weight: float = 1.0, source: str = "", **alone: float) -> MemberEntry:
    return MemberEntry(f"members/{index:02d}", source, weight, NORMALIZATION, FILES, **alone)


@st.composite
def specs(draw) -> EnsembleSpec:
    weights = draw(st.lists(numbers, min_size=1, max_size=3))
    return EnsembleSpec(
        draw(st.sampled_from(MODES)),
        tuple(draw(st.lists(texts, min_size=2, max_size=4, unique=True))),
        draw(st.integers(1, 12)),
        tuple(
            make_entry(
                index, weight, draw(st.text(max_size=9)), threshold=draw(st.floats(0, 1)), temperature=draw(numbers)
            )
            for index, weight in enumerate(weights)
        ),
        combiner=draw(texts),
        views=tuple(draw(st.lists(texts, max_size=2))),
        temperature=draw(numbers),
        threshold=draw(st.floats(0.01, 0.99)),
        reject=draw(st.floats(0, 0.99)),
        combiner_sha256=draw(st.none() | st.just("c" * 64)),
        postprocess=draw(st.dictionaries(texts, st.integers(), max_size=2)),
        adaptive=draw(st.none() | st.dictionaries(texts, st.integers(), max_size=2)),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("spec")


def paths_in(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_in(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@given(specs())
def test_what_is_written_is_read(folder, spec):
    write_spec(spec, folder)
    assert read_spec(folder) == spec


@given(specs(), st.data())
def test_any_other_value_anywhere_is_read_or_refused(folder, spec, data):
    write_spec(spec, folder)
    content = json.loads((folder / ENSEMBLE_FILE).read_text(encoding="utf-8"))
    path = data.draw(st.sampled_from(list(paths_in(content))))
    changed = replaced(content, path, data.draw(anything))
    (folder / ENSEMBLE_FILE).write_text(json.dumps(changed), encoding="utf-8")
    with contextlib.suppress(IntegrityError):  # and nothing else
        read_spec(folder)


def test_the_task_is_what_the_data_must_be(folder):
    spec = EnsembleSpec("multilabel", ("roof", "road"), 4, (make_entry(),))
    assert spec.task == Task("multilabel", ("roof", "road"), 4)


def test_an_older_file_lacks_keys_and_is_read_with_their_defaults(folder):
    spec = EnsembleSpec("binary", ("a", "b"), 3, (make_entry(),), combiner="mean", threshold=0.4)
    write_spec(spec, folder)
    content = json.loads((folder / ENSEMBLE_FILE).read_text(encoding="utf-8"))
    newer = {"reject", "combiner_sha256", "postprocess"}
    older = {name: value for name, value in content.items() if name not in newer}
    older["members"] = [
        {name: value for name, value in member.items() if name not in {"source", "threshold", "temperature"}}
        for member in content["members"]
    ]
    assert newer <= set(content)
    (folder / ENSEMBLE_FILE).write_text(json.dumps(older), encoding="utf-8")
    assert read_spec(folder) == spec


def test_a_file_without_a_rule_does_not_name_it(folder):
    write_spec(EnsembleSpec("binary", ("a", "b"), 3, (make_entry(),)), folder)
    assert "adaptive" not in json.loads((folder / ENSEMBLE_FILE).read_text(encoding="utf-8"))
    assert read_spec(folder).adaptive is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("postprocess", None), ("postprocess", []), ("postprocess", [["opening", 1]]), ("postprocess", 0),
        ("postprocess", ""), ("reject", None), ("reject", "much"), ("reject", []), ("views", None), ("views", 1),
        ("adaptive", None), ("adaptive", []), ("adaptive", True), ("adaptive", 0.001),
    ],
)  # fmt: skip
def test_a_wrong_type_is_named(folder, name, value):
    write_spec(EnsembleSpec("binary", ("a", "b"), 3, (make_entry(),)), folder)
    content = json.loads((folder / ENSEMBLE_FILE).read_text(encoding="utf-8"))
    (folder / ENSEMBLE_FILE).write_text(json.dumps({**content, name: value}), encoding="utf-8")
    with pytest.raises(IntegrityError, match=f"{folder / ENSEMBLE_FILE} does not hold what it should: .*Error"):
        read_spec(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected ensemble.json in .*, found none: not an smp_ensemble model"),
        (b"{", "cannot read .*ensemble.json"),
        (b"\xff", "cannot read .*ensemble.json"),
        (b"[" * 100_000, "cannot read .*ensemble.json"),
        (b"[]", "ensemble.json does not hold what it should"),
        (b"{}", "ensemble.json does not hold what it should: KeyError 'format'"),
        (b'{"format": 2}', "has format 2, this version reads 1: update smp_ensemble"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / ENSEMBLE_FILE).write_bytes(content)
    with pytest.raises(IntegrityError, match=message):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    "relative", ["../outside", "members/../../outside", "/etc", "C:\\models", "c:/models", "members\\..\\..\\outside"]
)
def test_a_member_cannot_lie_outside(folder, relative):
    entry = MemberEntry(relative, "", 1.0, NORMALIZATION, FILES)
    write_spec(EnsembleSpec("binary", ("a", "b"), 1, (entry,)), folder)
    with pytest.raises(IntegrityError, match="which leaves the artifact: refused"):
        read_spec(folder)


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": "a"},
        {"model.safetensors": "b"},
        {**FILES, "../../secret": "c"},
        {**FILES, "pytorch_model.bin": "c"},
        {},
    ],
)
def test_a_member_has_the_known_files_and_no_others(folder, files):
    entry = MemberEntry("members/00", "", 1.0, NORMALIZATION, files)
    write_spec(EnsembleSpec("binary", ("a", "b"), 1, (entry,)), folder)
    with pytest.raises(IntegrityError, match=r"lists the files .* for 'members/00', expected"):
        read_spec(folder)
