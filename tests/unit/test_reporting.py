"""The report: reads what is there, names what isn't, escapes everything, needs nothing from outside."""

import base64
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage

from src.data.video import encode_preview, write_video
from src.reporting import html
from src.reporting.html import duration, number, render, write_page
from src.reporting.plots import Panel, draw, panels, smoothed, wants_log
from src.reporting.runs import Curve, load_run

EVIL = "<script>alert('x')</script>"


def write_clip(path: Path, num_frames: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, 16, 24, 3), dtype=np.uint8)
    write_video(path, frames, 8)


TITLE = f"Two & more {EVIL}"


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """A run folder with everything in it, hostile names included; not to be changed."""
    run = tmp_path_factory.mktemp("example") / "demo"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"name: {EVIL}\n")
    rows = [{"step": s, "time": s / 2, "unet/loss": 1 / s, "note": "text"} for s in range(1, 41)]
    rows.append(
        {
            "step": 40,
            "time": 21.0,
            "held_out/loss": 0.5,
            "held_out/loss_at_125": 0.7,
            "held_out/loss_at_875": 0.3,
        }
    )
    lines = [json.dumps(row) for row in rows]
    (run / "metrics.jsonl").write_text(
        "\n".join([*lines, '{"step": 41, "unet/loss": NaN}', '{"step": 42, "un'])
    )
    for name, num_frames, count in (("samples", 4, 3), ("long", 12, 1)):
        for i in range(count):
            write_clip(run / name / f"sample_{i}.mp4", num_frames)
        entries = [{"file": f"sample_{i}.mp4", "seed": i, "class": f"disc {EVIL}"} for i in range(count)]
        described = {"num_frames": num_frames, "guidance_scale": 2.0, "samples": entries}
        (run / name / "samples.json").write_text(json.dumps(described))
    (run / "samples" / "contact_sheet.png").write_bytes(b"a picture")
    videos = {}
    for group in ("real", "generated", "nearest"):
        videos[group] = [f"evaluation/{group}_{i}.mp4" for i in range(2)]
        for name in videos[group]:
            write_clip(run / name)
    evaluation = {
        "metrics": {
            "fvd_fast@8": 1234.56,
            "fvd_fast@8_untrained": 9876.5,
            "contrast_ratio": 0.987,
        },
        "protocol": {"features": "i3d", "sentence": f"8 against 8 {EVIL}."},
        "videos": videos,
        "notes": [f"a note {EVIL}"],
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    for step in range(10, 100, 10):
        path = run / "previews" / f"step_{step:09d}" / "samples.webp"
        path.parent.mkdir(parents=True)
        path.write_bytes(encode_preview(np.zeros((2, 8, 16, 3), np.uint8), 8))
    return run


@pytest.fixture(scope="module")
def text(example) -> str:
    """The page about it."""
    return render([load_run(example)], TITLE)


@pytest.fixture
def folder(example, tmp_path, monkeypatch) -> Path:
    """A copy of the run folder that may be changed; its curves aren't drawn, which takes most of the time."""
    monkeypatch.setattr(html, "draw", lambda panel: b"<svg/>")
    return Path(shutil.copytree(example, tmp_path / "runs" / "demo"))


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag):
        self._in_style = False

    def handle_data(self, data):
        if not self._in_style:
            self.text += data

    def sources(self, tag: str) -> list[str]:
        return [attributes["src"] or "" for name, attributes in self.tags if name == tag]


# ---- reading ----


def test_a_whole_run_is_read(folder):
    run = load_run(folder)
    assert run.name == "demo" and run.num_steps == 40 and run.seconds == 21.0
    assert run.curves["unet/loss"].steps == list(range(1, 41))
    assert run.curves["unet/loss"].values == [1 / s for s in range(1, 41)]
    assert run.curves["held_out/loss_at_125"] == Curve([40], [0.7])
    assert "time" not in run.curves and "note" not in run.curves
    assert [s.name for s in run.sample_sets] == ["samples", "long"]
    assert [clip.path.name for clip in run.sample_sets[0].clips] == [f"sample_{i}.mp4" for i in range(3)]
    assert run.sample_sets[0].clips[1].caption == f"disc {EVIL} · seed 1"
    assert run.evaluation is not None and run.evaluation.metrics["contrast_ratio"] == 0.987
    assert {group: len(clips) for group, clips in run.evaluation.videos.items()} == dict.fromkeys(
        run.evaluation.videos, 2
    )
    assert [preview.step for preview in run.previews] == list(range(10, 100, 10))
    assert run.problems == ["metrics.jsonl: 1 rows can't be read", "metrics.jsonl: 1 values aren't finite"]


