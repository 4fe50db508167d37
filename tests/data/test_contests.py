from __future__ import annotations

import pytest
from PIL import Image

from smp_ensemble.data.contests import describe_contest
from smp_ensemble.exceptions import DataError


@pytest.fixture
def contest(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (3, 2)).save(tmp_path / "images" / f"{name}.png")

    def make(text: str, name: str = "train_mask.csv"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return make


def test_a_list_with_header_and_its_siblings(contest):
    contest("name,mask\nb.png,1 2\n", "val_mask.csv")
    description = describe_contest(contest("name,mask\nc.png,\na.png,2 1 6 1\n"))
    assert [(r.name, r.split, r.group) for r in description.records] == [
        ("c", "train", None), ("a", "train", None), ("b", "val", None),
    ]  # fmt: skip
    assert [r.mask.read().tolist() for r in description.records] == [
        [[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [1, 0, 1]], [[1, 0, 0], [1, 0, 0]],
    ]  # fmt: skip
    assert description.classes.names == ("background", "foreground")
    assert description.mode == "binary"


def test_a_list_with_tabs_has_no_header(contest):
    description = describe_contest(contest("a.png\t1 1\nb.png\t\nc.png\n", "labels.tsv"))
    assert [(r.name, r.split, int(r.mask.read().sum())) for r in description.records] == [
        ("a", None, 1), ("b", None, 0), ("c", None, 0),
    ]  # fmt: skip


def test_classes_and_groups_come_from_the_files_beside_it(contest, tmp_path):
    (tmp_path / "classes.json").write_text('{"names": ["land", "roof"], "ignore_index": 255}')
    (tmp_path / "splits.csv").write_text("image,mask,split,group\nimages/a.png,,train,g7\n")
    description = describe_contest(contest("name,mask\na.png,\n"))
    assert description.classes.names == ("land", "roof")
    assert description.records[0].group == "g7"
    with pytest.raises(DataError, match=r"line 3 \(b\.png\): expected a group of 'b' in .*splits\.csv, found none"):
        describe_contest(contest("name,mask\na.png,\nb.png,\n"))


def test_images_may_lie_beside_the_list_and_endings_be_left_out(contest, tmp_path):
    (tmp_path / "images" / "a.png").rename(tmp_path / "a.png")
    description = describe_contest(contest("name,mask\na.png,\nb,1 1\n"))
    assert [record.name for record in description.records] == ["a", "b"]


def test_very_long_lines_are_read(contest, tmp_path):
    Image.new("L", (700, 700)).save(tmp_path / "images" / "d.png")
    runs = " ".join(f"{start} 1" for start in range(1, 700 * 700, 7))
    assert len(runs) > 200_000
    description = describe_contest(contest(f"name,mask\nd.png,{runs}\n"))
    assert description.records[0].mask.read().sum() == 70_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the header 'name,mask' or tab-separated lines, found nothing"),
        ("a.png,1 1\n", "expected the header 'name,mask' or tab-separated lines, found 'a.png,1 1'"),
        ("name,mask\n", "expected lines 'name,mask', found none"),
        ("name,mask\na.png\n", "line 2: expected a name, ',' and run lengths, found 'a.png'"),
        ("name,mask\nx.png,\n", r"line 2 \(x\.png\): image .*x\.png does not exist; correct the name"),
        ("name,mask\na.png,\na.png,1 1\n", "expected one image named 'a'"),
    ],
)
def test_malformed_lists_are_named(contest, text, message):
    with pytest.raises(DataError, match=message):
        describe_contest(contest(text))
