"""Pictures of the studio for the documents: the embedded model, a server, and Chromium (apt-get install chromium).

    python tools/screenshots.py [FOLDER]        # studio.webp and inside.webp, by default into docs/

Every picture has its seed, so they change only as the page or the model does.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from playwright.sync_api import Page

DOCS = Path(__file__).parents[1] / "docs"
SIZE = (1200, 800)
MINUTES = 20  # for each thing to happen
GALLERY = [("rocket", 1), ("pizza", 2), ("tiger", 3), ("maple leaf", 4), ("hot air balloon", 5), ("octopus", 6)]
SHOWN, STYLE = "sunflower", "fluent 3d style"


def main() -> None:
    """Make pictures as a visitor would, and take pictures of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DOCS)
    folder = parser.parse_args().folder
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("no Chromium: apt-get install chromium")
    with serving() as url, sync_playwright() as playwright:
        for thing, seed in GALLERY:
            paint(url, prompt=f"{thing}, {STYLE}", seed=seed)
        picture = paint(url, prompt=f"{SHOWN}, {STYLE}", seed=1, n=4)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(
            viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme="light", reduced_motion="reduce"
        )
        page = context.new_page()
        page.set_default_timeout(MINUTES * 60_000)
        studio(page, url)
        save(page, folder / "studio.webp")
        inside(page, url, picture)
        save(page, folder / "inside.webp")
        browser.close()


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sfumato", "serve", "--port", "0", "--folder", folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
            process.wait(MINUTES * 60)


def paint(url: str, **request: Any) -> str:
    """Have pictures made; returns the last one's id."""
    body, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{url}/jobs", body, headers)) as answer:
                job = json.load(answer)
            break
        except urllib.error.HTTPError as e:
            if e.code != 503:  # the model is being loaded
                raise
            time.sleep(0.5)
    while job["state"] in ("queued", "running"):
        with urllib.request.urlopen(f"{url}/jobs/{job['id']}?wait=60") as answer:
            job = json.load(answer)
    return str(job["pictures"][-1]["id"])


def studio(page: Page, url: str) -> None:
    """The studio, four pictures just made on its easel."""
    page.goto(url)
    page.locator("html[data-ready]").wait_for()
    page.fill("#prompt", SHOWN)
    page.fill("#style", STYLE)
    page.fill("#n", "4")
    page.locator("details.fold").first.evaluate("fold => fold.open = true")
    page.fill("#seed", "1")
    page.click("#go")
    page.locator("#easel[data-state=done] button.tile").nth(3).wait_for()
    page.locator("#recent .tile").nth(5).wait_for()
    page.wait_for_load_state("networkidle")


def inside(page: Page, url: str, picture: str) -> None:
    """Look inside, at a step half-way and the first word of the prompt."""
    page.goto(f"{url}/#/inside/{picture}")
    page.get_by_text("equal to the picture in the gallery").or_(page.get_by_text("some pixels differ")).wait_for()
    page.locator("#path-step").focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    page.locator("#path-out .chip").first.click()
    page.locator("#path-out").evaluate("out => scrollTo(0, out.getBoundingClientRect().top + scrollY - 90)")
    page.wait_for_load_state("networkidle")


def save(page: Page, path: Path) -> None:
    """What is seen of the page, as WebP, at most 90 KB."""
    image = Image.open(io.BytesIO(page.screenshot(timeout=MINUTES * 60_000))).convert("RGB")
    for quality in (85, 75, 65, 50):
        file = io.BytesIO()
        image.save(file, "WEBP", quality=quality, method=6)
        if len(file.getvalue()) <= 90_000:
            break
    path.write_bytes(file.getvalue())
    print(path, len(file.getvalue()), flush=True)


if __name__ == "__main__":
    main()
