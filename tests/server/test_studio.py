"""The studio in a real Chromium: people paint, watch, cancel, come back, search, compare, repaint and look inside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import pytest
from PIL import Image, PngImagePlugin

from sfumato.cli import main
from sfumato.pipeline.pipeline import load

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SHOTS = Path(__file__).parents[2] / "outputs" / "screenshots"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 180_000  # milliseconds
XSS = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>\'"><svg/onload=window.pwned=1>'


@pytest.fixture(scope="module")
def site(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the tiny model and an empty gallery, below a path as behind a proxy."""
    folder = tmp_path_factory.mktemp("studio")
    command = [
        sys.executable,
        "-m",
        "sfumato",
        "serve",
        "--port",
        "0",
        "--folder",
        str(folder),
        "--model",
        str(tiny_file),
        "--public-url",
        "http://127.0.0.1/art",
    ]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ)
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split()[-1] + "/art"
        finally:
            server.terminate()
            server.wait(60)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, headless=True)
        yield browser
        browser.close()


Open = Callable[..., "Page"]


@pytest.fixture
def open_page(chromium: Browser, site: str) -> Iterator[Open]:
    """Open the studio; afterwards no console may hold an error, and nobody else may have been asked for anything."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def note(message: Any) -> None:
        if message.type in ("error", "warning"):
            complaints.append(f"{message.type}: {message.text}")

    def look(request: Any) -> None:
        if urlsplit(request.url).scheme in ("http", "https") and not request.url.startswith(f"{site}/"):
            complaints.append(f"asked {request.url}")

    def open_(path: str = "/", size: dict[str, int] = DESKTOP, scheme: str = "light", strict: bool = True) -> Page:
        context = chromium.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        if strict:
            page.on("console", note)
            page.on("pageerror", lambda e: complaints.append(f"uncaught: {e}"))
            page.on("request", look)
        page.goto(site + path)
        page.locator("html[data-ready]").wait_for()
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


def paint(page: Page, prompt: str, **settings: Any) -> str:
    """Fill the form and send it; returns the job's id when the pictures are there."""
    job = begin(page, prompt, **settings)
    page.locator(f"#easel[data-job='{job}'][data-state=done] button.tile").first.wait_for()
    return job


def begin(page: Page, prompt: str, **settings: Any) -> str:
    """Fill the form and send it; returns the job's id."""
    page.locator("details.fold").first.evaluate("fold => fold.open = true")
    for name, value in settings.items():
        if page.locator(f"#{name}").get_attribute("type") == "range":
            page.locator(f"#{name}").evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')) }", value)
        else:
            page.fill(f"#{name}", str(value))
    page.fill("#prompt", prompt)
    with page.expect_response(lambda r: r.request.method == "POST" and r.url.endswith("/jobs")) as sent:
        page.click("#go")
    return str(sent.value.json()["id"])


def ask(site: str, path: str) -> Any:
    with urllib.request.urlopen(site + path, timeout=60) as answer:
        return json.load(answer)


