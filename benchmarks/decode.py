"""Random clips of 16 frames, our reader beside the naive way of others: `python -m benchmarks.decode`.

Three kinds of file: 320x240 XviD in AVI (the genuine UCF-101 files under $SHARED_DIR/clips/ucf101, or one
made by PyAV's mpeg4 encoder where they are absent), and 256x256 H.264 with a key frame every 250 and every
16 frames, made here. Each way runs in a process of its own with one thread, and they take turns: the same
clips, from the same seeds, four to a job. A job's time is the least of --repeats, since the cores may be
shared. Every clip is compared with ours.

The ways: "ours" opens the file for each clip and starts from seek points; "ours, four at once" reads the
four clips of a job by one opening; "pyav" decodes from the beginning; "decord" and "torchcodec" open the
file and ask for the frames by number, as their manuals show it. These two are looked for in the interpreter
--others (an environment with `pip install decord2 torchcodec` in it), and left out with a line if they
can't be imported.

Delivered frames are those of the clips. Decoded ones are counted in ours and PyAV's; the others don't tell,
and stand with the least there could be: from the key frame before the clip to its end.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

NUM_FRAMES = 16
CLIPS_PER_JOB = 4
# Levels of 255 on average: conversions to RGB differ by less, other frames by more.
UNLIKE = 3.0

Clips = list[np.ndarray[Any, np.dtype[np.uint8]]]
Points = list[tuple[int, int]]
# Of a file, the clips that begin at these frames, at this stride, by its seek points; and how many frames
# were decoded for them, where that can be known.
Reader = Callable[[str, list[int], int, Points], tuple[Clips, int | None]]


def ours(path: str, starts: list[int], stride: int, points: Points) -> tuple[Clips, int | None]:
    """One opening for each clip."""
    from src.data.video import read_clip

    return [read_clip(path, start, NUM_FRAMES, stride, seek_points=points) for start in starts], None


def ours_at_once(path: str, starts: list[int], stride: int, points: Points) -> tuple[Clips, int | None]:
    """One opening for all clips."""
    from src.data.video import read_frames

    rows = [range(start, start + NUM_FRAMES * stride, stride) for start in starts]
    wanted = sorted({number for row in rows for number in row})
    place = {number: index for index, number in enumerate(wanted)}
    frames = read_frames(path, wanted, seek_points=points)
    return [frames[[place[number] for number in row]] for row in rows], None


def pyav(path: str, starts: list[int], stride: int, points: Points) -> tuple[Clips, int | None]:
    """Decoding from the beginning, and converting what is wanted."""
    import av

    clips: Clips = []
    decoded = 0
    for start in starts:
        wanted = set(range(start, start + NUM_FRAMES * stride, stride))
        frames: list[Any] = []
        with av.open(path) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for index, frame in enumerate(container.decode(video=0)):
                decoded += 1
                if index in wanted:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == NUM_FRAMES:
                    break
        clips.append(np.stack(frames))
    return clips, decoded


def decord(path: str, starts: list[int], stride: int, points: Points) -> tuple[Clips, int | None]:
    """A reader per clip."""
    from decord import VideoReader, cpu  # type: ignore[import-not-found]

    clips = []
    for start in starts:
        reader = VideoReader(path, ctx=cpu(0), num_threads=1)
        clips.append(reader.get_batch(list(range(start, start + NUM_FRAMES * stride, stride))).asnumpy())
    return clips, None


def torchcodec(path: str, starts: list[int], stride: int, points: Points) -> tuple[Clips, int | None]:
    """A decoder per clip, in its default mode, which scans the file first so as to be exact."""
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

    clips = []
    for start in starts:
        decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
        clips.append(
            decoder.get_frames_at(list(range(start, start + NUM_FRAMES * stride, stride))).data.numpy()
        )
    return clips, None


READERS: dict[str, tuple[Reader, str | None]] = {
    "ours": (ours, None),
    "ours, four at once": (ours_at_once, None),
    "pyav": (pyav, "av"),
    "decord": (decord, "decord"),
    "torchcodec": (torchcodec, "torchcodec"),
}


def work(name: str) -> None:
    """A way's process: tells its version, then reads what it is asked for, line by line."""
    reader, module = READERS[name]
    if module is None:
        version = "here"
    else:
        try:
            version = __import__(module).__version__
            if module == "torchcodec":
                import torchcodec.decoders  # type: ignore[import-not-found]  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            print(json.dumps({"missing": str(error).strip().splitlines()[0]}), flush=True)
            return
    print(json.dumps({"version": version}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        began = time.perf_counter()
        try:
            clips, decoded = reader(job["path"], job["starts"], job["stride"], job["points"])
        except Exception as error:  # whatever another library raises is its result
            print(json.dumps({"failed": f"{type(error).__name__}: {error}"[:200]}), flush=True)
            continue
        seconds = time.perf_counter() - began
        if job["keep"]:
            np.save(job["keep"], np.stack(clips))
        print(json.dumps({"seconds": seconds, "decoded": decoded}), flush=True)


class Way:
    """A way of reading clips, in its own process."""

    def __init__(self, name: str, python: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.decode", "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.told = self._answer()

    def read(self, **job: Any) -> dict[str, Any]:
        """Have a job's clips read: {"seconds", "decoded"} or {"failed"}."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            return {"missing": f"its process ended with {self.process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class Video:
    """A file to read from, and what is known of it."""

    path: str
    num_frames: int
    points: tuple[tuple[int, int], ...]
    key_frames: list[int]


def known(path: Path) -> Video:
    """Probe a file and number its key frames; of a single one that is 0, for stamps may lie."""
    import av

    from src.data.video import probe

    info = probe(path)
    with av.open(str(path)) as container:
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    stamps = [pts for pts, _ in packets if pts is not None]
    keys = [pts for pts, is_key in packets if is_key and pts is not None]
    numbers = [sum(pts < key for pts in stamps) for key in keys] if len(keys) > 1 else [0]
    return Video(str(path), info.num_frames, info.seek_points, numbers)


def scene(num_frames: int, height: int, width: int) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Soft shapes that move before a grainy background that drifts: about as hard to code as a real video."""
    draw = np.random.Generator(np.random.PCG64(0))
    y, x = np.mgrid[:height, :width]
    background = np.kron(draw.integers(60, 160, (height // 8, width // 8, 3)), np.ones((8, 8, 1)))
    grain = draw.normal(0, 4, (height, width, 3))
    for t in range(num_frames):
        frame = np.roll(background, t // 3, 1) + np.roll(grain, 7 * t, 0)
        for k in range(4):
            cy, cx = height * (0.5 + 0.4 * np.sin(t / 17 + k)), width * (0.5 + 0.4 * np.cos(t / 23 + 2 * k))
            frame[..., k % 3] += 90 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * (10 + 6 * k) ** 2))
        yield np.clip(frame, 0, 255).astype(np.uint8)


def make_files(folder: Path, shared: Path) -> dict[str, list[Video]]:
    """The kinds of file, by name."""
    import av
    from PIL import Image

    from src.data.video import VideoWriter, iterate_frames

    genuine = sorted((shared / "clips" / "ucf101").glob("*.avi"))
    if genuine:
        kinds = {"xvid avi 320x240 (UCF-101)": [known(path) for path in genuine]}
        some = [frame for path in genuine for frame in iterate_frames(path)]
        source = [np.asarray(Image.fromarray(frame).resize((256, 256))) for frame in some]
        source = (source + source[::-1])[:500]
    else:
        path = folder / "made.avi"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=25, options={"bf": "2", "g": "300"})
            stream.codec_context.codec_tag = "XVID"
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            stream.bit_rate = 500_000
            for frame in scene(180, 240, 320):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        kinds = {"mpeg4 avi 320x240 (made)": [known(path)]}
        source = list(scene(500, 256, 256))
    for interval in (250, 16):
        path = folder / f"{interval}.mp4"
        with VideoWriter(path, 25.0, crf=23, keyframe_interval=interval) as writer:
            for frame in source:
                writer.write(frame[None])
        kinds[f"h264 256x256, key frame every {interval}"] = [known(path)]
    return kinds


def least_decoded(video: Video, start: int, stride: int) -> int:
    """Frames from the key frame before a clip to the clip's end."""
    key = video.key_frames[bisect_right(video.key_frames, start) - 1]
    return start + (NUM_FRAMES - 1) * stride + 1 - key


def decoded_by_ours(video: Video, starts: list[int], stride: int, at_once: bool) -> int:
    """Frames that come out of our decoder for these clips; counted in it, away from the clock."""
    from src.data import video as module

    count = 0
    plain = module._DecodedFrame

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return plain(*arguments)

    with mock.patch.object(module, "_DecodedFrame", counted):
        (ours_at_once if at_once else ours)(video.path, starts, stride, list(video.points))
    return count


def measure(
    ways: list[Way], videos: list[Video], stride: int, num_jobs: int, repeats: int, folder: Path
) -> dict[str, dict[str, float | str | None]]:
    """Have all ways read the same clips in turn: rates for each way."""
    draw = np.random.Generator(np.random.PCG64(stride))
    span = (NUM_FRAMES - 1) * stride + 1
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    decoded = dict.fromkeys(seconds, 0)
    unlike = dict.fromkeys(seconds, 0)
    failed: dict[str, str] = {}
    for number in range(num_jobs):
        video = videos[number % len(videos)]
        starts = draw.integers(0, video.num_frames - span + 1, CLIPS_PER_JOB).tolist()
        truth = None
        best = dict.fromkeys(seconds, float("inf"))
        for repeat in range(repeats):
            for way in ways if repeat % 2 == 0 else ways[::-1]:
                keep = str(folder / f"{ways.index(way)}.npy") if repeat == 0 else None
                told = way.read(path=video.path, starts=starts, stride=stride, points=video.points, keep=keep)
                if "seconds" not in told:
                    failed[way.name] = told.get("failed") or told["missing"]
                    continue
                best[way.name] = min(best[way.name], told["seconds"])
                if keep is None:
                    continue
                clips = np.load(keep).astype(int)
                truth = clips if truth is None else truth
                gap = np.abs(clips - truth).mean((2, 3, 4)).max(1)
                unlike[way.name] += int((gap > UNLIKE).sum())
                if way.name == "pyav" or way.name.startswith("ours"):
                    assert np.array_equal(clips, truth), (way.name, video.path, starts)
                if way.name.startswith("ours"):
                    decoded[way.name] += decoded_by_ours(video, starts, stride, "at once" in way.name)
                elif told["decoded"] is not None:
                    decoded[way.name] += told["decoded"]
                else:
                    decoded[way.name] += sum(least_decoded(video, start, stride) for start in starts)
        for name, least in best.items():
            seconds[name].append(least)
    rates: dict[str, dict[str, float | str | None]] = {}
    for name, of in seconds.items():
        if name in failed:
            rates[name] = {"failed": failed[name]}
            continue
        mean = statistics.mean(of)
        rates[name] = {
            "clips_per_second": round(CLIPS_PER_JOB / mean, 1),
            "delivered_frames_per_second": round(CLIPS_PER_JOB * NUM_FRAMES / mean),
            "decoded_frames_per_second": round(decoded[name] / sum(of)),
            "share_of_clips_with_other_frames": round(unlike[name] / (CLIPS_PER_JOB * num_jobs), 3),
        }
    return rates


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=12, help="of four clips each, for every kind and stride")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--others", default=sys.executable, help="interpreter that has decord2, torchcodec")
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("SHARED_DIR", "../shared")))
    parser.add_argument("--output", type=Path, help="JSON file, for example benchmarks/results/decode.json")
    parser.add_argument("--worker", choices=list(READERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    ways = []
    versions = {}
    for name in READERS:
        way = Way(name, options.others if name in ("decord", "torchcodec") else sys.executable)
        if "missing" in way.told:
            print(f"{name} is left out: {way.told['missing']}")
            continue
        ways.append(way)
        versions[name] = way.told["version"]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, videos in make_files(Path(folder), options.shared).items():
            for stride in (1, 4):
                rates = measure(ways, videos, stride, options.jobs, options.repeats, Path(folder))
                print(f"\n{kind}, 16 frames at stride {stride}")
                for name, rate in rates.items():
                    if "failed" in rate:
                        print(f"  {name:20} {rate['failed']}")
                        continue
                    print(
                        f"  {name:20} {rate['clips_per_second']:7.1f} clips/s  delivered "
                        f"{rate['delivered_frames_per_second']:6,d}  decoded "
                        f"{rate['decoded_frames_per_second']:6,d} frames/s  other frames in "
                        f"{rate['share_of_clips_with_other_frames']:.0%} of clips"
                    )
                results[f"{kind}, stride {stride}"] = rates
    for way in ways:
        way.close()
    record = {
        "command": "python -m benchmarks.decode --others PYTHON",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version for name, version in versions.items() if version != "here"},
        "options": {"jobs": options.jobs, "repeats": options.repeats},
        "results": results,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
