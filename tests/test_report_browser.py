"""The pages in headless Chromium: the one named by $CHROMIUM, or on the PATH (apt-get install chromium)."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from report_examples import make_summary

from puzzle_jax.report import frontier_slider, plots, render, render_comparison

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
EVIL = "</script><img src=x onerror=window.evil=1><b>bold</b>"

# Of an element with text: its size in px, and the contrast of its colour with white (WCAG 2, 1.4.3).
_LOOK = """(e) => {
  const style = getComputedStyle(e), linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = style.color.match(/[\\d.]+/g).map(Number).map(linear);
  return [parseFloat(style.fontSize), 1.05 / (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05), e.outerHTML.slice(0, 80)];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
  if CHROMIUM is None:
    pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH, and $CHROMIUM is not set")
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM)
    yield browser
    browser.close()


def report() -> str:
  return render(make_summary())


def comparison() -> str:
  a, b = make_summary(), make_summary(seed=1)
  b["config"]["search"]["limits"]["min_speedup"] = 1.5
  return render_comparison(a, b, names=("runs/quickstart", "runs/a_directory_with_a_rather_long_name_to_break"))


PAGES = {"report": report, "comparison": comparison}
Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
  """Opens HTML as a file at a size; at the end nothing may have gone wrong on it, and nothing may have been loaded."""
  seen: list[str] = []
  contexts = []

  def open_page(html: str, size: dict[str, int] = DESKTOP) -> Page:
    file = tmp_path / "page.html"
    file.write_text(html, encoding="utf-8")
    phone = size is PHONE
    contexts.append(browser.new_context(viewport=size, is_mobile=phone, has_touch=phone))  # type: ignore[arg-type]
    page = contexts[-1].new_page()
    page.on("console", lambda m: seen.append(f"console {m.type}: {m.text}"))
    page.on("pageerror", lambda e: seen.append(f"error: {e}"))
    page.on("request", lambda r: seen.append(f"request: {r.url[:100]}") if r.url != file.as_uri() else None)
    page.on("dialog", lambda d: (seen.append(f"dialog: {d.message}"), d.dismiss()))
    page.goto(file.as_uri())
    expect(page.locator(".plotly-graph-div").last.locator(".main-svg").first).to_be_attached()
    return page

  yield open_page
  for context in contexts:
    context.close()
  assert seen == []


def data(page: Page, plot: str, what: str) -> Any:
  return page.evaluate(f"document.getElementById({plot!r}).data.map((trace) => trace.{what})")


def at(page: Page, plot: str, x: float, y: Any) -> tuple[float, float]:
  """Where a point of a plot's axes is in the window."""
  point = f"""() => {{
    const plot = document.getElementById({plot!r}), {{ xaxis, yaxis }} = plot._fullLayout;
    const box = plot.getBoundingClientRect();
    return [box.x + xaxis._offset + xaxis.d2p({x!r}), box.y + yaxis._offset + yaxis.d2p({y!r})];
  }}"""
  page.locator(f"#{plot}").scroll_into_view_if_needed()
  return tuple(page.evaluate(point))


def hover_label(page: Page) -> Locator:
  return page.locator(".hoverlayer .hovertext")


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_page_draws_everything_within_its_width(open_page: Open, name: str, size: dict[str, int]) -> None:
  page = open_page(PAGES[name](), size)
  drawn = page.locator(".plotly-graph-div")
  assert drawn.count() == {"report": len(plots.FIGURES) + 1, "comparison": 3}[name]
  for i in range(drawn.count()):
    marks = drawn.nth(i).locator(".scatterlayer .trace, .barlayer .trace, .heatmaplayer image")
    assert marks.count() > 0
    box = drawn.nth(i).locator(".main-svg").first.bounding_box()
    assert box is not None
    assert 0.85 * min(size["width"], 720) < box["width"] <= size["width"]
  assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
  texts = page.locator("main :is(h1, h2, h3, p, li, td, th, dt, dd, em, span, small, summary, label, a, pre):visible")
  for pixels, contrast, html in texts.evaluate_all(f"(all) => all.filter((e) => e.textContent.trim()).map({_LOOK})"):
    assert pixels >= 13, html
    assert contrast >= 4.5, html