def shoot(page: Page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    whole = page.locator("dialog[open]").count() == 0
    page.screenshot(path=SHOTS / f"{name}.png", full_page=whole, timeout=PATIENCE)


def faults(page: Page) -> list[str]:
    """What axe finds wrong, of whatever weight."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{v['id']} ({v['impact']}): {node['html'][:150]} {node.get('failureSummary', '')[:200]}"
        for v in found
        for node in v["nodes"]
    ]


def fits(page: Page) -> bool:
    """Whether nothing sticks out to the side."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_paint_watch_reload_search(open_page: Open, site: str) -> None:
    page = open_page()
    assert page.locator("#easel h2").inner_text() == "Every picture begins as noise"
    begin(page, "a red apple", n=2, steps=60, seed=5, width=32, height=32)
    preview = page.locator(".easel.live .tile img").first
    preview.wait_for()
    assert (preview.get_attribute("src") or "").startswith("data:image/png;base64,"), "watched as it comes out"
    page.locator("#after:not([hidden])").wait_for()
    assert page.locator(".easel button.tile").count() == 2
    page.locator("#live", has_text="Done: 2 pictures.").wait_for(state="attached")
    page.reload()
    page.locator("#recent .tile").nth(1).wait_for()
    page.goto(f"{site}/#/gallery")
    page.locator("#gallery-count", has_text="2 pictures").wait_for()
    page.fill("#search", "apple 5")
    page.locator("#gallery li").nth(0).wait_for()
    page.fill("#search", "zebra")
    page.get_by_role("heading", name="Nothing by these words").wait_for()
    page.fill("#search", "")
    page.locator("#gallery li").nth(1).wait_for()
    page.locator("#gallery .tile").first.click()
    dialog = page.locator("#detail[open]")
    dialog.wait_for()
    seed = dialog.locator("dd").nth(1).inner_text()
    assert seed in ("5", "6")
    dialog.get_by_role("button", name="Reuse settings").click()
    assert page.locator("#prompt").input_value() == "a red apple"
    assert page.locator("#seed").input_value() == seed
    assert page.locator("#steps").input_value() == "60"


def test_sizes_are_those_of_the_picture_that_comes_out(open_page: Open, site: str) -> None:
    page = open_page()
    page.locator("details.fold").first.evaluate("fold => fold.open = true")
    page.select_option("#upscale", "4")
    assert [page.locator(f"#{side}").input_value() for side in ("width", "height")] == ["64", "64"]
    assert "64×64" in page.locator("#how").inner_text()
    with page.expect_request(lambda r: r.method == "POST" and r.url == f"{site}/jobs") as sent:
        job = paint(page, "an enlarged apple, " * 8, steps=1, n=1)
    body = sent.value.post_data_json
    assert [body[name] for name in ("width", "height", "upscale")] == [16, 16, 4]
    (picture,) = ask(site, f"/jobs/{job}")["pictures"]
    assert ask(site, f"/pictures/{picture['id']}")["width"] == 64
    page.locator("#after .warning", has_text="prompt: too long for this model").wait_for()
    page.get_by_role("button", name="Start from it").click()
    assert page.locator("#width").input_value() == "64"
    page.select_option("#upscale", "1")
    assert page.locator("#width").input_value() == "16"


def test_cancel_and_come_back(open_page: Open, site: str) -> None:
    page = open_page()
    begin(page, "a blue house", n=8, steps=200, width=64, height=64)  # longer than a page takes to load
    page.locator("#progress:not([hidden])").wait_for()
    page.reload()
    page.locator("#progress:not([hidden])").wait_for()  # still watched after coming back
    page.click("#cancel")
    page.get_by_role("heading", name="Cancelled").wait_for()
    (job,) = [j for j in ask(site, "/jobs")["jobs"] if j["request"]["prompt"] == "a blue house"]
    assert job["state"] == "cancelled"
    assert ask(site, "/pictures?q=house")["total"] == 0


def test_what_cannot_be_served_is_told_in_the_form(open_page: Open) -> None:
    page = open_page(strict=False)  # Chromium logs refused requests
    page.locator("details.fold").first.evaluate("fold => fold.open = true")
    page.fill("#width", "17")
    page.fill("#prompt", "an apple")
    page.click("#go")
    assert page.evaluate("document.getElementById('width').validity.stepMismatch"), "the form itself knows better"
    page.locator("#compose").evaluate("form => form.noValidate = true")
    page.click("#go")
    page.locator("#complaint", has_text="multiples of").wait_for()


def test_by_keyboard_alone(open_page: Open) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("a green apple")
    page.keyboard.press("Enter")
    page.locator("#after:not([hidden])").wait_for()
    page.locator(".easel button.tile").focus()
    page.keyboard.press("Enter")
    page.locator("#detail[open]").wait_for()
    page.keyboard.press("Escape")
    page.locator("#detail[open]").wait_for(state="detached")
    assert page.evaluate("document.activeElement.className") == "tile", "focus is where it was"


@pytest.mark.skipif(find_spec("sfumato.server.inputs") is None, reason="jobs take no pictures by their id yet")
def test_repaint_a_part_of_a_picture(open_page: Open, site: str) -> None:
    page = open_page()
    paint(page, "a red apple", seed=11, n=1)
    page.get_by_role("button", name="Start from it").click()
    page.get_by_role("button", name="Repaint a part").click()
    page.locator("#brush[open]").wait_for()
    page.locator("#brush-mask:focus").wait_for()
    for key in ("ArrowRight", " ", "Shift+ArrowRight", " "):
        page.keyboard.press(key)
    box = page.locator("#brush-cursor").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.2, steps=4)
    page.mouse.up()
    share = int(page.locator("#brush-share").inner_text().split()[0])
    assert 2 <= share <= 30
    shoot(page, "brush")
    assert faults(page) == []
    page.get_by_role("button", name="Use this mask").click()
    page.locator("#brush[open]").wait_for(state="detached")
    with page.expect_request(lambda r: r.method == "POST" and r.url == f"{site}/jobs") as sent:
        job = paint(page, "a blue apple")
    body = sent.value.post_data_json
    assert body["init"].endswith("-0"), "the picture's own id"
    mask = Image.open(urllib.request.urlopen(f"{site}/uploads/{body['mask']}.png")).convert("L")
    assert mask.size == (16, 16)
    values = list(mask.getdata())
    assert set(values) == {0, 255}
    assert abs(values.count(255) / len(values) - share / 100) < 0.1, "white where it was painted"
    assert ask(site, f"/jobs/{job}")["request"]["mask"]["sha256"]


