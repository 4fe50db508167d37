"""The page in a real browser: it loads without a request or a complaint, at any width, light and dark."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from evaluation.fakes import fake_examples, measure, simulate
from PIL import Image

from smp_ensemble.evaluation.page import write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install the package chromium"),
]


@pytest.fixture(scope="module")
def page_address(tmp_path_factory) -> str:
    names = ("background and everything else that nobody cared to label at all, ever", "<b>roof</b>", "x" * 120)
    simulation = simulate(size=32, images=4, classes=3, names=names)
    folder = tmp_path_factory.mktemp("page")
    title = "A title with oneverylongwordthatdoesnotfitintothewidthofaphoneandmustbebrokensomewhere in it"
    return write_page(measure(simulation), fake_examples(simulation, 1, 1), folder, title=title).as_uri()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, page_address):
    """Opens the page and gives it with all that was requested and complained of."""
    opened = []

    def open_(**options):
        page = browser.new_page(**options)
        opened.append(page)
        requests, complaints = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(page_address)
        page.wait_for_load_state("networkidle")
        return page, requests, complaints

    yield open_
    for page in opened:
        page.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_it_loads_alone_and_fits(open_page, page_address, width):
    page, requests, complaints = open_page(viewport={"width": width, "height": 800})
    assert [url for url in requests if not url.startswith("data:")] == [page_address]
    assert complaints == []
    sizes = page.evaluate("[...document.images].map(image => [image.complete, image.naturalWidth])")
    assert len(sizes) == 6
    assert all(complete and natural > 0 for complete, natural in sizes)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = "[...document.querySelectorAll('h1, h2, p, li, dd, .scroll')]"
    outside += ".filter(part => part.getBoundingClientRect().right > innerWidth + 0.5).map(part => part.outerHTML)"
    assert page.evaluate(outside) == []


def test_light_and_dark_are_drawn(open_page, tmp_path):
    brightness = {}
    for scheme in ("light", "dark"):
        page, _, complaints = open_page(color_scheme=scheme, viewport={"width": 800, "height": 600})
        assert complaints == []
        path = tmp_path / f"{scheme}.png"
        page.screenshot(path=path)
        picture = np.array(Image.open(path).convert("L"))
        assert picture.std() > 10  # text on its ground
        brightness[scheme] = float(np.median(picture))
    assert brightness["light"] > 230
    assert brightness["dark"] < 60


def test_links_jump_and_tables_scroll_by_keyboard(open_page):
    page, _, _ = open_page(viewport={"width": 390, "height": 800}, reduced_motion="reduce")
    page.click("nav a[href='#uncertainty']")
    assert abs(page.locator("#uncertainty").bounding_box()["y"]) < 5
    box = page.locator("#models .scroll").first
    box.focus()
    page.keyboard.press("ArrowRight")
    for _ in range(50):  # it glides
        if box.evaluate("box => box.scrollLeft") > 0:
            break
        page.wait_for_timeout(20)
    assert box.evaluate("box => box.scrollLeft") > 0


def test_names_do_not_become_elements(open_page):
    page, _, _ = open_page()
    assert page.locator("td b, th b").count() == 0
    assert page.get_by_text("<b>roof</b>").count() > 0
