from __future__ import annotations

import re

import numpy as np
import pytest

from smp_ensemble.data.contests import describe_contest
from smp_ensemble.data.folders import describe_folder
from smp_ensemble.data.forms import load_data
from smp_ensemble.exceptions import ConfigError, DataError


def some(count: int, *, ids=(0, 1)):
    return {f"i{index:02}": np.resize(ids, (8, 8)) for index in range(count)}


def rows(*splits: str, group: bool = False) -> list[str]:
    head = "image,mask,split" + (",group" if group else "")
    return [head] + [
        f"images/i{i:02}.png,masks/i{i:02}.png,{split}{f',g{i // 2}' if group else ''}"
        for i, split in enumerate(splits)
    ]


def names(data) -> dict[str, set[str]]:
    return {split: set(data.split(split).names) for split in ("train", "val", "test")}


def test_without_splits_two_parts_are_set_apart(make_folder):
    data = load_data(str(make_folder(some(20))))
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [14, 3, 3]
    assert data.train.name == "set-train"
    assert data.task == data.val.task == data.test.task
    assert load_data(str(make_folder(some(20)))).val.digest == data.val.digest
    assert load_data(str(make_folder(some(20))), split_seed=1).val.names != data.val.names
    assert load_data(str(make_folder(some(20))), holdout="0.25").test is None


def test_named_splits_are_kept_in_order(make_folder):
    data = load_data(str(make_folder(some(4), splits=rows("test", "train", "val", "train"))))
    assert (data.train.names, data.val.names, data.test.names) == (("i01", "i03"), ("i02",), ("i00",))


def test_a_missing_val_comes_from_train_and_no_test_is_invented(make_folder):
    data = load_data(str(make_folder(some(12), splits=rows(*["train"] * 10, *["test"] * 2))), holdout="0.2,0.2")
    assert (len(data.train), len(data.val), data.test.names) == (8, 2, ("i10", "i11"))
    without_test = load_data(str(make_folder(some(4), splits=rows("train", "train", "val", "val"))))
    assert without_test.test is None
    with pytest.raises(ConfigError, match="has no split 'test': expected one of train, val"):
        without_test.split("test")
    both = load_data(str(make_folder(some(20), splits=rows(*["train"] * 20))))
    assert [len(both.split(name)) for name in ("train", "val", "test")] == [14, 3, 3]


def test_splits_without_train_are_refused(make_folder):
    with pytest.raises(DataError, match="expected images of split 'train', found none"):
        load_data(str(make_folder(some(2), splits=rows("val", "test"))))


def test_groups_stay_together(make_folder):
    folder = str(make_folder(some(20), splits=rows(*[""] * 20, group=True)))
    for options in ({}, {"folds": 3, "fold": 1}, {"bootstrap": 3, "fold": 2}):
        data = load_data(folder, **options)
        parts = [data.train, data.val, data.test, data.left_out]
        groups = [set(part.groups) for part in parts if part is not None]
        assert all(groups)
        assert sum(map(len, groups)) == len(set().union(*groups)) == 10


@pytest.mark.parametrize("named", [True, False])
def test_each_training_image_is_left_out_in_one_fold_and_val_and_test_are_shared(make_folder, named):
    splits = rows(*["train"] * 10, *["val"] * 4, *["test"] * 2) if named else None
    folder = str(make_folder(some(16), splits=splits))
    whole = load_data(folder)
    found = [load_data(folder, folds=5, fold=fold) for fold in range(5)]
    assert sorted(name for data in found for name in data.left_out.names) == sorted(whole.train.names)
    for fold, data in enumerate(found):
        assert set(data.train.names) | set(data.left_out.names) == set(whole.train.names)
        assert not set(data.train.image_digests) & set(data.left_out.image_digests)
        assert (data.val.digest, data.test.digest) == (whole.val.digest, whole.test.digest)
        assert data.split("left-out").name == f"set-fold{fold}"
        assert data.train.name == whole.train.name
        assert data.train.digest != whole.train.digest
    assert load_data(folder, folds=5, fold=3).train.names == found[3].train.names
    assert load_data(folder, folds=5, fold=3, split_seed=1).left_out.names != found[3].left_out.names


def test_bootstrap_samples_leave_out_what_they_did_not_draw(make_folder):
    folder = str(make_folder(some(20), splits=rows(*["train"] * 16, *["val"] * 4)))
    whole = load_data(folder)
    found = [load_data(folder, bootstrap=3, fold=sample) for sample in range(3)]
    for sample, data in enumerate(found):
        assert len(data.train) == len(whole.train)
        assert set(data.train.names) | set(data.left_out.names) == set(whole.train.names)
        assert not set(data.train.names) & set(data.left_out.names)
        assert data.val.digest == whole.val.digest
        assert data.left_out.name == f"set-out-of-bag{sample}"
    assert len({data.train.names for data in found}) == 3
    assert load_data(folder, bootstrap=3, fold=1).train.names == found[1].train.names
    assert load_data(folder, bootstrap=50, fold=1).train.names == found[1].train.names