def test_variations_and_the_way_between_two_pictures(open_page: Open, site: str) -> None:
    page = open_page()
    paint(page, "a red apple", seed=21, n=1, steps=2)
    page.get_by_role("button", name="Variations").click()
    page.locator(".easel.strip button.tile").nth(5).wait_for()
    paint(page, "a blue house in the rain", seed=22, n=1, steps=2)
    page.goto(f"{site}/#/gallery")
    for seed in (21, 22):
        page.locator(f"#gallery li:has(input[aria-label$='seed {seed}']) input").last.check(force=True)
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("heading", name="What differs").wait_for()
    assert {"prompt", "seed"} <= set(page.locator("#view-compare tbody th").all_inner_texts())
    shoot(page, "compare")
    assert faults(page) == []
    page.get_by_role("button", name="Interpolate between them").click()
    page.locator(".easel.strip button.tile").nth(6).wait_for()
    shoot(page, "strip")
    tiles = page.locator(".easel.strip button.tile img")
    ends = [tiles.nth(i).get_attribute("src") or "" for i in (0, 6)]
    pictures = {p["url"]: p for p in ask(site, "/pictures?limit=60")["pictures"]}
    assert [pictures[url]["request"]["seed"] for url in ends] == [21, 22], "it goes from the one to the other"


