"""The page in a real browser: no message on its console, and nothing wider than a phone."""

from __future__ import annotations

import html
import re
import shutil
import subprocess

import pytest

from hpcssl.report.page import write_report

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROBE = """<!DOCTYPE html><html><body>{frames}<script>
addEventListener('load', () => {{
  const widths = [...document.querySelectorAll('iframe')].map(frame => {{
    const root = frame.contentDocument.documentElement;
    const texts = [...root.querySelectorAll('svg text')].map(text => text.getBoundingClientRect());
    return [root.scrollWidth, Math.max(0, ...texts.map(box => box.right)), texts.length].join(' ');
  }});
  document.title = widths.join(';');
}});
</script></body></html>"""
"""Shows the page in frames of several widths, and writes into its own title how wide the content is."""
WIDTHS = (380, 1600)


@pytest.fixture
def browse(tmp_path):
    """``browse(file)`` returns the document as the browser has it, and the messages on its console."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(PROGRAMS)} is installed")

    def run(path):
        options = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --dump-dom --virtual-time-budget=5000"
        command = [program, *options.split(), f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run


def test_the_page_fits_a_phone_and_a_desk_and_logs_nothing(tmp_path, make_run, browse):
    runs = [make_run(tmp_path / f"a-run-with-a-long-name-{k}", lr=0.1 + k / 100).root for k in range(3)]
    (page,) = write_report(runs, tmp_path / "page.html")
    document, messages = browse(page)
    assert messages == [] and document.count("<svg") == page.read_text().count("<svg") > 6
    # the frames have the page without its policy, which would keep the script from looking into them
    text = re.sub(r"<meta http-equiv=.Content-Security-Policy.[^>]*>", "", page.read_text())
    frames = "".join(
        f"<iframe style='width:{w}px;height:9000px' srcdoc='{html.escape(text)}'></iframe>" for w in WIDTHS
    )
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(frames=frames))
    document, messages = browse(probe)
    measured = re.search(r"<title>(.*?)</title>", document)
    assert messages == [] and measured is not None, messages
    for width, text in zip(WIDTHS, measured[1].split(";"), strict=True):
        content, right, texts = map(float, text.split())
        assert content <= width and right <= width and texts > 50


def test_a_page_that_loads_something_is_noticed(tmp_path, make_run, browse):
    (page,) = write_report([make_run(tmp_path / "run").root], tmp_path / "page.html")
    page.write_text(page.read_text().replace("<h1>", "<img src='http://127.0.0.1:9/x.png' alt='x'/><h1>"))
    assert any("Content Security Policy" in message for message in browse(page)[1])