def test_what_is_missing_is_named_and_the_rest_is_shown(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 2}\n')
    run = load_run(tmp_path)
    assert run.problems == ["config.yaml is missing", "evaluation.json is missing"]
    assert run.curves == {"loss": Curve([5], [2.0])} and run.seconds is None
    page = Page(render([run], "T"))
    assert "evaluation.json is missing" in page.text and "5 steps" in page.text
    assert not page.sources("video")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "evaluation.json can't be read"),
        ("[1]", "must hold an object, it holds a list"),
        ("{}", "holds no metrics"),
    ],
)
def test_a_broken_evaluation_is_named(folder, content, problem):
    (folder / "evaluation.json").write_text(content)
    run = load_run(folder)
    assert any(problem in p for p in run.problems)
    render([run], "T")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder at"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileNotFoundError, match="isn't a run folder"):
        load_run(tmp_path)


def test_files_outside_the_run_are_not_carried_off(folder):
    secret = folder.parent / "secret.mp4"
    write_clip(secret)
    (folder / "link.mp4").symlink_to(secret)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["videos"] = {"real": ["../secret.mp4", str(secret), "link.mp4", "config.yaml", "gone.mp4", 3]}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    run = load_run(folder)
    assert run.evaluation is not None and run.evaluation.videos == {"real": []}
    for name in ("../secret.mp4", str(secret), "link.mp4", "config.yaml", "3"):
        assert f"{name} isn't a video inside the run" in run.problems
    assert "gone.mp4 is missing" in run.problems


def test_samples_without_a_list_are_shown_in_natural_order(folder):
    (folder / "samples" / "samples.json").unlink()
    for i in (2, 10):
        write_clip(folder / "samples" / f"sample_{i}.mp4")
    names = [clip.caption for s in load_run(folder).sample_sets if s.name == "samples" for clip in s.clips]
    assert names == ["sample_0", "sample_1", "sample_2", "sample_10"]


# ---- curves ----


def test_levels_of_one_quantity_share_a_panel_and_losses_come_first():
    curve = Curve([1], [1.0])
    names = [
        "unet/gradient_norm",
        "held_out/loss",
        "held_out/loss_at_125",
        "held_out/loss_at_875",
        "unet/loss",
    ]
    found = panels(dict.fromkeys(names, curve))
    assert [panel.title for panel in found] == [
        "unet/loss",
        "held_out/loss",
        "held_out/loss at",
        "unet/gradient_norm",
    ]
    assert list(found[2].curves) == ["125", "875"]


def test_smoothing_is_a_gaussian_filter_that_keeps_lines():
    values = np.random.default_rng(0).normal(size=200)
    expected = scipy.ndimage.gaussian_filter1d(values, 4.0, truncate=3.0)
    np.testing.assert_allclose(
        smoothed(values.tolist(), 4.0)[12:-12], expected[12:-12], rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(smoothed([3.0] * 30, 2.0), [3.0] * 30, rtol=1e-12)
    line = np.arange(50.0)
    np.testing.assert_allclose(smoothed(line.tolist(), 2.0)[6:-6], line[6:-6], rtol=1e-12)


def test_a_logarithmic_axis_is_for_wide_positive_ranges():
    assert wants_log([1e-4, 1.0]) and not wants_log([0.5, 1.0]) and not wants_log([0.0, 1.0])
    assert not wants_log([-1.0, 100.0])


def test_a_panel_is_a_valid_picture_and_reproducible():
    long, short = Curve(range(40), [1 / (s + 1) for s in range(40)]), Curve([3], [0.5])
    panel = Panel("loss", {"125": long, "<evil>&": short})
    picture = draw(panel)
    root = ElementTree.fromstring(picture)
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"125", "<evil>&", "step"} <= texts
    assert draw(panel) == picture
    # A long curve is drawn twice, raw and smoothed; a short one once.
    assert picture.count(b"stroke-opacity: 0.25") == 1
    assert b"stroke-opacity: 0.25" not in draw(Panel("loss", {"125": short}))
    draw(Panel("loss", {"not $mathematics": short}))


