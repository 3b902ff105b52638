"""Good files with some of their bytes changed are read or refused by name, in bounded time and memory.

The mutations of a run are read in one process apart, under an alarm that ends it whatever it is at, and under
a limit of its memory; what it was at is told by the line that it wrote last.
"""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from src.data.video import MAX_PIXELS, VideoError, iterate_frames, probe, read_clip

ROOT = Path(__file__).parents[2]
SECONDS_EACH = 10
# Above what the process takes for itself, resident and as address space.
MEGABYTES = 400
ADDRESSES = 4000


def moving(num_frames: int) -> np.ndarray:
    """A picture that changes in every frame, 48x64."""
    y, x = np.mgrid[:48, :64]
    levels = [128 + 100 * np.sin((x + 3 * t) / 9) * np.cos((y - t) / 7) for t in range(num_frames)]
    return np.stack(levels).astype(np.uint8)[..., None].repeat(3, -1)


def write_sources(folder: Path) -> list[Path]:
    """Small good files of each kind, and a folder of images."""
    frames = moving(24)
    kinds = [
        ("a.mp4", "libx264", "yuv420p", {"g": "8", "bf": "2"}),
        ("b.avi", "mpeg4", "yuv420p", {"g": "12", "bf": "2"}),
        ("c.webm", "libvpx", "yuv420p", {"g": "8", "deadline": "realtime"}),
        ("d.mkv", "libx264", "yuv420p", {"g": "250", "bf": "3"}),
        ("e.gif", "gif", "rgb8", {}),
    ]
    for name, codec, pix_fmt, options in kinds:
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=25, options=options)
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width, stream.pix_fmt = 48, 64, pix_fmt
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(folder / "f.webp", save_all=True, append_images=pictures[1:], duration=40)
    images = folder / "g"
    images.mkdir()
    for t, picture in enumerate(pictures[:6]):
        picture.save(images / f"{t}.jpg")
    return [*(folder / name for name, *_ in kinds), folder / "f.webp", images]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change some bytes, anywhere or in the header; cut, insert, remove or blank some."""
    changed = bytearray(data)
    reach = len(changed) if rng.random() < 0.5 else min(1000, len(changed))
    at = rng.randrange(reach)
    length = rng.choice([1, 4, 60, 1500])
    match rng.choice(["flip", "flip", "bits", "cut", "insert", "remove", "zero", "ones"]):
        case "flip":
            for _ in range(rng.randrange(1, 30)):
                changed[rng.randrange(reach)] = rng.randrange(256)
        case "bits":
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(reach)] ^= 1 << rng.randrange(8)
        case "cut":
            del changed[at:]
        case "insert":
            changed[at:at] = rng.randbytes(length)
        case "remove":
            del changed[at : at + length]
        case "zero":
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        case "ones":
            changed[at : at + length] = b"\xff" * len(changed[at : at + length])
    return bytes(changed)


def write_mutation(source: Path, path: Path, rng: random.Random) -> None:
    """Write a changed copy; of a folder, one of its files is changed."""
    if source.is_dir():
        shutil.copytree(source, path)
        source = rng.choice(sorted(source.iterdir()))
        path = path / source.name
    path.write_bytes(mutate(source.read_bytes(), rng))


def outcome(path: Path) -> str:
    """Probe and read a file; "read" or "refused", or AssertionError if the ways of reading disagree."""
    try:
        info = probe(path)
    except VideoError as error:
        assert str(path) in str(error) and error.reason
        for attempt in (lambda: read_clip(path, 0, 1), lambda: next(iterate_frames(path))):
            # The first of several images may be read before the broken one.
            if not path.is_dir():
                with pytest.raises(VideoError):
                    attempt()
        return "refused"
    assert info.num_frames >= 1 and info.height * info.width <= MAX_PIXELS and info.fps > 0
    try:
        count = 0
        for frame in iterate_frames(path):
            assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
            count += 1
            last = frame
        assert count == info.num_frames
        np.testing.assert_array_equal(
            read_clip(path, count - 1, 1, seek_points=info.seek_points)[0], last, strict=True
        )
    except VideoError as error:
        assert path.is_dir(), error  # whose images are opened when they are wanted
        return "refused"
    with pytest.raises(VideoError):
        read_clip(path, count, 1, seek_points=info.seek_points)
    return "read"


def work(folder: Path, seed: int, count: int) -> None:
    """Read mutations in this process, with a line of JSON before and after each."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ADDRESSES * 10**6,) * 2)
    sources = [path for path in sorted(folder.iterdir()) if path.stem != "mutation"]
    for number in range(seed, seed + count):
        rng = random.Random(number)
        source = sources[number % len(sources)]
        path = folder / f"mutation{source.suffix}"
        write_mutation(source, path, rng)
        print(json.dumps({"begins": number}), flush=True)
        began = time.perf_counter()
        signal.alarm(SECONDS_EACH)
        result = outcome(path)
        signal.alarm(0)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        print(json.dumps({"ends": number, "outcome": result, "seconds": seconds, "peak": peak}), flush=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(("seed", "count"), [(0, 63), pytest.param(63, 500, marks=pytest.mark.slow)])
def test_changed_files_are_read_or_refused_in_time_and_memory(tmp_path: Path, seed: int, count: int) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    write_sources(tmp_path)
    command = [sys.executable, __file__, str(tmp_path), str(seed), str(count)]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.returncode, told[-1:], done.stderr[-3000:])
    ended = [line for line in told if "ends" in line]
    assert len(ended) == count
    assert ended[-1]["peak"] - ended[0]["peak"] < MEGABYTES
    outcomes = Counter(line["outcome"] for line in ended)
    assert min(outcomes["read"], outcomes["refused"]) > count // 10, outcomes


def test_frames_larger_than_any_camera_makes_are_refused(tmp_path: Path) -> None:
    *_, gif, webp, images = write_sources(tmp_path)
    size = MAX_PIXELS // 4096 + 1
    # A gif tells its canvas from byte 6 on; an animated WebP after VP8X, less one, in three bytes each.
    data = bytearray(gif.read_bytes())
    data[6:10] = size.to_bytes(2, "little") + (4096).to_bytes(2, "little")
    gif.write_bytes(data)
    data = bytearray(webp.read_bytes())
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (size - 1).to_bytes(3, "little") + (4095).to_bytes(3, "little")
    webp.write_bytes(data)
    for path in (gif, webp):
        with pytest.raises(VideoError, match=f"{MAX_PIXELS:,}"):
            probe(path)
    Image.new("1", (size, 4096)).save(images / "0a.png")
    with pytest.raises(VideoError, match=f"{MAX_PIXELS:,}"):
        read_clip(images, 1, 1)


@pytest.mark.parametrize(
    "content",
    [
        "ffconcat version 1.0\nfile a.mp4\n",
        "ffconcat version 1.0\nfile list.mp4\n",  # itself, until there are no more open files to be had
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n",
    ],
)
def test_a_file_that_lists_others_is_no_video(tmp_path: Path, content: str) -> None:
    write_sources(tmp_path)
    (tmp_path / "list.mp4").write_text(content)
    with pytest.raises(VideoError):
        probe(tmp_path / "list.mp4")


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
