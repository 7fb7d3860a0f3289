"""The page of check.py: what it shows, and that nothing of a file can be more than text in it."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from train_utils.check.charts import curve, histogram
from train_utils.check.findings import Alike, CheckedPair, Finding, Report
from train_utils.check.output import CheckFolder
from train_utils.check.page import PAGE, render, write_page
from train_utils.check.sections import Curve, Section, Table
from train_utils.errors import UserError

HOSTILE = "\"><script>alert('1')</script><img src=x onerror=alert(2)>&amp;</style>\u202e\n\udcff'"
GREY, WHITE = 120, 255
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "nav", "a", "section", "h1", "h2"),
    *("h3", "b", "p", "strong", "pre", "code", "div", "ul", "li", "details", "summary", "figure"),
    *("figcaption", "img", "br", "span", "table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("svg", "path", "polyline", "text", "title"),
}


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def picture(attributes):
    """The pixels of an img, which must be in the page itself."""
    kind, data = attributes["src"].split(",")
    assert kind == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (int(attributes["width"]), int(attributes["height"]))
    return np.asarray(image).astype(int)


def halves(targets="masks"):
    """A grey image whose left half is the object, or class 1, or another picture."""
    image = np.full((40, 60, 3), GREY, np.uint8)
    target = np.zeros((40, 60), np.uint8)
    target[:, :30] = {"masks": 255, "classes": 1}.get(targets, 0)
    return image, image[..., :] // 2 if targets == "pictures" else target


def report_of(count, targets="masks", name="photo", read=None, **others):
    pairs = [
        CheckedPair("val" if i % 4 == 3 else "train", f"{name}{i}", f"i/{i}", f"m/{i}")
        for i in range(count)
    ]
    statistics = {"object share": np.arange(count) / max(1, count)}
    read = read or (lambda index, side: halves(targets))
    return Report("saliency", targets, pairs, statistics, [*range(count)], read=read, **others)


def test_what_files_say_is_nothing_but_text(tmp_path):
    """Names, messages, classes and errors of files; tags and attributes are the page's own."""
    h = HOSTILE

    def read(index, side):
        if index:
            raise UserError(f"{h}: cannot be read. Replace it.")
        return halves("classes")

    finding = Finding(h, "error", h, h, 30, [h] * 25, [0, 1], [h])
    section = Section(
        h,
        [h],
        [Table(h, [h, h], [[h, h]])],
        [Curve(h, h, h, [1e-3, 1e-2, 0.1], [1, 2, 3], [1, 2, 3], {h: 1e-2}, log_x=True)],
    )
    report = report_of(4, "classes", h, read, command=h, findings=[finding], sections=[section])
    report.task, report.classes, report.statistics = h, {h: (0.5, 2)}, {h: np.arange(4.0)}
    report.alike = [Alike("near", [0, 1], ["same", h], across=True)]
    content = render(report, h)
    assert content.isascii() and "\\u202e" in content
    page = Page(content)
    assert {tag for tag, _ in page.tags} <= TAGS
    assert page.text.count("<script>alert('1')</script>") > 30
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:image/jpeg").startswith("data:image/jpeg")
    (policy,) = [x["content"] for x in page.all("meta") if "http-equiv" in x]
    assert policy.startswith("default-src 'none'")
    assert write_page(report, CheckFolder(tmp_path / "check")) == tmp_path / "check" / PAGE


def test_all_that_a_page_shows_can_be_read_without_seeing_it():
    section = Section(
        "Set-up", ["4 images"], [Table("model", ["stage", "type"], [["a", "Conv2d"]])]
    )
    section.curves.append(Curve("overfit", "step", "loss", [1, 2, 3], [3.0, 2.0, 1.0]))
    findings = [
        Finding("empty", "warning", "2 masks are empty", "Remove them.", 2, ["a", "b"], [1])
    ]
    report = report_of(9, findings=findings, sections=[section], classes={"cat": (0.25, 3)})
    report.alike = [Alike("bytes", [0, 3], ["same", "mirrored"], True, True)]
    page = Page(render(report, "shapes"))
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("table")) == len(page.all("caption")) == 2
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert [f"#{name}" for name in ids] == [link["href"] for link in page.all("a")]
    assert len({*ids}) == len(ids) == 6
    shown = "Ready to train: 1 warning", "2 masks are empty", "mirrored", "their targets differ"
    for text in (*shown, "object share 0", "object share 0.8889", "val: photo3", "25.000%"):
        assert text in page.text, text
    assert page.text.index("2 masks are empty") < page.text.rindex("Pairs at random")


@pytest.mark.parametrize("targets", ["masks", "classes", "pictures"])
def test_a_picture_is_the_image_beside_its_target(targets):
    """The object tinted, the rest as it is; another picture instead of an image under a mask."""
    page = Page(render(report_of(1, targets), "set"))
    pixels = picture(page.all("img")[0])
    assert pixels.shape == (40, 60 + 4 + 60, 3)
    image, left, right = pixels[5:35, 5:55], pixels[5:35, 70:90], pixels[5:35, 98:118]
    assert abs(image - GREY).max() < 12
    if targets == "pictures":
        assert abs(pixels[5:35, 70:118] - GREY // 2).max() < 12
        return
    assert abs(right - GREY).max() < 12
    colour = {"masks": (255, 0, 110), "classes": (0, 114, 178)}[targets]
    expected = GREY * 0.45 + np.array(colour) * 0.55
    assert abs(left.mean((0, 1)) - expected).max() < 12


def test_a_page_stays_small_and_says_what_it_leaves_out():
    """Noise is what JPEG needs most bytes for; every statistic would show six pairs."""
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    report = report_of(100, read=lambda index, side: (noise, noise[..., 0]))
    columns = {f"statistic {n}": np.roll(np.arange(100.0), n) for n in range(20)}
    report.statistics = columns
    content = render(report, "noise")
    assert len(content) < 4_000_000
    shown = len(Page(content).all("img"))
    assert shown + int(content.partition(" more pictures are left out")[0].rpartition(">")[2]) == (
        24 + 20 * 6
    )
    assert all(picture(image).size for image in Page(content).all("img")[:3])


def test_a_report_without_a_pair_or_a_file_has_a_page():
    report = Report("saliency", "masks", findings=[Finding("pairs", "error", "no such folder")])
    text = Page(render(report, "empty")).text
    assert "Mend this before training: 1 error." in text and "0 training" in text
    report = report_of(2)
    report.read = None
    assert "Pairs at random" not in Page(render(report, "drawn")).text


def test_histograms_and_curves_say_their_numbers():
    """Of what is finite; a curve that explodes is cut at the top."""
    drawn = histogram("size", {"train": np.array([1.0, 1, 1, 3, np.nan]), "val": np.array([])})
    assert "from 1 to 3, highest bin 75%" in drawn and drawn.count("<path class=") == 2
    assert "from 5 to 10" in histogram("one", {"train": np.array([5.0])})
    drawn = curve(
        Curve("sweep", "rate", "loss", [1e-3, 1e-1], [1.0, float("inf")], (), {"best": 1e-2}, True)
    )
    assert "loss against rate; best at 0.01" in drawn
    assert "nan" not in drawn and "inf" not in drawn
    points = drawn.partition('points="')[2].partition('"')[0].split()
    assert points == ["44.0,116.0", "312.0,8.0"]