def test_hovering_shows_a_label(open_page: Open) -> None:
  summary = make_summary()
  page = open_page(render(summary))
  expect(hover_label(page)).to_have_count(0)
  page.mouse.move(*at(page, "heat_map", 7, "linear/w768"))
  score = plots.block_scores(summary)[7]["linear/w768"]
  expect(hover_label(page)).to_contain_text(f"layer 7, linear/w768{score}")
  point = sorted(summary["frontier"], key=lambda p: p["throughput"])[3]
  page.mouse.move(*at(page, "frontier", point["throughput"], point["score"]))
  expect(hover_label(page)).to_contain_text(f"{point['throughput']:.2f} tokens/s")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_slider_moves_to_another_child(open_page: Open, size: dict[str, int]) -> None:
  summary = make_summary()
  page, places = open_page(render(summary), size), frontier_slider.positions(summary)
  slider, start = page.get_by_role("slider"), frontier_slider.start(places)

  def shown() -> dict[str, Any]:
    current = page.locator(".place:visible")
    assert current.count() == 1
    return {
      "text": current.locator("p").inner_text(),
      "strip": current.locator(".strip i").evaluate_all("(all) => all.map((e) => e.title.split(': ')[1])"),
      "ring": (data(page, "frontier", "x")[-1], data(page, "frontier", "y")[-1]),
      "row": page.locator("tr[aria-current]").evaluate_all("(all) => all.map((e) => e.cells[0].textContent)"),
    }

  def wanted(i: int) -> dict[str, Any]:
    place = places[i]
    strip = [cell.name for slot in ("attention", "ffn") for cell in place.strip[slot]]
    return {"strip": strip, "ring": ([place.throughput], [place.score]), "row": [place.label]}

  before = shown()
  assert wanted(start).items() <= before.items()
  assert before["text"].startswith("This run's child, at least 1.3 times")
  slider.press("End")
  after = shown()
  assert wanted(len(places) - 1).items() <= after.items()
  assert after["text"].startswith("at least 1.6 times the parent's speed: predicted 101 tokens/s, ")
  assert slider.get_attribute("aria-valuetext") == after["text"]
  slider.press("ArrowLeft")
  assert wanted(len(places) - 2).items() <= shown().items()


def test_links_lead_to_the_sections(open_page: Open) -> None:
  page = open_page(report(), PHONE)
  links = page.locator("nav a")
  assert links.all_inner_texts() == page.locator("h2").all_inner_texts()
  links.filter(has_text="Evaluation").click()
  expect(page.get_by_role("heading", name="Evaluation")).to_be_in_viewport()


def test_what_is_written_outside_stays_text(open_page: Open) -> None:
  a, b = make_summary(layers=3), make_summary(layers=3)
  for summary in (a, b):
    for sample in summary["samples"]:
      sample.update(prompt=EVIL, parent=EVIL, child=EVIL)
    summary["name"] = summary["parent"]["name"] = summary["command"] = summary["config"]["data"]["source"] = EVIL
  b["config"]["name"] = EVIL
  for html in (render(a), render_comparison(a, b, names=(EVIL, "b"))):
    page = open_page(html)
    assert page.locator("img, main b:text-is('bold')").count() == 0
    assert page.evaluate("window.evil") is None
    assert EVIL in page.locator("main").inner_text()


def test_print(open_page: Open) -> None:
  """On A4 paper: plots as wide as the page, what is folded opened, no control to press."""
  page = open_page(report(), PHONE)
  page.emulate_media(media="print")
  page.set_viewport_size({"width": 718, "height": 1000})  # 190 mm
  page.evaluate("dispatchEvent(new Event('beforeprint'))")
  assert page.evaluate("document.documentElement.scrollWidth") == 718
  for svg in page.locator(".plotly-graph-div").all():
    assert svg.locator(".main-svg").first.bounding_box()["width"] == 718  # type: ignore[index]
  assert page.locator("details:not(.screen) > p, details:not(.screen) > dl").first.is_visible()
  assert page.locator("nav, input, label, details.screen").filter(visible=True).count() == 0
  pdf = page.pdf(format="A4", prefer_css_page_size=True)
  assert pdf.startswith(b"%PDF")
  assert 5 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 14
