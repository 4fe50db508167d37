from __future__ import annotations

import pytest

from smp_ensemble.data.sidecars import Classes, read_classes, read_splits
from smp_ensemble.exceptions import DataError


def test_missing_files_are_no_error(tmp_path):
    assert read_classes(tmp_path / "classes.json") is None
    assert read_splits(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ('{"names": ["a", "b"]}', Classes(("a", "b"))),
        ('{"names": ["a", "b"], "task": "binary", "ignore_index": 7}', Classes(("a", "b"), "binary", 7)),
        ('{"names": ["a"], "ignore_index": null, "more": 1}', Classes(("a",))),
    ],
)
def test_classes_are_read(tmp_path, text, classes):
    (tmp_path / "classes.json").write_text(text)
    assert read_classes(tmp_path / "classes.json") == classes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read .*classes.json: Expecting property name"),
        ("[]", "a list of class names, found None"),
        ('{"names": []}', r"a list of class names, found \[\]"),
        ('{"names": ["a", 1]}', "a list of class names, found"),
        ('{"names": ["a", "a"]}', "different class names, found a, a"),
        ('{"names": ["a"], "task": "multiclas"}', "unknown task 'multiclas': did you mean 'multiclass'"),
        ('{"names": ["a"], "ignore_index": "x"}', "a whole number as ignore_index, found 'x'"),
    ],
)
def test_malformed_classes_are_named(tmp_path, text, message):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_classes(tmp_path / "classes.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a column 'image', found an empty file"),
        ("file,mask\n", "expected a column 'image', found file, mask"),
        ("image,mask\na.png\n", r"line 2: expected 2 values \(image, mask\)"),
        ("image,mask\na.png,b.png,c\n", r"line 2: expected 2 values"),
        ("image,mask\n,b.png\n", "line 2: expected a path in the column 'image', found none"),
        ("image,mask,split\na,b,train\nc,d,valid\n", "line 3: expected split train, val or test, found 'valid'"),
        ("image,mask,split\na,b,train\nc,d,\n", "line 3: expected split train, val or test, found ''"),
        ("image,mask,group\na,b,g\nc,d,\n", "line 3: expected a group, as other rows have one, found none"),
    ],
)
def test_malformed_splits_are_named(tmp_path, text, message):
    (tmp_path / "splits.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_splits(tmp_path)
