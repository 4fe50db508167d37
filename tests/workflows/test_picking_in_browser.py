"""Picking in the tracking UI, in a real browser: scores, ticks and a tag, the ensemble of what was ticked."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
from pathlib import Path

import mlflow
import pytest
from PIL import Image
from servers import mlflow_server

from smp_ensemble.tracking import names

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PATIENCE = 60_000  # milliseconds; machines may be busy
MODE = "workflowType=machine_learning"
REPOSITORY = Path(__file__).parents[2]

DATA = ("--data", "synthetic:count=40,size=96", "--batch-size", "4", "--precision", "32", "--accelerator", "cpu")
NETWORK = ("--model-options", '{"encoder_depth": 3, "decoder_channels": [16, 16, 8]}')
TRAINING = ("--crop-size", "64", "--lr", "0.01", "--epochs", "10", "--cycles", "5", "--run-name", "roofs")
TICKED = (1, 2, 4)  # rows: not the best three

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.figures,  # the report is looked at
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install the package chromium"),
]


@pytest.fixture
def server(tracking, empty_store, tmp_path, monkeypatch):
    """The address of a tracking server with a store of its own; commands know nothing else, nor where artifacts are."""
    path = tmp_path / "server.db"
    shutil.copy(empty_store, path)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE experiments SET artifact_location = 'mlflow-artifacts:/0'")
    with mlflow_server(tmp_path, store=f"sqlite:///{path.as_posix()}") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        mlflow.set_tracking_uri(address)
        yield address


@pytest.fixture
def page(server, tmp_path):
    """A page that reaches nothing but the server; how it looked last is kept in `tmp_path`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 760}, reduced_motion="reduce")
        page.set_default_timeout(PATIENCE)
        page.route(lambda url: url.startswith("http") and not url.startswith(server), lambda route: route.abort())
        assistant = page.get_by_role("textbox", name="Ask a question")  # covers a third of a fresh browser's window

        def dismiss():
            page.get_by_role("button", name="Close", exact=True).first.click()

        page.add_locator_handler(assistant, dismiss)
        yield page
        page.screenshot(path=tmp_path / "last.png")  # of interest when the test failed: only then it is kept
        browser.close()


def keep_picture(page, name):
    """For the documentation: a picture of the page, if `SMP_ENSEMBLE_SCREENSHOTS` says in which folder."""
    if folder := os.environ.get("SMP_ENSEMBLE_SCREENSHOTS"):
        path = REPOSITORY / folder / f"{name}.png"
        page.screenshot(path=path, animations="disabled")
        Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def show_column(page, metric):
    """Columns, the metric's tick."""
    from playwright.sync_api import TimeoutError as PlaywrightTimeout

    page.locator("[role=row][row-id]").first.wait_for()  # the menu holds what was known when it was opened
    entry = page.get_by_role("dialog").get_by_text(metric, exact=True).first

    def opened():
        page.get_by_role("button", name="Columns").click()
        with contextlib.suppress(PlaywrightTimeout):
            entry.wait_for(timeout=10_000)
            return True
        page.keyboard.press("Escape")
        return False

    assert any(opened() for _ in range(5)), f"no column {metric} to choose"
    entry.click()
    page.get_by_role("columnheader", name=metric, exact=True).first.wait_for()
    page.keyboard.press("Escape")


def shown(page, metric):
    """The runs in the order of the table, and the metric as the table shows it."""
    cells = page.locator(f"[role=gridcell][col-id='metrics.`{metric}`']")
    cells.last.wait_for()
    found = cells.evaluate_all("cells => cells.map(c => [c.closest('[role=row]').getAttribute('row-id'), c.innerText])")
    return [(run_id, float(text)) for run_id, text in found]


def tick(page, run_id):
    page.locator(f"[role=row][row-id='{run_id}']").get_by_role("checkbox").click()
    page.locator(f"[role=row][row-id='{run_id}']").get_by_role("checkbox", checked=True).wait_for()