@pytest.mark.parametrize("decades", [2, 4, 8, 12])
def test_a_logarithmic_axis_has_plain_numbers(decades):
    panel = Panel("loss", {"": Curve([100, 200], [1.0, 10.0**-decades])})
    root = ElementTree.fromstring(draw(panel))
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    labels = [float(text) for text in texts if text != "step" and float(text) < 100]
    assert 3 <= len(labels) <= 9 and max(labels) <= 1


# ---- the page ----


def test_the_page_holds_the_very_files(example, text):
    page = Page(text)
    shown = [base64.b64decode(uri.removeprefix("data:video/mp4;base64,")) for uri in page.sources("video")]
    files = [example / "samples" / f"sample_{i}.mp4" for i in range(3)] + [example / "long" / "sample_0.mp4"]
    for path in [*files, *(example / "evaluation").iterdir()]:
        assert path.read_bytes() in shown
    for tag, attributes in page.tags:
        if tag == "video":
            assert {"autoplay", "loop", "muted", "playsinline"} <= attributes.keys()
            assert attributes["class"] == "pixels" and attributes["style"] == "aspect-ratio: 24 / 16"
    assert base64.b64encode(b"a picture").decode() in "".join(page.sources("img"))
    for panel in panels(load_run(example).curves):
        assert base64.b64encode(draw(panel)).decode() in text


def test_the_page_says_what_was_measured_and_how(text):
    expected = [
        "Two & more",
        "fvd_fast@8",
        "1,235",
        "untrained network: 9,876",
        "0.987",
        "8 against 8",
        "a note",
        "40 steps · 21 s",
        "Long videos",
        "12 frames",
        "guidance 2.0",
        "nearest training clip",
    ]
    for part in expected:
        assert part in Page(text).text, part


def test_everything_is_escaped(text):
    page = Page(text)
    assert "<script" not in text
    assert not any(tag == "script" for tag, _ in page.tags)
    for place in ("Two & more ", "name: ", "disc ", "a note ", "8 against 8 "):
        assert place + EVIL in page.text
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_nothing_comes_from_outside(text):
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "poster", "srcset"):
            if value := attributes.get(name):
                assert value.startswith(("data:", "#")), (tag, value[:50])
    assert not any(tag in ("link", "iframe", "object", "base") for tag, _ in page.tags)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]


def test_previews_are_thinned_to_six_with_both_ends(text):
    steps = [int(step) for step in re.findall(r"samples after (\d+) steps", Page(text).text)]
    assert len(steps) == 6 and steps[0] == 10 and steps[-1] == 90 and steps == sorted(steps)


def test_too_much_is_left_out_and_said(folder, monkeypatch):
    monkeypatch.setattr(html, "_MAX_PER_SET", 2)
    page = Page(render([load_run(folder)], "T"))
    assert "demo/samples: 2 of 3 videos are shown" in page.text
    monkeypatch.setattr(html, "_MAX_VIDEOS", 5)
    assert len(Page(render([load_run(folder)], "T")).sources("video")) <= 5
    monkeypatch.setattr(html, "_MAX_BYTES", 10)
    page = Page(render([load_run(folder)], "T"))
    assert not page.sources("video") and "sample_0.mp4 is left out" in page.text


def test_a_broken_video_is_named(folder):
    (folder / "samples" / "sample_1.mp4").write_bytes(b"not a video")
    page = Page(render([load_run(folder)], "T"))
    assert "sample_1.mp4" in page.text and "demo/samples: 2 of 3 videos are shown" in page.text


def test_several_runs_stand_side_by_side(folder, tmp_path):
    other = tmp_path / "runs" / "other"
    shutil.copytree(folder, other)
    told = json.loads((other / "evaluation.json").read_text())
    told["metrics"] = {"fvd_fast@8": 777.0, "psnr_of_mine": 3.0}
    (other / "evaluation.json").write_text(json.dumps(told))
    text = render([load_run(folder), load_run(other)], "T")
    rows = re.findall(r"<tr><td><code>(.*?)</code></td>(.*?)<td class=.meaning", text)
    values = {name: re.findall(r">([^<>]+)</td>", cells) for name, cells in rows}
    assert values["fvd_fast@8"] == ["1,235", "777"]
    assert values["psnr_of_mine"] == ["–", "3"] and values["contrast_ratio"] == ["0.987", "–"]
    assert "(demo, other)" in text