def test_what_another_model_made_is_told_and_zeros_are_shown(
    open_page: Open, site: str, tiny_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pictures = next(tmp_path_factory.getbasetemp().glob("studio*/pictures"))
    made = load(tiny_file).generate("from afar", seed=77, steps=1, guidance=0)[0]
    replace(made, model="elsewhere", model_hash="0" * 64).save(pictures / "from-afar.png")
    page = open_page("/#/gallery")
    page.fill("#search", "from afar")
    page.locator("#gallery .tile").first.click()
    page.locator("#detail[open]").wait_for()
    assert page.locator("#detail dt:text-is('guidance') + dd").inner_text() == "0"
    page.get_by_role("button", name="Replay").click()
    page.locator("#toast:has-text('elsewhere, which is not served here')").wait_for()
    page.locator("#easel[data-state=done] button.tile").first.wait_for()


def test_reused_settings_are_the_pictures_own(
    open_page: Open, tiny_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Between the marks of a slider, too."""
    pictures = next(tmp_path_factory.getbasetemp().glob("studio*/pictures"))
    start = {"init": Image.new("RGB", (16, 16), "red"), "strength": 0.33}
    load(tiny_file).generate("between marks", seed=78, steps=3, guidance=3.3, **start)[0].save(pictures / "marks.png")
    page = open_page("/#/gallery", strict=False)  # the picture that it started from is not among the uploads
    page.fill("#search", "between marks")
    page.locator("#gallery-count", has_text="One picture").wait_for()
    page.locator("#gallery .tile").first.click()
    page.get_by_role("button", name="Reuse settings").click()
    assert [page.locator(f"#{id}").input_value() for id in ("guidance", "strength")] == ["3.3", "0.33"]


def test_who_leaves_before_a_picture_is_there_has_nothing_computed(open_page: Open, site: str) -> None:
    page = open_page()
    job = paint(page, "a red apple", n=1, steps=2)
    held: list[Any] = []
    page.route(f"**/pictures/{job}-0", lambda route: held.append(route))
    page.goto(f"{site}/#/inside/{job}-0")
    page.get_by_text("Loading the picture").wait_for()
    page.goto(f"{site}/#/gallery")
    page.locator("#gallery li").first.wait_for()
    with page.expect_response(lambda r: r.url.endswith(f"/pictures/{job}-0")):
        held[0].continue_()
    page.evaluate("new Promise(requestAnimationFrame)")
    assert page.locator("#path-out").count() == 0


def test_look_inside(open_page: Open, site: str) -> None:
    page = open_page()
    paint(page, "a red apple", seed=31, n=1, steps=4)
    page.get_by_role("link", name="Look inside").last.click()
    page.get_by_text("equal to the picture in the gallery in every pixel").wait_for()
    frames = page.locator("#path-out .contact").first.locator("figure")
    assert frames.count() == 5, "each level, the clean one included"
    seen = page.locator("#path-out .duo img")
    before = seen.nth(0).get_attribute("src")
    page.locator("#path-step").focus()
    page.keyboard.press("Home")
    assert seen.nth(0).get_attribute("src") != before
    assert "σ 1" in (page.locator("#path-step").get_attribute("aria-valuetext") or ""), "it begins in pure noise"
    chips = page.locator("#path-out .chip")
    chips.nth(3).wait_for()
    assert chips.all_inner_texts() == ["a", "red", "apple", "start and end"]
    chips.nth(2).click()
    page.get_by_text("“apple” at step 0").wait_for()
    shares = page.locator("#path-out .duo .contact figcaption").all_inner_texts()
    assert sum(float(s.split()[-2]) for s in shares) == pytest.approx(100, abs=1.5), "all words of a step, together"
    page.get_by_role("button", name="Draw them").click()
    page.locator("#guided-out .contact figure").nth(10).wait_for()
    page.get_by_role("button", name="Noise it").click()
    page.locator("#forward-out svg").nth(1).wait_for()
    page.get_by_role("button", name="Run them").click()
    page.locator("#samplers-out td img").nth(19).wait_for()
    assert page.locator("section.part progress:not([hidden])").count() == 0
    assert faults(page) == []
    shoot(page, "inside")
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.click("#theme")
    assert fits(page)
    assert faults(page) == [], "on a phone, in the dark"
    fills = page.locator(".plot .line").evaluate_all("lines => lines.map((l) => getComputedStyle(l).fill)")
    assert set(fills) == {"none"}, "lines, and no areas"
    shoot(page, "inside-phone-dark")
    page.goto(f"{site}/docs")
    assert faults(page) == [], "the API's page"


def png(path: Path, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    Image.new("RGB", (16, 16), "teal").save(path, pnginfo=info)
    return path


def drop(page: Page, file: Path, name: str | None = None) -> None:
    """Drop a file on the page, as a hand would."""
    data = page.evaluate_handle(
        "([bytes, name]) => { const t = new DataTransfer(); "
        "t.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'})); return t }",
        [list(file.read_bytes()), name or file.name],
    )
    page.dispatch_event("body", "drop", {"dataTransfer": data})
    page.locator("#dropped[open]").wait_for()


def test_dropped_pictures_bring_their_requests(open_page: Open, site: str, tmp_path: Path) -> None:
    page = open_page()
    paint(page, "a red apple", seed=41, n=1, steps=3)
    own = tmp_path / "own.png"
    url = page.locator(".easel button.tile img").get_attribute("src")
    own.write_bytes(urllib.request.urlopen(urljoin(site, url)).read())
    page.fill("#prompt", "something else")
    drop(page, own)
    page.get_by_role("button", name="Use its settings").click()
    assert page.locator("#prompt").input_value() == "a red apple"
    assert page.locator("#seed").input_value() == "41"
    theirs = (
        "a cat\nNegative prompt: dog\nSteps: 7, Sampler: Euler a, CFG scale: 4, Seed: 99, Size: 16x16, Hires upscale: 2"
    )
    drop(page, png(tmp_path / "theirs.png", parameters=theirs))
    page.get_by_text("Written by another program").wait_for()
    shoot(page, "dropped")
    assert faults(page) == []
    page.get_by_role("button", name="Use its settings").click()
    assert page.locator("#sampler").input_value() == "euler-ancestral"
    assert [page.locator(f"#{i}").input_value() for i in ("prompt", "negative", "seed", "steps")] == [
        "a cat",
        "dog",
        "99",
        "7",
    ]
    with page.expect_response(lambda r: r.url == f"{site}/uploads" and r.status == 201):
        page.set_input_files("#file", own)
    page.locator("#start:not([hidden])").wait_for()


def test_nothing_of_a_payload_runs(open_page: Open, site: str, tmp_path: Path) -> None:
    page = open_page(strict=False)  # a refused request is logged
    page.on("dialog", lambda d: pytest.fail(f"a dialog: {d.message}"))
    paint(page, XSS, steps=1, n=1, style=XSS)
    page.locator("#queue, #recent").first.wait_for(state="attached")
    page.on("pageerror", lambda e: pytest.fail(f"uncaught: {e}"))
    for place in ("#/gallery", "#/inside", f"#/inside/{XSS}", f"#/compare/{XSS}/x", "#/inside/%zz"):
        page.goto(f"{site}/{place}")
        page.locator("main > section:not([hidden])").wait_for()
    page.goto(f"{site}/#/gallery")
    page.fill("#search", XSS.split()[0])
    page.locator("#gallery .tile").first.click()
    page.locator("#detail[open]").wait_for()
    assert page.locator("#detail-head").inner_text().startswith("<img src=x")
    page.keyboard.press("Escape")
    page.goto(f"{site}/#/")
    for texts in (
        {"parameters": f"{XSS}\nSteps: 2, Sampler: Euler, {XSS}: 1"},
        {"sfumato": XSS},
        {"sfumato": json.dumps({"request": {"prompt": XSS}})},
    ):
        drop(page, png(tmp_path / "x.png", **texts), f"{XSS}.png")
        page.keyboard.press("Escape")
        page.locator("#dropped[open]").wait_for(state="detached")
    assert page.evaluate("window.pwned") is None
    assert page.locator("img[onerror], svg[onload]").count() == 0


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_fits_and_is_accessible(open_page: Open, site: str, size: dict[str, int], scheme: str) -> None:
    page = open_page("/", size, scheme)
    name = f"{'phone' if size is PHONE else 'desktop'}-{scheme}"
    if not page.locator("#recent .tile").count():
        paint(page, "a red apple", n=1)
    for fold in page.locator("details.fold").all():
        fold.evaluate("fold => fold.open = true")
    views = {"studio": "#compose", "gallery": "#gallery li", "inside": "#view-inside .tile"}
    for view, sign in views.items():
        page.goto(f"{site}/#/{'' if view == 'studio' else view}")
        page.locator(sign).first.wait_for()
        assert faults(page) == [], view
        assert fits(page), view
        shoot(page, f"{view}-{name}")
    page.goto(f"{site}/#/gallery")
    page.locator("#gallery .tile").first.click()
    page.locator("#detail[open]").wait_for()
    assert faults(page) == []
    shoot(page, f"detail-{name}")
    page.keyboard.press("Escape")
    page.click("#theme")
    other = "dark" if scheme == "light" else "light"
    page.reload()
    assert page.locator("html").get_attribute("data-theme") == other, "the choice is remembered"


def test_an_explained_picture_is_accessible(chromium: Browser, tiny_file: Path, tmp_path: Path) -> None:
    """The file that `sfumato explain` writes, which goes anywhere."""
    picture, report = tmp_path / "apple.png", tmp_path / "report.html"
    load(tiny_file).generate("a red apple", seed=1, steps=3)[0].save(picture)
    assert main(["explain", str(picture), "--out", str(report), "--steps", "3,6", "--model", str(tiny_file)]) == 0
    for size, scheme in ((DESKTOP, "light"), (PHONE, "dark")):
        context = chromium.new_context(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
        page = context.new_page()
        page.goto(report.as_uri())
        assert faults(page) == [], scheme
        assert fits(page), scheme
        shoot(page, f"report-{scheme}")
        context.close()


def test_a_server_that_is_gone_is_told(open_page: Open, site: str) -> None:
    page = open_page(strict=False)
    page.route("**/jobs", lambda route: route.abort())
    page.fill("#prompt", "an apple")
    page.click("#go")
    page.locator("#complaint", has_text="cannot be reached").wait_for()
    page.route("**/pictures?*", lambda route: route.abort())
    page.goto(f"{site}/#/gallery")
    page.get_by_role("heading", name="The gallery cannot be shown").wait_for()
