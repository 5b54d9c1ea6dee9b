"""The figures of README and docs, from committed runs: the text between `<!-- report: NAME -->` and `<!-- end -->`, and
the pictures.

    python benchmarks/report.py            # after a new run of a benchmark was saved
    python benchmarks/report.py --check    # fails where a page or a picture is not what the runs say

SECTIONS says which page has which section, report_sections.py what it says.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

# Run as a file, only its own folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from benchmarks import report_sections as sections
from benchmarks import report_text
from benchmarks.figures import save_figure
from benchmarks.machine import ROOT, where
from benchmarks.report_text import ReportError

README, SPEED, LIMITS = "README.md", "docs/speed.md", "docs/limits.md"  # the pages
CHOOSING, CPU = "docs/choosing.md", "docs/cpu.md"
SOURCE = "Source"  # the text of a PNG that has the digest of its run
MARKED = re.compile(r"(?P<start><!-- report: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)


class Section(NamedTuple):
    """page: the file that has the marks; write: what stands between them."""

    page: str
    write: Callable[[], str]


SECTIONS = {
    "speed-in-short": Section(README, sections.speed_in_short),
    "gpu-in-short": Section(README, sections.gpu_in_short),
    "speed": Section(SPEED, sections.speed),
    "avx2": Section(SPEED, sections.avx2),
    "gpu": Section(SPEED, sections.gpu),
    "models": Section(SPEED, sections.models),
    "host-time": Section(SPEED, sections.host_time_of_calls),
    "images": Section(SPEED, sections.images),
    "gpu-limits": Section(LIMITS, sections.gpu_limits),
    "compile": Section(CHOOSING, sections.under_compile),
    "cpu-instructions": Section(CPU, sections.cpu_instructions),
    "cpu-limits": Section(CPU, sections.cpu_limits_of_rows),
}
PAGES = tuple(dict.fromkeys(section.page for section in SECTIONS.values()))


def rewritten(text: str, page: str) -> str:
    """The text of a page with every marked part made anew."""
    found = [match["name"] for match in MARKED.finditer(text)]
    expected = [name for name, section in SECTIONS.items() if section.page == page]
    if len(found) != len(re.findall("<!-- report:", text)):
        raise ReportError(f"{page}: a `<!-- report: NAME -->` has no `<!-- end -->` behind it")
    if sorted(found) != sorted(expected):
        raise ReportError(f"{page} has the sections {', '.join(found) or 'none'}, expected {', '.join(expected)}")
    return MARKED.sub(lambda m: f"{m['start']}\n{SECTIONS[m['name']].write()}\n\n{m['end']}", text)


def digest(run: str) -> str:
    return hashlib.sha256((report_text.RESULTS / run).read_bytes()).hexdigest()


def is_drawn(run: str, picture: Path) -> bool:
    """Whether the picture was made of this run as it is now."""
    return picture.exists() and Image.open(picture).info.get(SOURCE) == digest(run)


def draw(name: str, picture: Path) -> None:
    run = report_text.load(name)
    results, _ = sections.results_of(run)
    title = f"{where(run['machine'])}, torch {run['versions']['torch']}"
    save_figure(results, picture, title, {SOURCE: digest(name)})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something would change")
    options = parser.parse_args(arguments)
    try:
        texts = {page: (ROOT / page).read_text() for page in PAGES}
        stale = {page: new for page, old in texts.items() if (new := rewritten(old, page)) != old}
        undrawn = {
            run: picture
            for run, picture in sections.PICTURES.items()
            if not is_drawn(run, report_text.RESULTS / picture)
        }
    except ReportError as error:
        sys.exit(str(error))
    if options.check:
        for name in (*stale, *undrawn.values()):
            print(f"{name} is not what the committed runs say: run python benchmarks/report.py")
        return int(bool(stale or undrawn))
    for page, text in stale.items():
        (ROOT / page).write_text(text)
        print(f"wrote {page}")
    for run, picture in undrawn.items():
        draw(run, report_text.RESULTS / picture)
        print(f"wrote {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
