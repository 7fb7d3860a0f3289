"""The page to look at: one HTML file that needs neither scripts nor a network.

Whatever comes from files is escaped (`_text`), and the page's own policy lets a browser load
nothing and run nothing, should an escape ever be missed.
"""

import base64
import io
import random
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from train_utils.check.charts import curve, histogram
from train_utils.check.findings import Alike, Finding, Report
from train_utils.check.output import CheckFolder
from train_utils.check.sections import Section, Table
from train_utils.errors import UserError, printable

PAGE = "index.html"

_SIDE = 160  # pixels of a picture's longer side
_QUALITY = 75  # of its JPEG
_MAX_BYTES = 3_000_000  # of all pictures
_RANDOM = 24  # pairs drawn at random
_EXTREMES = 3  # pairs at either end of a statistic
_GROUPS = 16  # of pairs that are alike …
_MEMBERS = 4  # … and how many of each are shown
_EXAMPLES = 6  # pictures of a finding
_NAMES = 20  # names listed with a finding
_TINT = 0.55  # how much of a mask's colour covers the image
_MASK_COLOUR = (255, 0, 110)
_IGNORE = 255  # the class index of pixels that do not count
_IGNORED_COLOUR = (128, 128, 128)
_LIKENESS = {
    "bytes": "the same files",
    "pixels": "the same pixels",
    "near": "the same picture, saved anew",
    "similar": "cut, or neighbouring frames",
}
# Okabe and Ito's colours, which colour-blind readers tell apart, without their black.
_CLASS_COLOURS = (
    *((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167)),
    *((86, 180, 233), (213, 94, 0), (240, 228, 66)),
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fff; --soft: #f1f1f4; --line: #c9c9d1;
  --error: #b00020; --warning: #8a4b00; --note: #00529b; --good: #006b3c; --one: #2a68bd;
  --two: #b3541e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ec; --paper: #16161a; --soft: #23232a;
  --line: #4a4a55; --error: #ff8a94; --warning: #ffb86b; --note: #8cc4ff; --good: #6fdc9f;
  --one: #6ea8ff; --two: #ffa66b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
nav a { margin-right: 1rem; } a { color: var(--note); }
pre { background: var(--soft); padding: .75rem; white-space: pre-wrap; }
.verdict { font-size: 1.15rem; border-left: .4rem solid var(--good); padding: .5rem 1rem;
  background: var(--soft); }
.verdict.failed { border-color: var(--error); }
.finding { border-left: .25rem solid var(--note); padding-left: .75rem; margin: 1rem 0; }
.finding.error { border-color: var(--error); } .finding.warning { border-color: var(--warning); }
.finding b { color: var(--note); } .error b { color: var(--error); }
.warning b { color: var(--warning); }
.grid { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20.25rem), 1fr)); }
figure { margin: 0; font-size: .8rem; line-height: 1.35; }
figure img { display: block; max-width: 100%; height: auto; background: var(--soft); }
.unreadable { padding: 1rem; background: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; font-weight: bold; padding: .25rem 0; }
th, td { text-align: left; padding: .2rem .75rem .2rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
details { margin: .5rem 0; }
.swatch { display: inline-block; width: 1em; height: 1em; border: 1px solid var(--line);
  vertical-align: -.1em; margin-right: .4em; }
svg { width: 100%; height: auto; max-width: 32rem; }
svg text { fill: var(--ink); font-size: 10px; stroke: var(--paper); stroke-width: 3px;
  paint-order: stroke; }
.axis { stroke: var(--line); fill: none; } .mark { stroke: var(--ink); stroke-dasharray: 3; }
.series0 { fill: var(--one); opacity: .6; } .series1 { stroke: var(--two); fill: none;
  stroke-width: 1.5; }
.raw { stroke: var(--one); fill: none; opacity: .6; }
.smooth { stroke: var(--two); fill: none; stroke-width: 2; }
.key0 { color: var(--one); } .key1 { color: var(--two); }
"""


def write_page(report: Report, folder: CheckFolder) -> Path:
    """Write the page of a report; UserError for a place that cannot be written to."""
    return folder.write(PAGE, render(report, folder.path.name))


def render(report: Report, name: str) -> str:
    """The page as text: ASCII, so that no browser guesses its encoding wrong."""
    pictures = _Pictures(report)
    parts = {
        "Findings": _findings(report, pictures),
        **{section.title: _section(section) for section in report.sections},
        "Pairs at random": _at_random(report, pictures),
        "Alike": "".join(_alike(group, report, pictures) for group in report.alike[:_GROUPS]),
        "Extremes": _extremes(report, pictures),
        "Distributions": _distributions(report),
    }
    shown = [(_text(title), content) for title, content in parts.items() if content]
    links = "".join(f'<a href="#part{n}">{title}</a>' for n, (title, _) in enumerate(shown))
    body = [_head(report, name), f'<nav aria-label="Parts">{links}</nav>']
    body += [
        f'<section id="part{number}"><h2>{title}</h2>{content}</section>'
        for number, (title, content) in enumerate(shown)
    ]
    if pictures.left_out:
        body.append(
            f"<p>{pictures.left_out} more pictures are left out, so that the page stays below "
            "a few megabytes.</p>"
        )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(name)}: check</title><style>{_STYLE}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _text(value: str) -> str:
    """Text of files as HTML shows it: one line, no markup, nothing that turns the direction."""
    return escape(printable(value), quote=True)


# --- the head: verdict, findings, classes --------------------------------------------------------


def _head(report: Report, name: str) -> str:
    counts = {
        kind: sum(finding.severity == kind for finding in report.findings)
        for kind in ("error", "warning", "note")
    }
    told = ", ".join(f"{n} {kind}{'s' * (n != 1)}" for kind, n in counts.items() if n)
    verdict = "Mend this before training" if report.failed else "Ready to train"
    splits = [pair.split for pair in report.pairs]
    command = f"<pre><code>{_text(report.command)}</code></pre>" if report.command else ""
    return (
        f"<h1>{_text(name)}</h1>"
        f"<p class='verdict{' failed' * report.failed}'><strong>{verdict}</strong>: "
        f"{told or 'nothing was found'}.</p>"
        f"<p>{_text(report.task)}: {splits.count('train')} training and {splits.count('val')} "
        f"validation pairs; the pixels of {len(report.decoded)} were looked at.</p>{command}"
    )


def _findings(report: Report, pictures: "_Pictures") -> str:
    return "".join(_finding(finding, pictures) for finding in report.ranked())


def _finding(finding: Finding, pictures: "_Pictures") -> str:
    count = f"{finding.count:,} × " if finding.pairs else ""
    names = finding.examples[:_NAMES]
    more = finding.count - len(names)
    listed = "".join(f"<li>{_text(example)}</li>" for example in names)
    listed += f"<li>and {more} more</li>" if listed and more > 0 else ""
    fix = f"<p>{_text(finding.fix)}</p>" if finding.fix else ""
    shown = pictures.grid(finding.pairs[:_EXAMPLES])
    if listed:
        listed = f"<details><summary>{finding.count} named</summary><ul>{listed}</ul></details>"
    return (
        f'<div class="finding {finding.severity}"><h3><b>{finding.severity}</b>: '
        f"{_text(finding.kind)}</h3><p>{count}{_text(finding.message)}.</p>{fix}{listed}{shown}</div>"
    )


# --- pairs ---------------------------------------------------------------------------------------


class _Pictures:
    """Pictures of a report's pairs, image beside target, as long as they do not become too many."""

    def __init__(self, report: Report) -> None:
        self.report, self.bytes, self.left_out = report, 0, 0
        palette = list(report.palette) or [(0, 0, 0), *_CLASS_COLOURS * 37][:_IGNORE]
        self.colours = np.full((256, 3), _IGNORED_COLOUR, dtype=np.float32)
        self.colours[: len(palette)] = palette

    def grid(self, indices: Iterable[int], captions: Sequence[str] = ()) -> str:
        """Figures of some pairs, under captions of their own or none, with their names."""
        figures = [
            self._figure(index, captions[number] if captions else "")
            for number, index in enumerate(indices)
        ]
        return f'<div class="grid">{"".join(figures)}</div>' if any(figures) else ""

    def _figure(self, index: int, caption: str) -> str:
        pair = self.report.pairs[index]
        name = f"{pair.split}: {_text(pair.name)}"
        shown = self._image(index, f"{name}, image beside its target")
        told = f"{_text(caption)}<br>" if caption else ""
        return shown and f"<figure>{shown}<figcaption>{told}{name}</figcaption></figure>"

    def _image(self, index: int, alt: str) -> str:
        if self.bytes > _MAX_BYTES:
            self.left_out += 1
            return ""
        if not self.report.read:  # data that lie in no files
            return ""
        try:
            pixels = self._side_by_side(*self.report.read(index, _SIDE))
        except UserError as error:
            return f'<p class="unreadable">{_text(str(error))}</p>'
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
        data = base64.b64encode(file.getvalue()).decode("ascii")
        self.bytes += len(data)
        height, width, _ = pixels.shape
        return (
            f'<img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" '
            f'alt="{alt}" loading="lazy">'
        )

    def _side_by_side(self, image: np.ndarray, target: np.ndarray) -> np.ndarray:
        """The image, and right of it the image under its target, or the picture that it becomes."""
        if self.report.targets == "pictures":
            right = np.asarray(Image.fromarray(target).resize(image.shape[1::-1]))
        else:
            target = np.asarray(
                Image.fromarray(target).resize(image.shape[1::-1], Image.Resampling.NEAREST)
            )
            right = self._covered(image, target)
        gap = np.full((len(image), 4, 3), 128, dtype=np.uint8)
        return np.concatenate([image, gap, right], axis=1)

    def _covered(self, image: np.ndarray, target: np.ndarray) -> np.ndarray:
        if self.report.targets == "classes":
            colour = self.colours[target]  # black: background, as a rule
            share = _TINT * colour.any(-1, keepdims=True)
        else:
            colour, share = (
                np.array(_MASK_COLOUR, dtype=np.float32),
                _TINT * target[..., None] / 255,
            )
        return np.rint(image * (1 - share) + colour * share).astype(np.uint8)


def _at_random(report: Report, pictures: _Pictures) -> str:
    count = len(report.pairs)
    chosen = random.Random(0).sample(range(count), min(_RANDOM, count))
    return pictures.grid(sorted(chosen))


def _alike(group: Alike, report: Report, pictures: _Pictures) -> str:
    told = [_LIKENESS[group.how], f"{len(group.pairs)} pairs"]
    told += ["across training and validation"] * group.across
    told += ["their targets differ"] * group.contradicting
    shown = pictures.grid(group.pairs[:_MEMBERS], group.transforms[:_MEMBERS])
    return f"<h3>{'; '.join(told)}</h3>{shown}"


def _extremes(report: Report, pictures: _Pictures) -> str:
    """The pairs at either end of every statistic."""
    parts = []
    for name, values in report.statistics.items():
        known = np.flatnonzero(np.isfinite(values))
        order = known[np.argsort(values[known], kind="stable")]
        if not order.size or values[order[0]] == values[order[-1]]:
            continue
        lowest = order[:_EXTREMES].tolist()
        highest = [index for index in order[: -_EXTREMES - 1 : -1].tolist() if index not in lowest]
        chosen = [*lowest, *highest]
        captions = [f"{name} {values[index]:.4g}" for index in chosen]
        parts.append(f"<h3>{_text(name)}</h3>{pictures.grid(chosen, captions)}")
    return "".join(parts)


# --- figures -------------------------------------------------------------------------------------


def _distributions(report: Report) -> str:
    parts = [_classes(report)] if report.classes else []
    splits = np.array([pair.split for pair in report.pairs])
    figures = []
    for name, values in report.statistics.items():
        series = {split: values[splits == split] for split in ("train", "val")}
        if not np.isfinite(values).any():
            continue
        figures.append(f"<figure>{histogram(printable(name), series)}</figure>")
    if figures:
        parts.append(
            '<p>Shares of the pairs of <span class="key0">training (filled)</span> and '
            '<span class="key1">validation (line)</span>.</p>'
            f'<div class="grid">{"".join(figures)}</div>'
        )
    return "".join(parts)


def _classes(report: Report) -> str:
    colours = _Pictures(report).colours.astype(int)
    rows = []
    for number, (name, (share, images)) in enumerate(report.classes.items()):
        r, g, b = colours[number]
        swatch = f'<span class="swatch" style="background:rgb({r},{g},{b})"></span>'
        rows.append(
            f'<tr><th scope="row">{swatch}{_text(name)}</th><td>{share:.3%}</td>'
            f"<td>{images}</td></tr>"
        )
    return _table_of("Classes", ["class", "share of pixels", "images with it"], "".join(rows))


def _section(section: Section) -> str:
    lines = "".join(f"<li>{_text(line)}</li>" for line in section.lines)
    tables = "".join(_table(table) for table in section.tables)
    curves = "".join(
        f"<figure>{curve(chart)}<figcaption>{_text(chart.caption)}</figcaption></figure>"
        for chart in section.curves
        if len(chart.x)
    )
    return f'<ul>{lines}</ul>{tables}<div class="grid">{curves}</div>'


def _table(table: Table) -> str:
    rows = []
    for first, *others in table.rows:
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in others)
        rows.append(f'<tr><th scope="row">{_text(first)}</th>{cells}</tr>')
    return _table_of(table.caption, table.head, "".join(rows))


def _table_of(caption: str, head: Sequence[str], rows: str) -> str:
    cells = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}"><table>'
        f"<caption>{_text(caption)}</caption><thead><tr>{cells}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )
