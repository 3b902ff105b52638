import io
import os
import shutil
import subprocess
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from src.data import video
from src.data.transforms import Frames, Resize
from src.data.video import (
    VideoError,
    VideoWriter,
    contact_sheet,
    count_frames,
    declared_frames,
    encode_preview,
    iterate_frames,
    natural_key,
    probe,
    read_clip,
    read_frames,
    write_video,
)

Shared = Callable[[str], Path]


def numbered(num_frames: int, height: int = 48, width: int = 64) -> Frames:
    """Frames that tell their index: as eight black or white bars."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    for t in range(num_frames):
        for bit in range(8):
            if t >> bit & 1:
                frames[t, :, bit * width // 8 : (bit + 1) * width // 8] = 255
    return frames


def numbers(frames: Frames) -> list[int]:
    height, width = frames.shape[1:3]
    return [
        sum(int(frame[height // 2, int((bit + 0.5) * width / 8)].mean() > 127) << bit for bit in range(8))
        for frame in frames
    ]


def write_raw(
    path: Path, codec: str, frames: Frames, stamps: list[int] | None = None, **options: str
) -> None:
    """Write frames with any codec and any time stamps (in 1/100 s), by PyAV alone."""
    pix_fmt = options.pop("pix_fmt", "yuv420p")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = stream.time_base = Fraction(1, 100)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.time_base = Fraction(1, 100)
            picture.pts = stamps[index] if stamps else index * 4
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def reference_frames(path: Path, wanted: set[int]) -> tuple[int, dict[int, Frames]]:
    """Decode a file from end to end as PyAV's own documentation does it; count frames, and keep some.

    Damaged packets are left out. One thread: how a decoder conceals damage depends on their number.
    """
    found = {}
    count = 0
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        assert isinstance(stream, av.VideoStream)
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue
            for frame in frames:
                if count in wanted:
                    found[count] = frame.to_ndarray(format="rgb24", interpolation="BICUBIC")  # as ffmpeg
                count += 1
    return count, found


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"g": "250", "bf": "3"}),
        ("b.mkv", "libx264", {"g": "7", "bf": "2"}),
        ("c.avi", "mpeg4", {"bf": "2", "g": "300"}),
        ("d.webm", "libvpx-vp9", {"deadline": "realtime"}),
        ("e.mov", "mjpeg", {"pix_fmt": "yuvj422p"}),
    ],
)
def test_clips_are_frame_exact_at_any_start_and_stride(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    path = tmp_path / name
    write_raw(path, codec, numbered(60), **options)
    assert probe(path).num_frames == 60
    for start, count, stride in [(0, 60, 1), (0, 1, 1), (59, 1, 7), (13, 16, 2), (1, 20, 3), (30, 5, 6)]:
        clip = read_clip(path, start, count, stride)
        assert clip.dtype == np.uint8 and clip.shape == (count, 48, 64, 3)
        assert numbers(clip) == [start + k * stride for k in range(count)]
    assert numbers(np.stack(list(iterate_frames(path)))) == list(range(60))


def test_asking_beyond_the_end_names_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "short.mp4"
    write_video(path, numbered(10), 8)
    with pytest.raises(VideoError, match=r"short.mp4: it has 10 frames, and frames 4 to 10 "):
        read_clip(path, 4, 4, 2)
    with pytest.raises(ValueError, match="start=-1"):
        read_clip(path, -1, 4)


def test_time_rules_where_the_rate_varies(tmp_path: Path) -> None:
    # On screen, in hundredths of a second: 0 for 10, 1 for 10, 2 for 40, 3 for 10, 4 for 4 (says the file).
    path = tmp_path / "variable.mkv"
    write_raw(path, "libx264", numbered(5), stamps=[0, 10, 20, 60, 70])
    info = probe(path)
    assert info.variable_rate and info.num_frames == 5
    assert numbers(read_clip(path, 0, 5)) == [0, 1, 2, 3, 4]
    # Ten ticks a second, looked at in their middle: 5, 15, 25, …
    assert numbers(read_clip(path, 0, 7, at_fps=10)) == [0, 1, 2, 2, 2, 2, 3]
    assert numbers(read_clip(path, 2, 3, 2, at_fps=10)) == [2, 2, 3]
    assert numbers(read_clip(path, 0, 3, at_fps=4)) == [1, 2, 3]
    # At the average rate there are as many ticks as frames.
    assert sum(1 for _ in iterate_frames(path, at_fps=info.fps)) == 5


def test_a_last_frame_that_claims_minutes_doesnt_stand_for_them(tmp_path: Path) -> None:
    path = tmp_path / "x.gif"
    images = [Image.fromarray(frame) for frame in numbered(12)]
    stated = [40, 80] * 5 + [40, 655_350]  # milliseconds
    images[0].save(path, save_all=True, append_images=images[1:], duration=stated)
    info = probe(path)
    # 0.64 s up to the last frame, which stays as long as the longest of the others, 0.08 s.
    assert info.variable_rate and info.num_frames == 12 and info.fps == pytest.approx(12 / 0.72)
    shown = numbers(np.stack(list(iterate_frames(path, at_fps=info.fps))))
    assert len(shown) == 12 and len(set(shown)) >= 8
    assert numbers(np.stack(list(iterate_frames(path, at_fps=25.0)))) == [
        *(0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9, 10, 11, 11),
    ]


def test_an_even_rate_reads_the_same_by_time_and_by_count(tmp_path: Path) -> None:
    path = tmp_path / "even.mkv"  # Matroska rounds stamps to milliseconds
    with VideoWriter(tmp_path / "even.mp4", 30000 / 1001) as writer:
        writer.write(numbered(50))
    write_raw(path, "libx264", numbered(50))
    for file, fps in [(path, 25), (tmp_path / "even.mp4", 30000 / 1001)]:
        info = probe(file)
        assert not info.variable_rate and info.fps == pytest.approx(fps, rel=1e-9)
        np.testing.assert_array_equal(read_clip(file, 3, 11, 4, at_fps=info.fps), read_clip(file, 3, 11, 4))
    # And the rate can be changed: half of it takes every second frame.
    assert numbers(read_clip(path, 0, 25, at_fps=12.5)) == list(range(1, 50, 2))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_metadata_is_applied(tmp_path: Path, degrees: int) -> None:
    upright = np.zeros((2, 32, 64, 3), np.uint8)
    upright[:, :16, :32] = (255, 0, 0)
    upright[:, :16, 32:] = (0, 255, 0)
    upright[:, 16:, :32] = (0, 0, 255)
    # What a camera stores that was held so that the file must be turned clockwise by `degrees`.
    stored = np.rot90(upright, degrees // 90, axes=(1, 2))
    plain, path = tmp_path / "plain.mp4", tmp_path / "turned.mp4"
    write_video(plain, stored, 8)
    box = bytearray(plain.read_bytes())
    # The track header's matrix is the second of two (the first is the whole movie's), 16.16 fixed point.
    unit = np.array([65536, 0, 0, 0, 65536, 0, 0, 0, 0x40000000], ">i4").tobytes()
    at = box.index(unit, box.index(b"tkhd"))
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    turned = np.array([a * 65536, b * 65536, 0, c * 65536, d * 65536, 0, 0, 0, 0x40000000], ">i4")
    box[at : at + 36] = turned.tobytes()
    path.write_bytes(box)
    info = probe(path)
    assert (info.height, info.width) == (32, 64)
    frame = read_clip(path, 0, 1)[0].astype(int)
    for y, x in [(6, 10), (6, 50), (26, 10), (26, 50)]:
        assert np.abs(frame[y, x] - upright[0, y, x]).max() < 12


def test_a_folder_of_images_is_a_video(tmp_path: Path) -> None:
    frames = numbered(12)
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"frame{t}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    assert probe(tmp_path).num_frames == 12
    np.testing.assert_array_equal(read_clip(tmp_path, 1, 5, 2), frames[1:11:2])
    np.testing.assert_array_equal(np.stack(list(iterate_frames(tmp_path))), frames)
    with pytest.raises(VideoError, match="it has 12 frames"):
        read_clip(tmp_path, 10, 3)


def test_images_of_any_kind_become_rgb(tmp_path: Path) -> None:
    levels = np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4)
    Image.fromarray(levels).save(tmp_path / "0.png")
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "1.png")
    alpha = np.dstack([levels, levels, levels, np.full_like(levels, 7)])
    Image.fromarray(alpha).save(tmp_path / "2.png")
    Image.fromarray(levels).convert("P").save(tmp_path / "3.png")
    np.testing.assert_array_equal(
        read_clip(tmp_path, 0, 4), levels[None, ..., None].repeat(4, 0).repeat(3, -1)
    )


def test_broken_images_are_named(tmp_path: Path) -> None:
    Image.fromarray(numbered(1)[0]).save(tmp_path / "0.jpg")
    (tmp_path / "1.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:200])
    with pytest.raises(VideoError, match=r"1\.jpg"):
        read_clip(tmp_path, 0, 2)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(VideoError, match="holds no images"):
        probe(empty)


def test_names_are_ordered_as_people_count() -> None:
    names = ["f10.png", "f9.png", "f1.png", "a.png", "f2b.png", "f2.png"]
    assert sorted(names, key=natural_key) == ["a.png", "f1.png", "f2.png", "f2b.png", "f9.png", "f10.png"]
    assert sorted(["10.png", "x.png", "9.png"], key=natural_key)[0:2] == ["9.png", "10.png"]


@pytest.mark.parametrize("name", ["-dash & space.mp4", "concat:a|b.mp4", "ünïcode 視頻.mp4", "a%20b?#.mp4"])
def test_odd_names_are_just_names(tmp_path: Path, name: str) -> None:
    write_video(tmp_path / name, numbered(6), 8)
    assert numbers(read_clip(tmp_path / name, 0, 6)) == list(range(6))
    before = Path.cwd()
    try:
        os.chdir(tmp_path)
        assert probe(name).num_frames == 6
    finally:
        os.chdir(before)


def test_resize_is_applied_to_every_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, numbered(6), 8)
    whole = read_clip(path, 0, 6)
    resize = Resize((24, 24))
    np.testing.assert_array_equal(read_clip(path, 0, 6, resize=resize), np.stack([resize(f) for f in whole]))


def test_flat_colours_survive_the_file(tmp_path: Path) -> None:
    colours = np.array(
        [(r, g, b) for r in (0, 90, 255) for g in (0, 160, 255) for b in (0, 128, 255)], np.uint8
    )
    frames = np.broadcast_to(colours[:, None, None], (len(colours), 32, 32, 3))
    write_video(tmp_path / "colours.mp4", frames, 8)
    back = read_clip(tmp_path / "colours.mp4", 0, len(colours)).astype(int)
    assert np.abs(back - frames).max() <= 3


def test_what_is_written_plays_in_browsers(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "a.mp4"
    write_video(path, numbered(30), 12.5)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == Fraction(25, 2) and stream.frames == 30
        # H.273: matrix 6 is BT.601, range 1 is limited, primaries and curve 1 are BT.709.
        context = stream.codec_context
        assert (context.colorspace, context.color_range) == (6, 1)
        assert (context.color_primaries, context.color_trc) == (1, 1)
    assert list(path.parent.iterdir()) == [path]


def test_equal_frames_give_equal_bytes(tmp_path: Path) -> None:
    # Small and smooth: here the encoder's fast code differs from run to run, unless told not to.
    y, x = np.mgrid[:32, :32]
    levels = [128 + 60 * np.sin((x + t) / 6) * np.cos(y / 5) for t in range(20)]
    frames = np.stack(levels).astype(np.uint8)[..., None].repeat(3, -1)
    seen = set()
    for _ in range(40):
        write_video(tmp_path / "a.mp4", frames, 8)
        seen.add((tmp_path / "a.mp4").read_bytes())
    assert len(seen) == 1


def test_odd_sizes_repeat_the_last_row_and_column(tmp_path: Path) -> None:
    frames = np.full((4, 33, 17, 3), (200, 40, 90), np.uint8)
    write_video(tmp_path / "odd.mp4", frames, 8)
    back = read_clip(tmp_path / "odd.mp4", 0, 4).astype(int)
    assert back.shape == (4, 34, 18, 3)
    assert np.abs(back - (200, 40, 90)).max() <= 3


def test_frames_can_be_written_bit_by_bit(tmp_path: Path) -> None:
    frames = numbered(30)
    write_video(tmp_path / "once.mp4", frames, 8)
    with VideoWriter(tmp_path / "twice.mp4", 8) as writer:
        for begin in range(0, 30, 7):
            writer.write(frames[begin : begin + 7])
    assert (tmp_path / "once.mp4").read_bytes() == (tmp_path / "twice.mp4").read_bytes()


def test_frames_are_counted_beside_those_that_are_declared(tmp_path: Path, shared: Shared) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, numbered(30), 8)
    assert count_frames(path) == declared_frames(path) == 30
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert count_frames(path) < 30 == declared_frames(path)
    path.write_bytes(b"")
    assert count_frames(path) == 0 and declared_frames(path) is None
    clips = shared("odd_clips")
    told = {name: (declared_frames(clips / name), count_frames(clips / name)) for name in COUNTED}
    assert told == COUNTED


COUNTED = {
    "truncated.avi": (164, 62),
    "animated.webp": (None, 20),
    "vp9.webm": (None, 50),
    "audio_only_no_video.mp4": (None, 0),
}


def test_a_video_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "a.mp4", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: (done.append(("fsync", os.fstat(file).st_ino)), fsync(file))
    )
    monkeypatch.setattr(os, "replace", lambda *names: (done.append(("replace", 0)), replace(*names)))
    write_video(path, numbered(5), 8)
    assert done == [("fsync", path.stat().st_ino), ("replace", 0)]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(RuntimeError, match="stop"), VideoWriter(path, 8) as writer:
        writer.write(numbered(5))
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match="no frames"), VideoWriter(path, 8):
        pass
    with pytest.raises(ValueError, match=r"all be h w c = \(48, 64, 3\)"), VideoWriter(path, 8) as writer:
        writer.write(numbered(5))
        writer.write(numbered(5, 32, 32))
    with pytest.raises(ValueError, match="uint8"), VideoWriter(path, 8) as writer:
        writer.write(np.zeros((2, 8, 8, 3), np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fps"):
        VideoWriter(path, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, numbered(5), 8)
    with pytest.raises(RuntimeError), VideoWriter(path, 8) as writer:
        writer.write(numbered(9))
        raise RuntimeError("stop")
    assert probe(path).num_frames == 5


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no such file"), (b"", "."), (b"not a video", "."), (b"\0" * 5000, ".")],
)
def test_what_is_no_video_is_named_with_the_reason(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "x.mp4"
    if content is not None:
        path.write_bytes(content)
    for attempt in (lambda: probe(path), lambda: read_clip(path, 0, 1), lambda: next(iterate_frames(path))):
        with pytest.raises(VideoError, match=f"x.mp4: .*{reason}") as caught:
            attempt()
        assert caught.value.path == str(path) and caught.value.reason


def test_previews_play_back(tmp_path: Path) -> None:
    frames = numbered(9)
    data = encode_preview(frames, 12, height=96)
    (tmp_path / "p.webp").write_bytes(data)
    info = probe(tmp_path / "p.webp")
    assert (info.num_frames, info.height, info.width) == (9, 96, 128)
    assert info.fps == pytest.approx(12, rel=0.01)
    assert numbers(read_clip(tmp_path / "p.webp", 0, 9)) == list(range(9))
    with Image.open(io.BytesIO(data)) as image:
        assert image.info["loop"] == 0


def test_a_contact_sheet_has_a_row_per_clip_and_time_to_the_right() -> None:
    clips = [np.stack([np.full((8, 8, 3), 20 * t + 100 * row, np.uint8) for t in range(7)]) for row in (0, 1)]
    with Image.open(io.BytesIO(contact_sheet(clips, 3))) as image:
        sheet = np.asarray(image)
    assert sheet.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    cells = [[int(sheet[2 + 10 * y + 4, 2 + 10 * x + 4, 0]) for x in range(3)] for y in range(2)]
    assert cells == [[0, 60, 120], [100, 160, 220]]
    with Image.open(io.BytesIO(contact_sheet(clips, 30, height=16))) as image:
        assert image.size == (7 * 18 + 2, 2 * 18 + 2)
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], 4)


# Against PyAV's own sequential decoding of real and of hostile files.

UPRIGHT = {"decord_video_90.mov": -1, "decord_video_180.mov": 2, "decord_video_270.mov": 1}
UPRIGHT["moviepy_rotated_vfr_fire2.mp4"] = 2
NOT_VIDEOS = {
    "audio_only_no_video.mp4",
    "broken_symlink.mp4",
    "empty.mp4",
    "missing_header.mp4",
    "text_file.mp4",
    "torchcodec_audio_only.mp3",
    "truncated_moov_maybe.mp4",
}


def check_against_sequential_decoding(path: Path) -> None:
    info = probe(path)
    count = min(8, info.num_frames)
    stride = min(4, info.num_frames // count)
    picks = [range(start, start + count * stride, stride) for start in (0, info.num_frames - count * stride)]
    true_count, expected = reference_frames(path, {index for pick in picks for index in pick})
    assert info.num_frames == true_count
    for pick in picks:
        clip = read_clip(path, pick[0], count, stride)
        upright = [np.rot90(expected[index], UPRIGHT.get(path.name, 0)) for index in pick]
        np.testing.assert_array_equal(clip, np.stack(upright))
        assert (info.height, info.width) == clip.shape[1:3]
    with pytest.raises(VideoError):
        read_clip(path, true_count, 1)
    if info.variable_rate:
        assert sum(1 for _ in iterate_frames(path, at_fps=info.fps)) == true_count


def test_odd_files_are_read_right_or_refused_by_name(shared: Shared) -> None:
    files = sorted(path for path in shared("odd_clips").iterdir())
    refused = set()
    small = 60_000  # bytes; the bigger ones come with the slow tests
    for path in files:
        if path.name == "animated.webp":
            # PyAV can't read it; Pillow can.
            with Image.open(path) as image:
                assert probe(path).num_frames == image.n_frames == len(list(iterate_frames(path)))
            continue
        try:
            read_clip(path, 0, 1)
        except VideoError as error:
            assert str(path) in str(error) and error.reason
            refused.add(path.name)
            continue
        if path.stat().st_size < small:
            check_against_sequential_decoding(path)
    assert refused == NOT_VIDEOS & {path.name for path in files}


# What differs between versions of FFmpeg: how damage is concealed (so only the count is compared), and if
# its tool heeds unasked where a file says that its chroma lies, and that it is interlaced (so it is told).
CONCEALED = {"bitflips_archery.avi"}
TOLD = {
    "interlaced_mpeg2.mpg": "interl=-1",
    "torchcodec_h264_10bit.mp4": "in_h_chr_pos=0:in_v_chr_pos=128",
    "torchcodec_h265_10bit.mp4": "in_h_chr_pos=0:in_v_chr_pos=128",
}


def by_ffmpeg(path: Path) -> bytes:
    """The frames that ffmpeg's own tool decodes from a file, upright and RGB."""
    told = ["-vf", f"scale=flags=bicubic:{TOLD[path.name]},format=rgb24"] if path.name in TOLD else []
    command = ["ffmpeg", "-v", "quiet", "-nostdin", "-threads", "1", "-i", f"file:{path}", *told]
    command += ["-an", "-sn", "-dn", "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    return subprocess.run(command, capture_output=True).stdout


def check_against_ffmpeg(path: Path) -> None:
    expected = by_ffmpeg(path)
    num_bytes = 0
    for frame in iterate_frames(path):
        here = expected[num_bytes : num_bytes + frame.nbytes]
        assert len(here) == frame.nbytes and (path.name in CONCEALED or frame.tobytes() == here), path
        num_bytes += frame.nbytes
    assert num_bytes == len(expected), path


needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg isn't installed")


@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"g": "250", "bf": "3"}),
        ("b.mkv", "libx264", {"pix_fmt": "yuv444p", "bf": "2"}),
        ("c.avi", "mpeg4", {"bf": "2", "g": "300"}),
        ("d.webm", "libvpx-vp9", {"deadline": "realtime"}),
        ("e.mov", "mjpeg", {"pix_fmt": "yuvj422p"}),
        ("f.mpg", "mpeg2video", {"bf": "2"}),
        ("g.gif", "gif", {"pix_fmt": "rgb8"}),
        # Formats whose chroma is scaled with a filter.
        *(
            (f"{pix_fmt}.mkv", "ffv1", {"pix_fmt": pix_fmt})
            for pix_fmt in ("yuv420p10le", "yuv420p12le", "yuv420p16le", "yuv410p", "yuv411p", "yuv440p")
        ),
    ],
)
def test_frames_are_ffmpegs_own(tmp_path: Path, name: str, codec: str, options: dict[str, str]) -> None:
    path = tmp_path / name
    if codec == "mpeg2video":  # which knows no rate of 100
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25, options=dict(options))
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            for frame in moving(30):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
    else:
        write_raw(path, codec, moving(30), **options)
    check_against_ffmpeg(path)


@needs_ffmpeg
@pytest.mark.slow
def test_frames_of_real_and_odd_files_are_ffmpegs_own(shared: Shared) -> None:
    files = sorted(path for path in shared("clips").rglob("*") if path.is_file())
    files += [path for path in shared("odd_clips").iterdir() if path.name not in NOT_VIDEOS]
    for path in files:
        if path.suffix != ".webp":  # of which ffmpeg knows no animated ones
            check_against_ffmpeg(path)


def test_of_several_videos_in_a_file_the_largest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as container:
        streams = []
        for height, width in ((32, 48), (64, 96), (64, 96)):
            stream = container.add_stream("libx264", rate=25)
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.disposition = Disposition.default
            streams.append(stream)
        for stream, level in zip(streams, (50, 150, 250), strict=True):
            grey = np.full((stream.height, stream.width, 3), level, np.uint8)
            for _ in range(level // 50):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
            container.mux(stream.encode(None))
    info = probe(path)
    assert (info.num_frames, info.height, info.width) == (3, 64, 96)
    assert abs(read_clip(path, 0, 3).astype(int) - 150).max() < 5
    if shutil.which("ffmpeg"):
        check_against_ffmpeg(path)


def test_checksums_see_every_pixel_and_no_padding() -> None:
    draw = np.random.Generator(np.random.PCG64(0))
    # Bytes of a row of the last plane.
    rows = {
        "yuv420p": 15,
        "yuv420p10le": 30,
        "nv12": 30,
        "yuyv422": 60,
        "rgb24": 90,
        "bgra": 120,
        "rgb0": 120,
    }
    for pix_fmt, used in (rows | {"gray16le": 60, "ya8": 60}).items():
        frame = av.VideoFrame(30, 4, pix_fmt)  # rows that are padded
        for plane in frame.planes:
            plane.update(draw.integers(0, 256, plane.buffer_size, np.uint8).tobytes())
        digest = video._digest(frame)
        whole = frame.planes[-1]
        row = whole.line_size
        for byte, seen in ((used - 1, True), (row - 1, used == row)):
            levels = bytearray(memoryview(whole))
            levels[byte] ^= 1
            whole.update(bytes(levels))
            assert (video._digest(frame) != digest) == seen, (pix_fmt, byte)
            levels[byte] ^= 1
            whole.update(bytes(levels))
            assert video._digest(frame) == digest


def test_reading_does_not_gather_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.mp4"
    write_video(path, np.zeros((12, 720, 1280, 3), np.uint8), 25)

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    resize = Resize(16)
    for _ in range(3):
        read_clip(path, 0, 12, resize=resize)
    before = resident()
    for _ in range(12):
        read_clip(path, 0, 12, resize=resize)
    # One frame is 1.4 MB decoded and 2.8 MB as RGB; 144 went through.
    assert resident() - before < 25


@pytest.mark.parametrize("name", ["v_ApplyEyeMakeup_g01_c01.avi", "v_Archery_paddlevideo_example.avi"])
def test_genuine_ucf101_files(shared: Shared, name: str) -> None:
    path = shared(f"clips/ucf101/{name}")
    info = probe(path)
    assert (info.height, info.width, info.fps) == (240, 320, 25)
    assert info.num_frames == {"v_A": 164}.get(name[:3], 0) or info.num_frames == 131
    check_against_sequential_decoding(path)


@pytest.mark.slow
def test_all_real_and_odd_files(shared: Shared) -> None:
    files = sorted(path for path in shared("clips").rglob("*") if path.is_file())
    files += [path for path in shared("odd_clips").iterdir() if path.name not in NOT_VIDEOS]
    for path in files:
        if path.suffix == ".webp":
            continue
        check_against_sequential_decoding(path)


def test_variable_rate_of_a_real_file(shared: Shared) -> None:
    path = shared("odd_clips/variable_frame_rate.mp4")
    info = probe(path)
    assert info.variable_rate
    with av.open(str(path)) as container:
        stamps = [float(frame.time or 0) for frame in container.decode(video=0)]
    frames = list(iterate_frames(path))
    resampled = list(iterate_frames(path, at_fps=info.fps))
    for tick, frame in enumerate(resampled):
        moment = (tick + 0.5) / info.fps
        on_screen = max(k for k, stamp in enumerate(stamps) if stamp - stamps[0] <= moment)
        np.testing.assert_array_equal(frame, frames[on_screen])
    gaps = {round(b - a, 4) for a, b in pairwise(stamps)}
    assert len(gaps) > 1


def moving(num_frames: int) -> Frames:
    """A picture that turns into another, frame by frame, so that every frame is its own."""
    draw = np.random.Generator(np.random.PCG64(0))
    noise = draw.integers(0, 255, (48, 64, 3)).astype(np.float64)
    steps = np.linspace(0, 6 * np.pi, num_frames)[:, None, None, None]
    return (127.5 + 100 * np.sin(noise[None] / 40 + steps)).astype(np.uint8)


def test_clips_from_seek_points_are_those_from_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    write_video(path, moving(200), 25.0)
    points = probe(path).seek_points
    assert [index for index, _ in points] == list(range(24, 200, 24))
    for start, stride in ((0, 1), (23, 1), (24, 2), (60, 3), (150, 1), (192, 1)):
        sequential = read_clip(path, start, 8, stride)
        assert np.array_equal(read_clip(path, start, 8, stride, seek_points=points), sequential), start


def test_a_seek_point_spares_what_is_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.mp4"
    write_video(path, moving(200), 25.0)
    points = probe(path).seek_points
    decoded: list[int | None] = []
    plain = video._DecodedFrame

    def counted(frame: av.VideoFrame, *rest: Any) -> Any:
        decoded.append(frame.pts)
        return plain(frame, *rest)

    monkeypatch.setattr(video, "_DecodedFrame", counted)
    read_clip(path, 180, 4, seek_points=points)
    assert len(decoded) <= 24 + 4


@pytest.mark.parametrize("sought", [False, True])
def test_frames_far_apart_are_read_in_as_few_passes_as_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sought: bool
) -> None:
    path = tmp_path / "long.mp4"
    write_video(path, moving(200), 25.0)
    points = probe(path).seek_points if sought else ()
    _, truth = reference_frames(path, set(range(200)))
    decoded = 0
    plain = video._DecodedFrame

    def counted(*arguments: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return plain(*arguments)

    monkeypatch.setattr(video, "_DecodedFrame", counted)
    wanted = [3, 6, 9, 12, 19, 150, 153, 156, 159, 163, 180]
    frames = read_frames(path, wanted, seek_points=points)
    np.testing.assert_array_equal(frames, [truth[number] for number in wanted])
    # Without seek points all up to the last frame, once; with them 0 to 19 and from 144 on: seeking to key
    # frame 168 would save four frames and cost an opening.
    assert points == () or 168 in dict(points)
    assert decoded == (20 + 37 if sought else 181)
    with pytest.raises(VideoError, match="it has 200 frames, and frames 3 to 200 are asked for"):
        read_frames(path, [3, 197, 200], seek_points=points)
    for nonsense in ([], [3, 3], [4, 2], [-1, 0]):
        with pytest.raises(ValueError, match="frame numbers must increase"):
            read_frames(path, nonsense)


def test_single_frames_of_a_folder_or_by_time(tmp_path: Path) -> None:
    for t, frame in enumerate(numbered(12)):
        Image.fromarray(frame).save(tmp_path / f"frame{t}.png")
    assert numbers(read_frames(tmp_path, [0, 5, 7, 11])) == [0, 5, 7, 11]
    path = tmp_path / "variable.mkv"
    write_raw(path, "libx264", numbered(5), stamps=[0, 10, 20, 60, 70])
    assert numbers(read_frames(path, [0, 2, 3, 5], at_fps=10)) == [0, 2, 2, 2]


def test_key_frames_that_lie_are_no_seek_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that come out otherwise after a seek (open groups, wrong flags) are found by their pixels."""
    path = tmp_path / "long.mp4"
    write_video(path, moving(200), 25.0)
    sought: list[int | None] = []
    plain_decode, plain_digest = video._decode, video._digest

    def noted(path: Any, *, seek_to: int | None = None, damaged: Any = None) -> Any:
        sought.append(seek_to)
        return plain_decode(path, seek_to=seek_to, damaged=damaged)

    def wrong_after_a_seek(frame: av.VideoFrame) -> int:
        spoiled = sought[-1] is not None and frame.pts == third
        return plain_digest(frame) + spoiled

    third = probe(path).seek_points[2][1]
    monkeypatch.setattr(video, "_decode", noted)
    monkeypatch.setattr(video, "_digest", wrong_after_a_seek)
    # The point itself is unfit, and the one before it, whose part now runs through that frame.
    assert [index for index, _ in probe(path).seek_points] == [96, 120, 144, 168, 192]


def test_a_file_that_changed_behind_its_index_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    write_video(path, moving(200), 25.0)
    points = probe(path).seek_points
    write_video(path, moving(50), 25.0)
    with pytest.raises(VideoError, match=r"has it changed|frames are asked for"):
        read_clip(path, 180, 4, seek_points=points)


def test_real_files_give_the_same_frames_from_their_seek_points(shared: Callable[[str], Path]) -> None:
    draw = np.random.Generator(np.random.PCG64(1))
    sought = 0
    for path in sorted(shared("clips").glob("*/*"))[::4]:
        info = probe(path)
        for start in draw.integers(0, info.num_frames - 3, 2 if info.seek_points else 0).tolist():
            sought += start >= info.seek_points[0][0]
            plain = read_clip(path, start, 3)
            assert np.array_equal(read_clip(path, start, 3, seek_points=info.seek_points), plain), path
    assert sought > 0
