"""The page is one file that needs nothing else, says what was measured, and names stay names."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import pytest
from evaluation.fakes import fake_examples, fake_measurement, measure, simulate
from evaluation.test_markup import Reader

from smp_ensemble.evaluation.page import write_page

ATTACK = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a page of five members, with names that try to be HTML."""
    simulation = simulate(size=32, images=4, classes=3, names=(ATTACK, "a & b", "'\"><img src=x onerror=alert(1)>"))
    measurement = measure(
        simulation, groups=("a", "a", "b", "b"), member_names=tuple(f"{ATTACK} {n}" for n in range(5))
    )
    measurement = replace(
        measurement,
        images=[f"{ATTACK}{index}.png" for index in range(4)],
        data=replace(measurement.data, name=f"tiles {ATTACK}"),
    )
    examples = [replace(example, name=ATTACK) for example in fake_examples(simulation, 1, 1)]
    folder = tmp_path_factory.mktemp("page") / "new" / "folder"
    path = write_page(measurement, examples, folder, title=f"Roofs {ATTACK}", notes=[f"A note {ATTACK}."])
    assert path == folder / "report.html"
    return measurement, folder


@pytest.fixture(scope="module")
def reader(written):
    return Reader((written[1] / "report.html").read_text(encoding="utf-8"))


def test_all_figures_are_beside_the_page_and_inside_it(written, reader):
    folder = written[1]
    names = ["scores", "reliability", "risk_coverage", "differences", "diversity", "examples"]
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.json", *(f"{n}.png" for n in names)}
    inside = {attributes["src"] for tag, attributes in reader.elements if tag == "img"}
    assert inside == {
        "data:image/png;base64," + base64.b64encode((folder / f"{name}.png").read_bytes()).decode() for name in names
    }


def test_nothing_is_fetched_and_nothing_runs(written, reader):
    page = (written[1] / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert "url(" not in page
    targets = [
        value for _, attributes in reader.elements for key, value in attributes.items() if key in {"src", "href"}
    ]
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert not {"script", "iframe", "object"} & {tag for tag, _ in reader.elements}


def test_links_lead_to_sections_and_pictures_have_words(reader):
    anchors = {attributes["id"] for _, attributes in reader.elements if "id" in attributes}
    links = {attributes["href"][1:] for tag, attributes in reader.elements if tag == "a"}
    assert links == anchors == {"models", "classes", "calibration", "uncertainty", "diversity", "examples"}
    assert all(attributes["alt"] for tag, attributes in reader.elements if tag == "img")
    assert [tag for tag, _ in reader.elements].count("h1") == 1
    assert ("html", {"lang": "en"}) in reader.elements


def test_what_was_measured_is_said(written, reader):
    measurement = written[0]
    text = " ".join(" ".join(reader.text).split())
    for expected in (
        f"Roofs {ATTACK}", f"A note {ATTACK}.", measurement.data.name, measurement.data.digest, "test",
        "a & b", f"{measurement.ensemble.score.metrics['iou']:.4f}", "chosen as best on this very data",
        "smp_ensemble 0.", "torch ", "python 3.", "How to read this.",
    ):  # fmt: skip
        assert expected in text
    assert text.count("How to read this.") == 6


def test_the_json_beside_it_holds_the_same(written):
    measurement, folder = written
    values = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert values["ensemble"]["metrics"] == dict(measurement.ensemble.score.metrics)
    assert values["groups"] == 2


def test_a_model_alone_on_one_image_has_the_figures_that_apply(tmp_path):
    measurement = fake_measurement(members=1, classes=1, images=1)
    page = write_page(measurement, [], tmp_path, title="One").read_text(encoding="utf-8")
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == ["reliability", "risk_coverage", "scores"]
    assert "nan" not in " ".join(Reader(page).text).lower().replace("nano", "")
    assert 'id="diversity"' not in page


def test_many_members_and_classes(tmp_path):
    measurement = fake_measurement(members=20, classes=20, images=3)
    page = write_page(measurement, [], tmp_path, title="Many").read_text(encoding="utf-8")
    text = " ".join(Reader(page).text)
    assert all(member.name in text for member in measurement.members)
    assert all(name in text for name in measurement.task.class_names)


def test_the_same_measurement_gives_the_same_page(tmp_path):
    measurement = fake_measurement(members=1)
    first, second = (write_page(measurement, [], tmp_path / name, title="x").read_bytes() for name in "ab")
    assert first == second
