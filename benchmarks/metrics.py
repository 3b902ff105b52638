"""Features and distances, ours beside others and beside their floor: `python -m benchmarks.metrics`.

Features: I3D logits of clips of 16 frames at 256x256, bytes in, resized to 224x224. "ours" is
`i3d_features`; "cd-fvd" is that package's I3D (the PyTorch port of pytorch-i3d) with its preprocessing, in
the better of batches of 1 and 2, and with our weights in it, so that the logits must agree. It is
looked for in the interpreter --others (an environment with `pip install cd-fvd` in it), and left out with a
line if it can't be imported. "floor" is what no implementation on the same library passes under: the bare
convolutions and matrix products of the network at their shapes, in the faster of two memory layouts each,
with nothing between them. Each way runs in a process of its own with --threads threads, and they take turns;
a time is the least of --repeats, since the cores may be shared.

Distances: of two sets of 2,048 features of 400 numbers whose variances fall as 1/k. "ours" is statistics of
both sides and the distance; beside it scipy's matrix square root, the whole kernel matrices in numpy, and
cd-fvd's distance. Numbers are compared, too.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NUM_FRAMES, SIZE = 16, 256
NUM_FEATURES, DIM = 2048, 400
EPS = 1e-5  # of the port's batch normalization


# ---- features: each way is given the clips `(n t h w 3)` and makes what is timed ----


def ours(clips: np.ndarray[Any, np.dtype[np.uint8]], folder: Path) -> dict[str, Callable[[], Tensor]]:
    """The function that `evaluate` calls."""
    from src.metrics.features import i3d_features
    from src.metrics.i3d_weights import load_i3d

    network = load_i3d()

    def features() -> Tensor:
        video = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        return i3d_features(network, video)

    return {"": features}


def cd_fvd(clips: np.ndarray[Any, np.dtype[np.uint8]], folder: Path) -> dict[str, Callable[[], Tensor]]:
    """The package's preprocessing and network."""
    from cdfvd.third_party.i3d.pytorch_i3d import InceptionI3d  # type: ignore[import-not-found]
    from cdfvd.third_party.i3d.utils import preprocess_i3d  # type: ignore[import-not-found]

    network = InceptionI3d(400, in_channels=3)
    network.load_state_dict(torch.load(folder / "port.pt", weights_only=True))
    network.eval()

    @torch.no_grad()
    def features(batch: int) -> Tensor:
        parts = [clips[i : i + batch] for i in range(0, len(clips), batch)]
        return torch.cat([network(preprocess_i3d(part)) for part in parts])

    return {f"batches of {batch}": partial(features, batch) for batch in (1, 2)}


