"""Random clips out of a long video, from the beginning and from seek points: `python -m benchmarks.seeking`.

The video is rendered and encoded first (H.264, a key frame every --interval frames). Both ways read the same
clips of 16 frames at the same places, in turn; the frames are equal, or the benchmark fails. Probing is also
timed, with the verification of the seek points and without.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import av
import numpy as np

from src.data import video
from src.data.video import VideoWriter, probe, read_clip


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--frames", type=int, default=3000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--interval", type=int, default=250, help="between key frames; x264's default is 250")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--output", type=Path, help="JSON file, for example benchmarks/results/seeking.json")
    options = parser.parse_args()
    draw = np.random.Generator(np.random.PCG64(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.mp4"
        noise = draw.integers(0, 255, (options.size, options.size, 3))
        with VideoWriter(path, 25.0, keyframe_interval=options.interval) as writer:
            for shift in range(options.frames):
                writer.write(np.roll(noise, (shift, 2 * shift), (0, 1))[None].astype(np.uint8) // 4 * 4)
        began = time.perf_counter()
        info = probe(path)
        verified = time.perf_counter() - began
        began = time.perf_counter()
        counted = sum(1 for _ in video._decode(path))
        plain = time.perf_counter() - began
        assert counted == info.num_frames
        seconds: dict[str, list[float]] = {"from the beginning": [], "from seek points": []}
        for start in draw.integers(0, options.frames - 16, options.clips).tolist():
            clips = []
            for way, points in (("from the beginning", ()), ("from seek points", info.seek_points)):
                began = time.perf_counter()
                clips.append(read_clip(path, start, 16, seek_points=points))
                seconds[way].append(time.perf_counter() - began)
            from_beginning, from_points = clips
            assert np.array_equal(from_beginning, from_points), start
    record = {
        "command": "python -m benchmarks.seeking",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "av": av.__version__,
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "clips_per_second": {way: round(1 / statistics.mean(of), 2) for way, of in seconds.items()},
        "ratio": round(
            statistics.mean(seconds["from the beginning"]) / statistics.mean(seconds["from seek points"]), 2
        ),
        "probing_seconds": {"decoding alone": round(plain, 2), "with verification": round(verified, 2)},
    }
    print(json.dumps(record, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
