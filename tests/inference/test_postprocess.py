"""Masks cleaned: by hand, against scipy and against flood fill in plain Python."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage

from smp_ensemble.ensembling.postprocessing import Crf, PostProcessing
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.postprocess import check, clean

R = 255
FOUR = [(-1, 0), (0, -1), (0, 1), (1, 0)]
EIGHT = [step for step in itertools.product((-1, 0, 1), repeat=2) if step != (0, 0)]

shapes = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
areas = st.integers(0, 8)


def masks(*values: int):
    return arrays(np.uint8, shapes, elements=st.sampled_from(values))


def picture(*rows: str) -> np.ndarray:
    """A mask as text: `.` is 0, `#` is 1, `?` is rejected."""
    return np.array([[{".": 0, "#": 1, "?": R}.get(sign, ord(sign) - 48) for sign in row] for row in rows], np.uint8)


def flood(mask: np.ndarray, steps) -> list[set[tuple[int, int]]]:
    """Components of equal value, apart from rejected pixels."""
    left, found = {tuple(place) for place in np.argwhere(mask != R).tolist()}, []
    while left:
        component, edge = set(), [min(left)]
        while edge:
            y, x = edge.pop()
            if (y, x) in left:
                left.remove((y, x))
                component.add((y, x))
                near = [(y + a, x + b) for a, b in steps]
                edge += [place for place in near if place in left and mask[place] == mask[y, x]]
        found.append(component)
    return found


def around(component, steps) -> set[tuple[int, int]]:
    return {(y + a, x + b) for y, x in component for a, b in steps} - component


def plain_area(mask: np.ndarray, min_area: int) -> np.ndarray:
    out = mask.copy()
    for component in flood(mask, EIGHT):
        if len(component) < min_area and mask[min(component)] == 1:
            for place in component:
                out[place] = 0
    return out


def plain_holes(mask: np.ndarray, index: int, max_hole: int) -> np.ndarray:
    """Fills holes of class `index`; everything else is one background."""
    out, two = mask.copy(), np.where(mask == R, R, (mask == index).astype(np.uint8))
    inside = set(np.ndindex(mask.shape))
    for component in flood(two, FOUR):
        ring = around(component, FOUR)
        enclosed = ring <= inside and all(mask[place] == index for place in ring)
        if two[min(component)] == 0 and enclosed and len(component) <= max_hole:
            for place in component:
                out[place] = index
    return out


def plain_classes(mask: np.ndarray, min_area: int) -> np.ndarray:
    out = mask.copy()
    pending = [component for component in flood(mask, EIGHT) if len(component) < min_area]
    while True:
        unsettled = set().union(*pending) if pending else set()
        verdicts = []
        for component in pending:
            voters = [
                place
                for place in around(component, EIGHT)
                if place not in unsettled and min(place) >= 0 and np.less(place, mask.shape).all() and out[place] != R
            ]
            votes = Counter(int(out[place]) for place in voters)
            if votes:
                verdicts.append((component, min(votes, key=lambda index: (-votes[index], index))))
        if not verdicts:
            return out
        for component, verdict in verdicts:
            pending.remove(component)
            for place in component:
                out[place] = verdict


# By hand


def test_small_objects_go_and_corners_connect():
    mask = picture(
        "#...#",
        ".#...",
        "...##",
    )
    cleaned = clean(mask, "binary", PostProcessing(min_area=2))
    assert np.array_equal(cleaned, picture("#....", ".#...", "...##"))
    assert not clean(mask, "binary", PostProcessing(min_area=3)).any()


def test_holes_are_filled_and_corners_do_not_open_them():
    mask = picture(
        ".#######",
        "#.##..##",
        "###..###",
        "####.###",
        "########",
    )
    filled = clean(mask, "binary", PostProcessing(max_hole=4))
    assert np.argwhere(filled != mask).tolist() == [[1, 1]], "the pixel at the corner of the other, which is no hole"
    filled = clean(mask, "binary", PostProcessing(max_hole=5))
    assert np.argwhere(filled == 0).tolist() == [[0, 0]]


def test_background_at_the_border_is_no_hole():
    mask = picture("###", "#.#", "#.#")
    assert np.array_equal(clean(mask, "binary", PostProcessing(max_hole=9)), mask)


def test_rejected_pixels_stay_and_bound_everything():
    mask = picture(
        "?#?....",
        "?##?...",
        "..#####",
        "..#.?.#",
        "..##.##",
        "..#####",
    )
    cleaned = clean(mask, "binary", PostProcessing(min_area=2, max_hole=9, closing=1, opening=1))
    assert np.array_equal(cleaned == R, mask == R)
    assert np.array_equal(clean(mask, "binary", PostProcessing(max_hole=9)), mask), "no hole: one pixel is unknown"
    split = picture("##?#")
    assert np.array_equal(clean(split, "binary", PostProcessing(min_area=2)), picture("##?."))


def test_opening_takes_off_specks_and_bridges_and_closing_fills_cracks():
    mask = picture(
        "..........#.",
        "............",
        "..###...###.",
        "..#########.",
        "..###...###.",
    )
    opened = clean(mask, "binary", PostProcessing(opening=1))
    # A disc of radius 1 is a plus, so corners go; but it may stick out of the image, so those at the border stay.
    expected = ["............", "............", "...##...##..", "..####.####.", "..###...###."]
    assert np.array_equal(opened, picture(*expected))
    crack = picture(".........", "..##.##..", "..##.##..", "..##.##..", ".........")
    closed = clean(crack, "binary", PostProcessing(closing=1))
    assert np.array_equal(closed, picture(".........", "..##.##..", "..#####..", "..##.##..", "........."))
    assert clean(picture("####", "###?"), "binary", PostProcessing(opening=3)).tolist() == [[1] * 4, [1, 1, 1, R]]


def test_multilabel_planes_are_cleaned_each_by_itself():
    planes = np.stack([picture("#.##", "...#"), picture("###.", "#.#.", "###.")[:2], picture("?#..", "....")])
    cleaned = clean(planes, "multilabel", PostProcessing(opening=0, min_area=3, max_hole=2))
    assert np.array_equal(cleaned, [clean(plane, "binary", PostProcessing(min_area=3, max_hole=2)) for plane in planes])
    assert cleaned[0].tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    assert cleaned[2].tolist() == [[R, 0, 0, 0], [0, 0, 0, 0]]


def test_small_components_of_a_class_take_the_most_frequent_class_around():
    mask = picture(
        "00000",
        "00200",
        "11111",
        "11111",
    )
    # Around the 2: five pixels of class 0, three of class 1.
    assert np.array_equal(clean(mask, "multiclass", PostProcessing(min_area=2)), np.where(mask == 2, 0, mask))
    tie = picture("333", "333", "929", "111", "111")
    assert clean(tie, "multiclass", PostProcessing(min_area=2))[2].tolist() == [1, 1, 1], "three each: the lower class"


def test_each_pixel_around_votes_once():
    mask = picture(
        "13331",
        "13331",
        "12221",
        "13331",
        "13331",
    )
    # Six pixels each around the bar, although those of class 3 touch it 14 times and those of class 1 only 6 times.
    assert np.array_equal(clean(mask, "multiclass", PostProcessing(min_area=4)), np.where(mask == 2, 1, mask))


def test_small_components_among_each_other_wait_for_those_around_them():
    mask = picture(
        "00000000",
        "03330000",
        "03430111",
        "03330111",
        "00000111",
    )
    cleaned = clean(mask, "multiclass", PostProcessing(min_area=9))
    assert np.array_equal(cleaned, picture("00000000", "00000000", "00000111", "00000111", "00000111"))


def test_without_voters_a_component_stays():
    checkers = picture("01?", "23?", "???")
    assert np.array_equal(clean(checkers, "multiclass", PostProcessing(min_area=5)), checkers)
    cut_off = picture("00?2", "00?2")
    assert np.array_equal(clean(cut_off, "multiclass", PostProcessing(min_area=3)), cut_off)


def test_what_one_class_encloses_becomes_that_class_lower_classes_first():
    mask = picture(
        "22222221",
        "20012221",
        "20012021",
        "22222111",
    )
    # A hole of two classes; the 0 beside it touches class 1 too, so that no class alone encloses it.
    filled = clean(mask, "multiclass", PostProcessing(max_hole=6))
    assert np.array_equal(filled, picture("22222221", "22222221", "22222021", "22222111"))
    assert np.array_equal(clean(mask, "multiclass", PostProcessing(max_hole=5))[1:3, 1:4], mask[1:3, 1:4])
    nested = picture("00000", "01110", "01010", "01110", "00000")
    assert not clean(nested, "multiclass", PostProcessing(max_hole=8)).any(), "class 0 comes first and takes the ring"
    assert clean(nested, "multiclass", PostProcessing(max_hole=7)).sum() == 9


def test_multiclass_mode_has_no_opening_or_closing():
    for settings in (PostProcessing(opening=1), PostProcessing(closing=2)):
        with pytest.raises(ConfigError, match="no opening or closing in multiclass mode"):
            clean(picture("012"), "multiclass", settings)
        check(settings, "binary")
        check(settings, "multilabel")
    check(PostProcessing(min_area=3, max_hole=3, crf=Crf()), "multiclass")


# Against independent implementations


@given(masks(0, 1, R), areas)
def test_binary_minimum_area_is_that_of_flood_fill(mask, min_area):
    assert np.array_equal(clean(mask, "binary", PostProcessing(min_area=min_area)), plain_area(mask, min_area))


@given(masks(0, 1, 1, 1, R), areas)
def test_binary_holes_are_those_of_flood_fill(mask, max_hole):
    assert np.array_equal(clean(mask, "binary", PostProcessing(max_hole=max_hole)), plain_holes(mask, 1, max_hole))


@given(masks(0, 1, 2, 7, R), areas)
def test_multiclass_minimum_area_is_that_of_flood_fill(mask, min_area):
    assert np.array_equal(clean(mask, "multiclass", PostProcessing(min_area=min_area)), plain_classes(mask, min_area))


@given(masks(1, 1, 1, 4, 0, R), areas)
def test_multiclass_holes_are_those_of_flood_fill(mask, max_hole):
    expected = mask
    for index in (0, 1, 4):
        expected = plain_holes(expected, index, max_hole)
    assert np.array_equal(clean(mask, "multiclass", PostProcessing(max_hole=max_hole)), expected)


@given(masks(0, 1), st.integers(1, 5))
def test_opening_and_closing_are_scipys(mask, radius):
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disc = x**2 + y**2 <= radius**2
    eroded = ndimage.binary_erosion(mask, disc, border_value=1)
    assert np.array_equal(clean(mask, "binary", PostProcessing(opening=radius)), ndimage.binary_dilation(eroded, disc))
    closed = ndimage.binary_erosion(ndimage.binary_dilation(mask, disc), disc, border_value=1)
    assert np.array_equal(clean(mask, "binary", PostProcessing(closing=radius)), closed)


# Laws

binary_settings = st.builds(
    PostProcessing, opening=st.integers(0, 2), closing=st.integers(0, 2), min_area=areas, max_hole=areas
)
class_settings = st.builds(PostProcessing, min_area=areas, max_hole=areas)


@given(masks(0, 1, R))
def test_nothing_is_the_identity_in_every_mode(mask):
    for mode, one in (("binary", mask), ("multiclass", mask), ("multilabel", mask[None])):
        cleaned = clean(one, mode, PostProcessing(crf=Crf()))
        assert np.array_equal(cleaned, one)
        assert cleaned is not one
        assert not np.shares_memory(cleaned, one)


@given(masks(0, 1, R), areas, areas)
def test_area_and_holes_together_are_idempotent_in_binary_mode(mask, min_area, max_hole):
    settings = PostProcessing(min_area=min_area, max_hole=max_hole)
    once = clean(mask, "binary", settings)
    assert np.array_equal(clean(once, "binary", settings), once)


@given(masks(0, 1, 2, R), areas)
def test_each_setting_alone_is_idempotent_in_multiclass_mode(mask, pixels):
    for settings in (PostProcessing(min_area=pixels), PostProcessing(max_hole=pixels)):
        once = clean(mask, "multiclass", settings)
        assert np.array_equal(clean(once, "multiclass", settings), once)


@given(masks(0, 1, R), st.integers(0, 3))
def test_opening_and_closing_alone_are_idempotent(mask, radius):
    for settings in (PostProcessing(opening=radius), PostProcessing(closing=radius)):
        once = clean(mask, "binary", settings)
        assert np.array_equal(clean(once, "binary", settings), once)


@given(masks(0, 1, R), areas, st.integers(0, 3))
def test_what_takes_away_never_adds_and_what_adds_never_takes_away(mask, pixels, radius):
    before = mask == 1
    for settings in (PostProcessing(min_area=pixels), PostProcessing(opening=radius)):
        assert not (~before & (clean(mask, "binary", settings) == 1)).any()
    for settings in (PostProcessing(max_hole=pixels), PostProcessing(closing=radius)):
        assert not (before & (clean(mask, "binary", settings) != 1)).any()


@given(masks(0, 1, R), st.integers(0, 3))
def test_closing_is_the_opening_of_the_background(mask, radius):
    turned = np.where(mask == R, R, 1 - mask).astype(np.uint8)
    opened = clean(turned, "binary", PostProcessing(opening=radius))
    expected = np.where(opened == R, R, 1 - opened)
    assert np.array_equal(clean(mask, "binary", PostProcessing(closing=radius)), expected)


@given(masks(0, 1, R), binary_settings)
def test_binary_cleaning_turns_with_the_mask_and_leaves_it_alone(mask, settings):
    check_symmetry(mask, "binary", settings)


@given(masks(0, 1, 2, 3, R), class_settings)
def test_multiclass_cleaning_turns_with_the_mask_and_leaves_it_alone(mask, settings):
    check_symmetry(mask, "multiclass", settings)


def check_symmetry(mask, mode, settings):
    kept = mask.copy()
    cleaned = clean(mask, mode, settings)
    assert cleaned.dtype == np.uint8
    assert np.array_equal(cleaned == R, mask == R)
    assert set(np.unique(cleaned)) <= set(np.unique(mask)) | ({0, 1} if mode == "binary" else set())
    for turn in (np.flipud, np.fliplr, np.transpose):
        assert np.array_equal(clean(turn(mask), mode, settings), turn(cleaned))
    assert np.array_equal(mask, kept)


@pytest.mark.parametrize(
    ("mask", "mode", "settings"),
    [
        (picture("211", "020", "112"), "multiclass", PostProcessing(min_area=2, max_hole=2)),
        (
            picture("###..#", "#.####", "##..##", ".#.##.", "....#.", ".##...", "#...##", "..#.##"),
            "binary",
            PostProcessing(opening=1, closing=3, min_area=11, max_hole=5),
        ),
    ],
    ids=["multiclass", "all four"],
)
def test_other_combinations_may_change_more_the_second_time(mask, mode, settings):
    once = clean(mask, mode, settings)
    assert not np.array_equal(clean(once, mode, settings), once)