def test_a_part_of_data_that_is_read_already_is_the_same(make_folder):
    folder = str(make_folder(some(12)))
    whole = load_data(folder, folds=3)
    assert whole.left_out is None
    assert whole.train.names == load_data(folder).train.names
    part = whole.part(2, folds=3)
    again = load_data(folder, folds=3, fold=2)
    assert (part.train.names, part.left_out.names) == (again.train.names, again.left_out.names)
    with pytest.raises(ConfigError, match="no split 'left-out': expected one of train, val, test; folds=N with fold=K"):
        whole.split("left-out")


@pytest.mark.parametrize(
    ("ids", "task"),
    [
        ((0, 1), ("binary", ("background", "foreground"))),
        ((0, 1, 255), ("binary", ("background", "foreground"))),
        ((0, 255), ("binary", ("background", "foreground"))),
        ((0, 2), ("multiclass", ("class_0", "class_1", "class_2"))),
    ],
)
def test_without_classes_the_masks_tell_the_task(make_folder, ids, task):
    data = load_data(str(make_folder(some(6, ids=ids))))
    assert (data.task.mode, data.task.class_names, data.task.in_channels) == (*task, 3)


def test_black_and_white_masks_are_read_as_foreground(make_folder):
    white = load_data(str(make_folder(some(6, ids=(0, 255)))))
    assert white.train.read(0)[1][0].tolist() == [0, 1] * 4
    assert white.train.class_pixels.tolist() == [32 * len(white.train)] * 2
    assert white.train.digest == load_data(str(make_folder(some(6), name="ids"))).train.digest
    ignored = load_data(str(make_folder(some(6, ids=(0, 1, 255, 1)), name="ignored")))
    assert ignored.train.class_pixels.tolist() == [16 * len(ignored.train), 32 * len(ignored.train)]


def test_black_and_white_multilabel_masks(make_folder):
    masks = {f"i{index}": {"road": np.resize([0, 255], (8, 8)), "roof": 0} for index in range(4)}
    data = load_data(str(make_folder(masks)))
    assert data.task.mode == "multilabel"
    assert data.train.read(0)[1][0, :2].tolist() == [[0, 0], [1, 0]]
    assert data.train.class_presence[0].tolist() == [True, False]


def test_black_and_white_masks_contradict_classes(make_folder):
    folder = make_folder(some(6, ids=(0, 255)), classes={"names": ["background", "roof"]})
    with pytest.raises(DataError, match=r"nothing but 0 and 255 \(ignored\): write class ids, or remove classes.json"):
        load_data(str(folder))


def test_greyscale_pictures_are_no_masks(make_folder):
    with pytest.raises(DataError, match=r"hold ids up to 200: expected class ids below 64; .* classes.json"):
        load_data(str(make_folder(some(6, ids=(0, 200)))))


def test_classes_name_the_task(make_folder):
    def task(name: str, **classes: object):
        return load_data(str(make_folder(some(6), classes=classes, name=name))).task

    assert task("a", names=["land", "roof"]).mode == "binary"
    assert task("b", names=["land", "roof"], task="multiclass").mode == "multiclass"
    assert task("c", names=["land", "roof", "road"]).class_names == ("land", "roof", "road")
    assert task("d", names=["roof"], task="binary").class_names == ("background", "roof")
    with pytest.raises(DataError, match="two class names for binary masks, found a, b, c"):
        task("e", names=["a", "b", "c"], task="binary")


def test_an_id_beyond_the_classes_is_named(make_folder):
    folder = make_folder(some(3, ids=(0, 5)), classes={"names": ["land", "roof"]})
    with pytest.raises(DataError, match=r"mask .*i00\.png holds id 5: expected 0\.\.1 \(land, roof\), or 255"):
        load_data(str(folder))


