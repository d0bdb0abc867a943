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
SIZE = (1200, 860)
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
        picture = paint(url, prompt=f"{SHOWN}, {STYLE}", seed=1)
        for thing, seed in GALLERY:
            paint(url, prompt=f"{thing}, {STYLE}", seed=seed)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(
            viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme="light", reduced_motion="reduce"
        )
        page = context.new_page()
        page.set_default_timeout(MINUTES * 60_000)
        studio(page, url)
        save(page.screenshot(), folder / "studio.webp")
        inside(page, url, picture)
        save(page.locator("#path-out").screenshot(), folder / "inside.webp")
        browser.close()


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sfumato", "serve", "--port", "0", "--folder", folder]
        log = Path(folder) / "log"
        with log.open("w") as told:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                sys.exit(f"the server did not start: {log.read_text()}")
            yield line.split()[-1]
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
    page.locator("#recent .tile").nth(len(GALLERY) + 4).wait_for()
    page.locator("details.fold").first.evaluate("fold => { fold.open = false; scrollTo(0, 0) }")
    page.wait_for_load_state("networkidle")


def inside(page: Page, url: str, picture: str) -> None:
    """Look inside: the path at one of its early steps, and where the first word of the prompt looked."""
    page.set_viewport_size({"width": SIZE[0], "height": 3 * SIZE[1]})  # so that nothing is scrolled
    page.goto(f"{url}/#/inside/{picture}")
    page.get_by_text("equal to the picture in the gallery").or_(page.get_by_text("some pixels differ")).wait_for()
    page.locator("#path-step").focus()
    page.keyboard.press("Home")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.locator("#path-out .chip").first.click()
    page.wait_for_load_state("networkidle")


def save(png: bytes, path: Path) -> None:
    """A screenshot as WebP of at most 90 KB."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    for quality in (85, 75, 65, 50):
        file = io.BytesIO()
        image.save(file, "WEBP", quality=quality, method=6)
        if len(file.getvalue()) <= 90_000:
            break
    path.write_bytes(file.getvalue())
    print(path, len(file.getvalue()), flush=True)


if __name__ == "__main__":
    main()
