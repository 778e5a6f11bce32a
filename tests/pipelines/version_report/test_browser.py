"""In a real browser: no error on its console, nothing asked of a network, and no page wider than a phone."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.version_report.contents import read_contents
from pipelines.version_report.page import render
from tests.pipelines.test_decisions import Made
from tests.pipelines.version_report.versions import add_everything, example, write, write_version

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # Whoever measures a page from another file has to be let in.
    *("--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom"),
]
# A frame of a phone's width, since a window of the browser's own cannot be that narrow.
FRAME = """<!doctype html><body><iframe id="f" src="{page}" width="{width}" height="800" style="border:0"></iframe>
<p id="said"></p><script>
document.getElementById("f").onload = event => {{
  const page = event.target.contentDocument;
  if ({unfold}) for (const box of page.querySelectorAll("details")) box.open = true;
  const root = page.documentElement;
  const wide = [...page.querySelectorAll("body *")].filter(box => !box.closest(".scroll, pre, .hidden, .skip"));
  const right = Math.max(...wide.map(box => box.getBoundingClientRect().right));
  const kept = performance.getEntriesByType("resource").concat(
    event.target.contentWindow.performance.getEntriesByType("resource"));
  document.getElementById("said").textContent =
    "width " + root.scrollWidth + " right " + Math.ceil(right) + " asked " + kept.filter(
      entry => !entry.name.startsWith("file:")).length + " end";
}};
</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (apt install chromium)")


def seen(folder: Path, text: str, *, width: int = 390, unfold: bool = False) -> tuple[dict[str, int], list[str]]:
    """What a browser makes of a page: its measures, and every line of the console."""
    (folder / "page.html").write_text(text, encoding="utf-8")
    frame = FRAME.format(page="page.html", width=width, unfold=str(unfold).lower())
    (folder / "frame.html").write_text(frame, encoding="utf-8")
    assert BROWSER is not None
    command = [BROWSER, *OPTIONS, f"--user-data-dir={folder / 'profile'}", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    [said] = re.findall(r"width (\d+) right (\d+) asked (\d+) end</p>", done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return dict(zip(("width", "right", "asked"), map(int, said), strict=True)), console


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with everything, and with names, words and numbers that are wider than a phone."""
    root = tmp_path_factory.mktemp("registry")
    drafts = {"fast": Made(2.0, 12.0, mib=20), "a-draft-with-quite-a-long-name-" * 2: Made(1.5, 20.0)}
    folder = write_version(root, drafts, price=0.5, training={"note": "w" * 300}, cost_profile={"device": "d" * 90})
    add_everything(folder, root)
    write(folder / "examples.json", [example("p" * 200, [("t" * 200, "accepted", 1), ("r" * 90, "rejected", 1)])])
    return render(read_contents(folder, registry=root))


@pytest.mark.parametrize("unfold", [False, True], ids=["folded", "unfolded"])
def test_the_page_is_no_wider_than_a_phone_and_makes_no_error(page: str, tmp_path: Path, unfold: bool) -> None:
    measures, console = seen(tmp_path, page, width=360, unfold=unfold)
    assert measures == {"width": 360, "right": measures["right"], "asked": 0} and measures["right"] <= 360
    assert console == []


def test_what_is_wrong_with_a_page_is_seen_here(page: str, tmp_path: Path) -> None:
    broken = page.replace("<main>", '<main><img src="http://127.0.0.1:9/x.png"><p style="width:900px">wide</p>')
    measures, console = seen(tmp_path, broken)
    assert measures["width"] > 390 and measures["right"] > 390
    assert any("Content Security Policy" in line for line in console), "the page itself lets nothing out"
