"""How much work a request makes, and which params it may have."""

from __future__ import annotations

import pytest
from torch import nn

from smp_ensemble.data.limits import FILES, Limits
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.exceptions import InputError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.requests import check_work, is_report, with_params

NETWORK = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 1, 1))


@pytest.fixture
def engine() -> Engine:
    return Engine(Ensemble([NETWORK], mode="binary"), "cpu", "32")


@pytest.mark.parametrize(
    ("params", "pixels"),
    [({}, 1300), ({"views": "d4"}, 8 * 1300), ({"passes": 3}, 3 * 1300), ({"views": "flips+scales:0.5,2"}, 17 * 1300)],
)
def test_pixels_are_counted_as_members_see_them(engine, params, pixels):
    sizes = [(10, 100), (20, 15)]
    asked = with_params(engine, params, FILES)
    check_work(sizes, asked, Limits(request_pixels=pixels))
    check_work(sizes, asked, Limits())
    with pytest.raises(InputError, match=f"expected at most {pixels - 1} pixels in one request, .* got {pixels}"):
        check_work(sizes, asked, Limits(request_pixels=pixels - 1))


def test_an_image_is_as_large_as_its_largest_view(engine):
    limits = Limits(image_pixels=1600, request_pixels=1 << 40)
    check_work([(10, 10)], with_params(engine, {"views": "scales:1,4"}, limits), limits)
    with pytest.raises(InputError, match="row 1 at its largest view: 50 x 50 pixels are more than the 1600 allowed"):
        check_work([(1, 1), (10, 10)], with_params(engine, {"views": "scales:1,5"}, limits), limits)


def test_images_and_passes_are_counted(engine):
    with pytest.raises(InputError, match="expected at most 2 images in one request, got 3"):
        check_work([(1, 1)] * 3, engine, Limits(request_images=2))
    assert with_params(engine, {"passes": 4}, Limits(passes=4)).passes == 4
    with pytest.raises(InputError, match="expected at most 4 passes, got 5"):
        with_params(engine, {"passes": 5}, Limits(passes=4))


def test_a_list_of_thousands_of_scales_is_not_even_read(engine):
    views = "scales:" + ",".join(str(1 + number / 1e5) for number in range(100_000))
    with pytest.raises(InputError, match="expected views as text of at most 200 characters"):
        with_params(engine, {"views": views}, FILES)


def test_on_error_is_one_of_two_words():
    assert [is_report(word) for word in (None, "", "raise", "report")] == [False, False, False, True]
    with pytest.raises(InputError, match="unknown on_error 'reprot': did you mean 'report'"):
        is_report("reprot")