def add_tag(page, key, value):
    """Add tags, Add new tag, key and value, Add, Save: for every ticked run."""
    page.get_by_role("combobox").filter(has_text="Add tags").click()
    page.get_by_role("button", name="Add new tag").click()
    dialog = page.get_by_role("dialog", name="Add New Tag")
    dialog.get_by_role("textbox").nth(0).fill(key)
    dialog.get_by_role("textbox").nth(1).fill(value)
    keep_picture(page, "pick_tag")
    dialog.get_by_role("button", name="Add", exact=True).click()
    dialog.wait_for(state="hidden")
    with page.expect_response(lambda response: "runs/" in response.url and "tag" in response.url):
        page.get_by_role("button", name="Save").click()


def tagged(client, key, value):
    runs = client.search_runs(["0"], f"tags.`{key}` = '{value}'")
    return {run.info.run_id for run in runs}


def test_what_is_ticked_in_the_ui_becomes_the_ensemble(command, page, server):
    client = mlflow.MlflowClient(server)
    code, trained, _ = command("train", *DATA, *NETWORK, *TRAINING)
    assert code == 0
    assert trained["link"].startswith(server)

    page.goto(trained["link"])
    show_column(page, "val_iou")
    rows = shown(page, "val_iou")
    scores = {client.get_run(run_id).data.tags[names.MODEL_ID]: score for run_id, score in rows}
    assert scores == pytest.approx({row["snapshot"]: row["val IoU"] for row in trained["snapshots"]})
    assert [score for _, score in rows] == sorted(scores.values(), reverse=True)
    assert len(set(scores.values())) == 5
    keep_picture(page, "pick_snapshots")

    picked = [rows[index][0] for index in TICKED]
    before = {run_id: client.get_run(run_id).data.tags for run_id, _ in rows}
    for run_id in picked:
        tick(page, run_id)
    add_tag(page, "ensemble", "good-roofs")
    page.wait_for_function(  # Save sends a request for each run
        """async ([ids, name]) => {
            for (const id of ids) {
                const answer = await fetch('ajax-api/2.0/mlflow/runs/get?run_id=' + id)
                const tags = (await answer.json()).run.data.tags
                if (!tags.some(tag => tag.key === 'ensemble' && tag.value === name)) return false
            }
            return true
        }""",
        arg=[picked, "good-roofs"],
    )
    assert tagged(client, names.PICK, "good-roofs") == set(picked)
    for run_id, tags in before.items():
        added = {names.PICK: "good-roofs"} if run_id in picked else {}
        assert client.get_run(run_id).data.tags == {**tags, **added}

    code, built, _ = command("ensemble", *DATA, "--pick", "good-roofs", "--register-as", "roofs")
    assert code == 0
    members = [client.get_run(run_id).data.tags[names.MODEL_ID] for run_id in picked]
    assert sorted(built["members"]) == sorted(f"models:/{model_id}" for model_id in members)
    find_it_again(page, server, built, members)


def find_it_again(page, server, built, members):
    """The registered model's page, the logged model's, the run's and the report in it."""
    model_id = built["uri"].removeprefix("models:/")
    page.goto(f"{server}/#/models/roofs?{MODE}")
    page.get_by_role("link", name=re.compile("Version 1")).first.wait_for()

    page.goto(f"{server}/#/experiments/0/models/{model_id}?{MODE}")
    page.get_by_text(model_id).first.wait_for()
    page.get_by_text("val_iou", exact=True).first.wait_for()

    run = f"{server}/#/experiments/0/runs/{built['run_id']}"
    page.goto(f"{run}?{MODE}")
    for member in members:
        page.get_by_text(member).first.wait_for()
    more = page.get_by_text("Show more", exact=True).first  # of the description, which has a row for each member
    if more.is_visible():
        more.click()
    keep_picture(page, "pick_ensemble")

    page.goto(f"{run}/artifacts/report/report.html?{MODE}")
    report = page.frame_locator("iframe")
    report.get_by_role("heading", level=1, name="Ensemble of 3").wait_for()
    assert report.locator("img").count() >= 5