def test_distances_measured_in_different_ways_never_share_a_row(folder, tmp_path):
    runs = [folder]
    for name, digest, protocol in (("same", "aaaaaaaa", "ours"), ("other", "bbbbbbbb", "lvdm")):
        run = tmp_path / "runs" / name
        shutil.copytree(folder, run)
        told = json.loads((run / "evaluation.json").read_text())
        told |= {"comparison": {"digest": digest}}
        told["protocol"]["name"] = protocol
        told["uncertainty"] = {"fvd_fast@8": {"deviation_over_seeds": 3.21, "floor": 456.7}}
        (run / "evaluation.json").write_text(json.dumps(told))
        runs.append(run)
    first = json.loads((folder / "evaluation.json").read_text()) | {"comparison": {"digest": "aaaaaaaa"}}
    first["protocol"]["name"] = "ours"
    (folder / "evaluation.json").write_text(json.dumps(first))
    text = render([load_run(run) for run in runs], "T")
    rows = re.findall(r"<tr><td><code>(.*?)</code></td>(.*?)<td class=.meaning", text)
    values = {name: re.findall(r">([^<>]+)</td>", cells) for name, cells in rows}
    beside = "1,235 ± 3.21 (real: 457)"
    assert values["fvd_fast@8 [ours aaaaaa]"] == ["1,235", beside, "–"]
    assert values["fvd_fast@8 [lvdm bbbbbb]"] == ["–", "–", beside]
    assert "fvd_fast@8" not in values
    assert values["contrast_ratio"] == ["0.987", "0.987", "0.987"], "plain statistics compare"


def test_nearest_clips_in_different_spaces_never_share_a_row(folder, tmp_path):
    other = Path(shutil.copytree(folder, tmp_path / "runs" / "other"))
    for run, value, space in ((folder, 12.5, "i3d features"), (other, 0.25, "pixels")):
        told = json.loads((run / "evaluation.json").read_text())
        told |= {"metrics": {"nearest_training_clip": value}, "copies": {"space": space}}
        (run / "evaluation.json").write_text(json.dumps(told))
    text = render([load_run(folder), load_run(other)], "T")
    rows = re.findall(r"<tr><td><code>(.*?)</code></td>(.*?)<td class=.meaning", text)
    values = {name: re.findall(r">([^<>]+)</td>", cells) for name, cells in rows}
    assert values["nearest_training_clip [i3d features]"] == ["12.5", "–"]
    assert values["nearest_training_clip [pixels]"] == ["–", "0.25"]
    assert "nearest_training_clip" not in values and "distance of samples; in pixels" in text


def test_names_that_are_no_text_do_not_stop_a_page(folder, tmp_path):
    told = json.loads((folder / "evaluation.json").read_text()) | {"notes": ["caf\udce9.mp4"]}
    (folder / "evaluation.json").write_text(json.dumps(told))
    write_page([load_run(folder)], tmp_path / "page.html", "T")
    assert "caf\\udce9.mp4" in (tmp_path / "page.html").read_text()


def test_the_page_is_written_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    output = tmp_path / "pages" / "report.html"
    write_page([load_run(folder)], output, "T")
    before = output.read_text()
    assert before.startswith("<!doctype html>") and before.rstrip().endswith("</html>")
    monkeypatch.setattr(html, "draw", lambda panel: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page([load_run(folder)], output, "other")
    assert output.read_text() == before and [p.name for p in output.parent.iterdir()] == ["report.html"]
    with pytest.raises(ValueError, match="at least one run"):
        write_page([], output, "T")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1234.56, "1,235"),
        (98765.4, "98,765"),
        (0.98765, "0.9877"),
        (28.0, "28"),
        (0.0, "0"),
        (1.5e-5, "1.500e-05"),
        (-3.25, "-3.25"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_are_for_people(value, expected):
    assert number(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(4.2, "4 s"), (59.7, "1 min 0 s"), (238, "3 min 58 s"), (7384, "2 h 3 min")]
)
def test_durations_are_for_people(seconds, expected):
    assert duration(seconds) == expected