def floor(clips: np.ndarray[Any, np.dtype[np.uint8]], folder: Path) -> dict[str, Callable[[], Tensor]]:
    """All convolutions and matrix products of the network, one after the other on inputs made before."""
    from src.metrics.i3d import I3d, SameConv3d, same_padding

    network = I3d()
    inputs: list[tuple[SameConv3d, Tensor]] = []
    for module in network.modules():
        if isinstance(module, SameConv3d):
            module.register_forward_pre_hook(lambda module, seen: inputs.append((module, seen[0].clone())))
    with torch.no_grad():
        network(torch.rand(2, 3, NUM_FRAMES, 224, 224) * 2 - 1)

    def product(module: SameConv3d, x: Tensor) -> Callable[[], Tensor]:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        if module.kernel_size == (1, 1, 1):
            rows, weight = x.permute(0, 2, 3, 4, 1).reshape(-1, x.shape[1]), module.weight.flatten(1)
            return lambda: F.linear(rows, weight)
        sizes = zip(x.shape[2:], module.kernel_size, module.stride, strict=True)
        pads = [same_padding(n, k, s) for n, k, s in sizes]
        if any(before != after for before, after in pads):
            x, pads = F.pad(x, [p for pad in reversed(pads) for p in pad]), [(0, 0)] * 3
        padding = [before for before, _ in pads]
        layouts: list[tuple[float, Callable[[], Tensor]]] = []
        for layout in (torch.channels_last_3d, torch.contiguous_format):
            laid, weight = x.contiguous(memory_format=layout), module.weight.contiguous(memory_format=layout)

            def convolve(laid: Tensor = laid, weight: Tensor = weight) -> Tensor:
                return F.conv3d(laid, weight, None, module.stride, padding)

            layouts.append((min(seconds(convolve) for _ in range(3)), convolve))
        return min(layouts, key=lambda timed: timed[0])[1]

    with torch.no_grad():
        products = [product(module, x) for module, x in inputs]

    @torch.no_grad()
    def all_products() -> Tensor:
        for _ in range(len(clips) // 2):
            for one in products:
                one()
        return torch.zeros(())

    return {"": all_products}


WAYS = {"ours": ours, "cd-fvd": cd_fvd, "floor": floor}


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def work(name: str, folder: Path) -> None:
    """A way's process: one line to begin with, then seconds per variant for every line that it is sent."""
    try:
        functions = WAYS[name](np.load(folder / "clips.npy"), folder)
    except ImportError as error:
        print(json.dumps({"missing": str(error).splitlines()[0]}), flush=True)
        return
    results = {variant: function() for variant, function in functions.items()}  # the first call warms up
    np.save(folder / f"{name}.npy", next(iter(results.values())).numpy())
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        told = {variant: seconds(function) for variant, function in functions.items()}
        print(json.dumps(told), flush=True)


class Way:
    """A way of taking features, in its own process."""

    def __init__(self, name: str, python: str, folder: Path, threads: int) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.metrics", "--worker", name, "--folder", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        self.told = self._answer()

    def time(self) -> dict[str, float]:
        """Seconds for all clips, by variant."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self._answer()
        if "missing" in answer:
            raise RuntimeError(f"{self.name}: {answer['missing']}")
        return answer

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


def port_state() -> dict[str, Tensor]:
    """Our weights under the names of pytorch-i3d, batch normalization doing nothing but adding the bias."""
    from src.metrics.i3d_weights import _flax_names, load_i3d

    branches = dict(plain="b0", wide_in="b1a", wide="b1b", narrow_in="b2a", narrow="b2b", pooled="b3b")
    state = load_i3d().state_dict()
    ported = {}
    for name, flax in _flax_names():
        block, _, branch = name.rpartition(".")
        theirs = f"{flax.partition('/')[0]}.{branches[branch]}" if block else flax
        bias = state[f"{name}.bias"]
        ported[f"{theirs}.conv3d.weight"] = state[f"{name}.weight"].contiguous()
        ported |= {f"{theirs}.bn.weight": torch.ones_like(bias), f"{theirs}.bn.bias": bias}
        ported[f"{theirs}.bn.running_mean"] = torch.zeros_like(bias)
        ported[f"{theirs}.bn.running_var"] = torch.full_like(bias, 1 - EPS)
        ported[f"{theirs}.bn.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    ported["logits.conv3d.weight"] = state["logits.weight"][:, :, None, None, None]
    return ported | {"logits.conv3d.bias": state["logits.bias"]}


def features(options: argparse.Namespace) -> dict[str, Any]:
    """Videos per second of every way, and how far the logits differ."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw = np.random.Generator(np.random.PCG64(0))
        coarse = draw.integers(0, 256, (options.clips, NUM_FRAMES, 16, 16, 3))
        np.save(folder / "clips.npy", coarse.repeat(SIZE // 16, 2).repeat(SIZE // 16, 3).astype(np.uint8))
        torch.save(port_state(), folder / "port.pt")
        ways = []
        for way_name in WAYS:
            python = options.others if way_name == "cd-fvd" else sys.executable
            way = Way(way_name, python, folder, options.threads)
            if "missing" in way.told:
                print(f"{way_name} is left out: {way.told['missing']}")
                continue
            ways.append(way)
        least: dict[str, dict[str, float]] = {way.name: {} for way in ways}
        for repeat in range(options.repeats):
            for way in ways if repeat % 2 == 0 else ways[::-1]:
                for variant, took in way.time().items():
                    least[way.name][variant] = min(least[way.name].get(variant, took), took)
        for way in ways:
            way.close()
            variant = min(least[way.name], key=least[way.name].__getitem__)
            results[way.name] = {"videos_per_second": round(options.clips / least[way.name][variant], 3)}
            if variant:
                results[way.name]["fastest"] = variant
        of_ours = np.load(folder / "ours.npy")
        if "cd-fvd" in results:
            off = np.abs(np.load(folder / "cd-fvd.npy") - of_ours).max() / np.abs(of_ours).max()
            assert off < 1e-4, f"logits differ by {off:.1e} of the largest"
            results["largest_difference_of_logits"] = float(f"{off:.1e}")
            results["ours_over_cd-fvd"] = rate_over(results, "ours", "cd-fvd")
        results["ours_over_floor"] = rate_over(results, "ours", "floor")
    return results


def rate_over(results: dict[str, Any], one: str, other: str) -> float:
    """Of two ways, by how much the first is faster."""
    return round(results[one]["videos_per_second"] / results[other]["videos_per_second"], 3)


# ---- distances ----


def distance_sets() -> tuple[Tensor, Tensor]:
    """Two sets of features that differ in deviation and mean."""
    generator = torch.Generator().manual_seed(0)
    deviations = torch.arange(1, DIM + 1, dtype=torch.float64) ** -0.5 * 5
    x, y = (torch.randn(NUM_FEATURES, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    return x * deviations, y * deviations * 1.1 + 0.1


def numpy_kernel(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    """The unbiased kernel distance from whole kernel matrices."""

    def kernel(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return (a @ b.T / DIM + 1) ** 3

    def within(a: np.ndarray[Any, Any]) -> float:
        values = kernel(a, a)
        return float((values.sum() - values.trace()) / (len(a) * (len(a) - 1)))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())


def work_distances() -> None:
    """cd-fvd's process: its distance, and the least seconds for it."""
    from src.metrics.reconstruction import declare_torchvision_operators

    declare_torchvision_operators()  # which cd-fvd's other network needs, and some installations lack
    try:
        from cdfvd.fvd import cdfvd  # type: ignore[import-not-found]
        from cdfvd.utils.metric_utils import FeatureStats  # type: ignore[import-not-found]
    except ImportError as error:
        print(json.dumps({"missing": str(error).splitlines()[0]}))
        return
    x, y = distance_sets()

    def frechet() -> float:
        stats = [FeatureStats(capture_mean_cov=True) for _ in range(2)]
        for one, side in zip(stats, (x, y), strict=True):
            one.append_torch(side, num_gpus=1, rank=0)
        return float(cdfvd.compute_fvd_from_stats(None, stats[1], stats[0]))

    value = frechet()
    print(json.dumps({"seconds": min(seconds(frechet) for _ in range(3)), "value": value}))


def distances(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every distance, least of three."""
    import scipy.linalg

    from src.metrics.frechet import Arithmetic, GaussianStatistics, frechet_distance
    from src.metrics.kernel import kernel_distance, kernel_distance_subsets, resampled_kernel_distances
    from src.metrics.uncertainty import bootstrap

    torch.set_num_threads(options.threads)
    x, y = distance_sets()
    array_x, array_y = x.numpy(), y.numpy()

    def frechet(arithmetic: Arithmetic) -> float:
        return frechet_distance(
            GaussianStatistics(DIM).update(x), GaussianStatistics(DIM).update(y), arithmetic
        )

    def scipy_frechet() -> float:
        cov_x, cov_y = np.cov(array_x, rowvar=False), np.cov(array_y, rowvar=False)
        root = scipy.linalg.sqrtm(cov_x @ cov_y).real
        return float(
            ((array_x.mean(0) - array_y.mean(0)) ** 2).sum()
            + (cov_x.trace() + cov_y.trace() - 2 * root.trace())
        )

    timed: dict[str, tuple[Callable[[], float], int]] = {
        "ours, Fréchet": (lambda: frechet("float64"), 3),
        "ours, Fréchet by the float32 rule": (lambda: frechet("float32_svd"), 3),
        "scipy's square root, Fréchet": (scipy_frechet, 3),
        "ours, kernel": (lambda: kernel_distance(x, y), 3),
        "numpy, kernel": (lambda: numpy_kernel(array_x, array_y), 3),
        "ours, kernel over 100 subsets of 1,000": (lambda: kernel_distance_subsets(x, y, seed=0).mean, 2),
        "ours, Fréchet, bootstrap of 100": (lambda: bootstrap(x, y, num_replicates=100, seed=0).estimate, 1),
        "ours, kernel, bootstrap of 100": (
            lambda: bootstrap(x, y, resampled_kernel_distances, num_replicates=100, seed=0).estimate,
            1,
        ),
    }
    rows = {}
    for name, (function, repeats) in timed.items():
        value = function()
        least = min(seconds(function) for _ in range(repeats))
        rows[name] = {"seconds": round(least, 3), "value": float(f"{value:.8g}")}
    told = subprocess.run(
        [options.others, "-m", "benchmarks.metrics", "--worker", "distances", "--folder", "."],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
        check=False,
    )
    answer: dict[str, Any] = (
        json.loads(told.stdout.splitlines()[-1]) if told.stdout else {"missing": told.stderr[-200:]}
    )
    if "missing" in answer:
        print(f"cd-fvd's distance is left out: {answer['missing']}")
    else:
        rows["cd-fvd, Fréchet"] = {
            "seconds": round(answer["seconds"], 3),
            "value": float(f"{answer['value']:.8g}"),
        }
        # Its covariances are divided by n, its features float32.
        check(rows, "cd-fvd, Fréchet", "ours, Fréchet", 1e-3)
    check(rows, "scipy's square root, Fréchet", "ours, Fréchet", 1e-6)
    check(rows, "numpy, kernel", "ours, kernel", 1e-6)
    return rows


def check(rows: dict[str, dict[str, float]], one: str, other: str, tolerance: float) -> None:
    """Two values must be equal, relative to the second."""
    off = abs(rows[one]["value"] / rows[other]["value"] - 1)
    assert off < tolerance, f"{one} and {other} differ by {off:.1e}"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", type=int, default=2, help="an even number")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--others", default=sys.executable, help="interpreter that has cd-fvd")
    parser.add_argument("--output", type=Path, help="JSON file, for example benchmarks/results/metrics.json")
    parser.add_argument("--worker", choices=[*WAYS, "distances"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "distances":
        work_distances()
        return
    if options.worker:
        work(options.worker, options.folder)
        return
    if options.clips < 2 or options.clips % 2:
        parser.error(f"--clips must be even, got {options.clips}: our network takes two at a time")
    of_features = features(options)
    for name, told in of_features.items():
        print(f"{name:40} {told}", flush=True)
    of_distances = distances(options)
    for name, told in of_distances.items():
        print(f"{name:40} {told}", flush=True)
    if options.output is not None:
        others = "" if options.others == sys.executable else " --others PYTHON"
        record = {
            "command": f"python -m benchmarks.metrics --repeats {options.repeats}{others}",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": {
                "cpu": cpu(),
                "cores": os.cpu_count(),
                "torch": torch.__version__,
                "load_average": [round(load, 2) for load in os.getloadavg()],
            },
            "options": {"clips": options.clips, "repeats": options.repeats, "threads": options.threads},
            "features": of_features,
            "distances": of_distances,
        }
        options.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


if __name__ == "__main__":
    main()
