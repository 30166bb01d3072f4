"""MLflow's page as its user sees it: a real browser walks through what the stages have logged."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from dvc_render import ImageRenderer, VegaRenderer
from dvc_render.html import render_html
from mlflow.entities import Run
from playwright.sync_api import Page, sync_playwright

from pipeline import files
from tests.conftest import REPOSITORY, make_ui

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
# The page asks for these whatever the store holds: other hosts, and who is logged in where nobody logs in.
NOT_OURS = re.compile(
    r"telemetry|users/current|ERR_(NAME_NOT_RESOLVED|INTERNET_DISCONNECTED|CONNECTION|PROXY|TUNNEL)|favicon"
)
# A browser is not a Python package: `make setup` cannot add it, and a server that trains has none: a clone without it
# must be able to run the other tests. CI is not let through without it (.ci/run).
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="looks at MLflow's pages in a real browser; pip cannot install one, nothing else here needs it, and "
        "neither Chromium nor Chrome is on this machine: apt-get install chromium",
    ),
]


@pytest.fixture(scope="module")
def address(_all_stages: Path) -> Iterator[str]:
    """Of the page that `make ui` opens on the store of a finished workflow."""
    with make_ui(_all_stages, os.environ) as port:
        yield f"http://127.0.0.1:{port}/#"


@pytest.fixture
def page(request: pytest.FixtureRequest) -> Iterator[Page]:
    """An empty page of a browser with a profile of its own; what its console says of our data is an error.

    What it showed last is kept, in .pytest_cache/d/screenshots.
    """
    errors = list[str]()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page(viewport={"width": 1400, "height": 1000})
        opened.on(
            "console", lambda said: errors.append(f"{said.text} {said.location}") if said.type == "error" else None
        )
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.set_default_timeout(60_000)
        yield opened
        screenshots = request.config.cache.mkdir("screenshots")
        opened.screenshot(path=screenshots / f"{request.node.name}.png")
        browser.close()
    assert [error for error in errors if not NOT_OURS.search(error)] == []


@pytest.fixture
def run(finished: Path) -> Run:
    (found,) = mlflow.search_runs(output_format="list")
    assert isinstance(found, Run)
    return found


def shows(page: Page, *texts: str) -> None:
    for text in texts:
        page.get_by_text(text, exact=False).first.wait_for()


def at(address: str, run: Run, tab: str = "") -> str:
    return f"{address}/experiments/{run.info.experiment_id}/runs/{run.info.run_id}{tab}"


def test_the_experiment_is_in_the_list(page: Page, address: str) -> None:
    page.goto(f"{address}/experiments")
    shows(page, "convtrack")


def test_the_run_shows_its_parameters_scores_and_data(page: Page, address: str, run: Run) -> None:
    page.goto(at(address, run))
    shows(page, str(run.info.run_name), "model.filters", "test_accuracy", "mnist-5k-train")
    page.get_by_text("+2", exact=True).click()
    shows(page, "mnist-5k-validation", "mnist-5k-test")


def test_the_curves_are_drawn(page: Page, address: str, run: Run) -> None:
    page.goto(at(address, run, "/model-metrics"))
    page.get_by_placeholder("Search metric charts").fill("_loss")
    shows(page, "train_loss", "validation_loss")
    page.locator(".js-plotly-plot .scatterlayer .trace").first.wait_for(state="attached")


def test_the_training_is_played(page: Page, address: str, run: Run) -> None:
    page.goto(at(address, run, "/model-metrics"))
    page.get_by_placeholder("Search metric charts").fill("filters|class image")
    for place, name in enumerate(("class%20image", "filters")):
        picture = page.locator(f"img[src*='{name}%2Bstep%2B']")
        slider = page.get_by_role("slider").nth(place)
        for epoch in (0, 1, 2):
            if epoch:
                slider.focus()
                slider.press("ArrowRight")
            page.locator(f"img[src*='{name}%2Bstep%2B{epoch}%2B']").wait_for()
        picture.scroll_into_view_if_needed()  # MLflow puts the parameters above it
        assert picture.evaluate("image => image.naturalWidth") > 100


@pytest.mark.parametrize("name", ["class_images.png", "confusion_matrix.png"])
def test_a_figure_is_shown(page: Page, address: str, run: Run, name: str) -> None:
    page.goto(at(address, run, f"/artifacts/figures/{name}"))
    picture = page.locator("img[src^='blob:'], img[src*='get-artifact']").first
    picture.wait_for()
    assert picture.evaluate("image => image.naturalWidth") > 500


def test_the_registered_model_has_its_alias_and_its_card(page: Page, address: str, finished: Path) -> None:
    page.goto(f"{address}/models/mnist-5k-cnn")
    shows(page, "mnist-5k-cnn", "champion")
    page.goto(f"{address}/models/mnist-5k-cnn/versions/1")
    title = (finished / files.CARD).read_text().splitlines()[0].lstrip("# ")
    shows(page, "champion", title)


def test_the_page_of_dvc_plots_shows_pictures_beside_each_other_and_says_why_it_has_no_charts(
    page: Page, tmp_path: Path, finished: Path
) -> None:
    picture = str((finished / files.FIGURES / "class_images.png").resolve())
    pictures = ImageRenderer([{"rev": rev, "src": picture} for rev in ("workspace", "HEAD")], name="class_images.png")
    chart = VegaRenderer([{"x": 1, "y": 2, "rev": "HEAD"}], name="loss", x="x", y="y", anchors_y_definitions=[])
    render_html([chart, pictures], tmp_path / "index.html", REPOSITORY / ".dvc/plots.html")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.context.set_offline(True)
    page.goto((tmp_path / "index.html").as_uri())
    shows(page, "The charts are missing")
    left, right = (image.bounding_box() for image in page.locator("img").all())
    assert left is not None
    assert right is not None
    assert left["width"] > 500
    assert left["x"] + left["width"] < right["x"]
    assert right["x"] + right["width"] <= 1280