def test_a_mode_must_fit_the_data(make_folder):
    binary = str(make_folder(some(6)))
    assert load_data(binary, mode="multiclass").task.num_outputs == 2
    assert load_data(binary, mode="binary").task.num_outputs == 1
    with pytest.raises(ConfigError, match=r"mode 'multilabel' does not fit .*: expected binary for background, fore"):
        load_data(binary, mode="multilabel")
    several = str(make_folder(some(6, ids=(0, 1, 2)), name="several"))
    with pytest.raises(ConfigError, match=r"mode 'binary' does not fit .*: expected multiclass for class_0, class_1"):
        load_data(several, mode="binary")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": "a"}, "holdout: expected fractions for val and test such as '0.15,0.15', found 'a'"),
        ({"holdout": "0.1,0.1,0.1"}, "holdout: expected fractions for val and test"),
        ({"holdout": "0,0.2"}, "holdout: expected a val fraction above 0 and a sum below 1, found '0,0.2'"),
        ({"holdout": "0.6,0.4"}, "holdout: expected a val fraction above 0 and a sum below 1"),
        ({"holdout": "nan"}, "holdout: expected a val fraction"),
        ({"folds": 5, "fold": 5}, r"fold: expected 0\.\.4 for 5 folds, found 5"),
        ({"folds": 5, "fold": -1}, r"fold: expected 0\.\.4 for 5 folds, found -1"),
        ({"bootstrap": 5, "fold": 5}, r"fold: expected 0\.\.4 for 5 bootstrap samples, found 5"),
        ({"bootstrap": 0, "fold": 0}, "bootstrap: expected at least 1 sample, found 0"),
        ({"folds": 5, "bootstrap": 2, "fold": 1}, "folds=5 and bootstrap=2 both divide the training images: leave one"),
        ({"fold": 1}, "fold=1 is one of what: pass folds=N or bootstrap=N too"),
        ({"folds": 1, "fold": 0}, "folds: expected at least 2, found 1"),
        ({"mask_column": "mask_x"}, "mask column 'mask_x': only a folder has a choice of masks"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        load_data("synthetic:count=4,size=32", **options)


def test_too_few_images_for_the_folds_are_refused():
    with pytest.raises(ConfigError, match="6 folds needs at least 6 images, found 4"):
        load_data("synthetic:count=6,size=32", folds=6, fold=0)


@pytest.mark.parametrize("spec", ["nowhere", "nowhere.csv", "synthetic_data", ""])
def test_missing_data_is_named(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = f"data '{spec}' not found: expected a folder with images/ and masks/, a contest's .csv or .tsv, or 'syn"
    if spec:
        with pytest.raises(DataError, match=re.escape(expected)):
            load_data(spec)
    else:
        with pytest.raises(DataError):
            load_data(spec)


def test_synthetic_scenes_are_split_like_other_data():
    data = load_data("synthetic:count=20,size=32", mode="multiclass")
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [14, 3, 3]
    assert data.train.source == "synthetic:count=20,size=32,seed=0,mode=multiclass"
    assert data.train.groups is None


@pytest.fixture(scope="module")
def aerial_folder(aerial):
    return load_data(str(aerial))


def test_contest_and_folder_are_one_data_set(aerial, aerial_folder):
    contest = load_data(str(aerial / "train_mask.csv"))
    assert contest.task == aerial_folder.task
    for split in ("train", "val", "test"):
        ours, theirs = contest.split(split), aerial_folder.split(split)
        assert (ours.names, ours.groups) == (theirs.names, theirs.groups)
        assert ours.image_digests == theirs.image_digests
    for index in range(0, len(contest.val), 9):
        image, mask = aerial_folder.val.read(index)
        np.testing.assert_array_equal(contest.val.read(index)[0], image)
        np.testing.assert_array_equal(contest.val.read(index)[1], np.where(mask == 255, 0, mask))


def test_both_layouts_of_the_contest_say_the_same(aerial):
    csv, tsv = (describe_contest(aerial / name) for name in ("train_mask.csv", "train_mask_tianchi.tsv"))
    for one, other in zip(csv.records, tsv.records, strict=True):
        assert (one.name, one.split, one.group, one.mask.runs) == (
            other.name,
            other.split,
            other.group,
            other.mask.runs,
        )


def test_the_aerial_set_is_read_whole(aerial_folder):
    assert [len(aerial_folder.split(split)) for split in ("train", "val", "test")] == [503, 107, 112]
    groups = [set(aerial_folder.split(split).groups) for split in ("train", "val", "test")]
    assert sum(map(len, groups)) == len(set().union(*groups))
    pixels = sum(aerial_folder.split(split).class_pixels for split in ("train", "val", "test"))
    np.testing.assert_allclose(pixels / pixels.sum(), [0.8453, 0.1547], atol=1e-4)


def test_the_aerial_land_cover_is_another_column(aerial):
    description = describe_folder(aerial, "mask_landcover")
    assert description.classes.names == ("building", "land_unpaved", "road", "vegetation", "water")
    assert description.classes.mode == "multiclass"
    assert set(np.unique(description.records[0].mask.read())) <= {0, 1, 2, 3, 4, 255}
    assert "masks_landcover" in str(description.records[0].mask)
