"""A protocol as it is followed: which clips stand for each side; numbers against plain NumPy and SciPy."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from src.config import build
from src.data.arrays import ArrayVideos
from src.data.choice import order_of_videos
from src.data.clips import ClipDataset
from src.evaluation.comparing import Following, chosen_clips, clips_along, distances, floor_of_halves
from src.evaluation.measuring import ClipSet, Measuring
from src.metrics.protocol import Protocol
from src.metrics.uncertainty import extrapolated_floor
from src.training.share import Share
from tests.composing import composed
from tests.unit.test_measuring import MeanColour

NUM_VIDEOS = 30


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ClipDataset:
    return made_of(tmp_path_factory.mktemp("synthetic"), num_frames=4)


def made_of(folder: Path, num_frames: int) -> ClipDataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENT_VIDEO_CACHE", str(folder / "cache"))
        node = composed(
            "evaluate", "dataset=synthetic_tiny", "model=x", f"dataset.root={folder}/data",
            f"dataset.num_videos={NUM_VIDEOS}", "dataset.num_test_videos=2",
            f"dataset.num_frames={num_frames}",
            "dataset.frame_stride=1", "dataset.resolution=16", "dataset.cache=null",
        ).dataset  # fmt: skip
        return build(node, split="train", seed=0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(tmp_path))
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def protocol(**changes: object) -> Protocol:
    few = replace(
        build(composed("evaluate", "protocol=quick", "model=x").protocol), num_real=8, num_generated=6
    )
    return replace(few, **changes)  # type: ignore[arg-type]


def noise(seed: int, count: int) -> ClipSet:
    def frames(numbers: list[int]) -> Tensor:
        draws = [torch.Generator().manual_seed(1000 * seed + number) for number in numbers]
        return torch.stack(
            [torch.randint(0, 256, (4, 16, 16, 3), generator=g, dtype=torch.uint8) for g in draws]
        )

    return ClipSet("generated", count, frames, {"set": "noise", "seed": seed})


def following(dataset: ClipDataset, rules: Protocol, available: int | None = None) -> Following:
    measuring = Measuring(Share(), 4, torch.device("cpu"))
    return Following(
        rules, measuring, MeanColour(), dataset, dataset.fingerprint, noise, available  # type: ignore[arg-type]
    )  # fmt: skip


def colours(frames: Tensor) -> np.ndarray:
    """The extractor's features, by NumPy."""
    return (frames.numpy().astype(np.float64) / 127.5 - 1).mean((1, 2, 3))


def numpy_frechet(a: np.ndarray, b: np.ndarray, ddof: int = 1) -> float:
    covariances = [np.cov(side, rowvar=False, ddof=ddof) for side in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root.real))


def numpy_kernel(a: np.ndarray, b: np.ndarray) -> float:
    def mean(x: np.ndarray, y: np.ndarray, same: bool) -> float:
        pairs = [
            (float(x[i] @ y[j]) / 3 + 1) ** 3
            for i in range(len(x))
            for j in range(len(y))
            if not (same and i == j)
        ]
        return math.fsum(pairs) / len(pairs)

    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


def test_each_seed_takes_clips_of_its_own_and_numbers_are_numpys(dataset):
    followed = following(dataset, protocol(seeds=(0, 3)))
    result = followed.result(num_replicates=20)
    frechet, kernel = [], []
    for seed in (0, 3):
        items = followed.real_items(seed)
        real = torch.stack([dataset.clip(item, "random", seed)["frames"] for item in items])
        generated = noise(seed, 6).frames(list(range(6)))
        frechet.append(numpy_frechet(colours(real), colours(generated)))
        kernel.append(numpy_kernel(colours(real), colours(generated)))
    assert followed.real_items(0) != followed.real_items(3) and len(set(followed.real_items(0))) == 8
    names = [followed.comparison.name(metric) for metric in ("frechet_distance", "kernel_distance")]
    assert names == ["fvd_fast@8vs6", "kvd_fast@8vs6"]
    for name, values in zip(names, (frechet, kernel), strict=True):
        told = result.uncertainty[name]
        assert result.metrics[name] == pytest.approx(np.mean(values), rel=1e-5)
        assert told["deviation_over_seeds"] == pytest.approx(np.std(values, ddof=1), rel=1e-4)
        assert list(told["by_seed"].values()) == pytest.approx(values, rel=1e-5)
        low, high = told["bootstrap"]["interval_95"]
        assert low < values[0] < high


def test_the_floor_is_that_of_other_real_videos(dataset):
    followed = following(dataset, protocol())
    told = followed.result(0).uncertainty["fvd_fast@8vs6"]
    mine, others = followed.floor_items()
    assert mine == followed.real_items(0) and len(others) == 6 and not set(mine) & set(others)
    sides = [
        colours(torch.stack([dataset.clip(item, "random", 0)["frames"] for item in items]))
        for items in (mine, others)
    ]
    assert told["floor"] == pytest.approx(numpy_frechet(*sides), rel=1e-5)
    assert told["floor_measured_on"] == [8, 6] and "bootstrap" not in told


@pytest.mark.parametrize("how", ["sorted", "balanced"])
def test_the_floor_beside_a_choice_that_isnt_random_is_between_parts_of_the_whole_split(dataset, how):
    """The next in sorted order are of the next classes: against them even real videos are far."""
    followed = following(dataset, protocol(real_videos=how))
    told = followed.result(0).uncertainty["fvd_fast@8vs6"]
    order = order_of_videos([-1] * NUM_VIDEOS, "shuffled", 0)
    assert followed.floor_items() == [order[:8], order[8:14]]
    sides = [
        colours(torch.stack([dataset.clip(item, "random", 0)["frames"] for item in items]))
        for items in (order[:8], order[8:14])
    ]
    assert told["floor"] == pytest.approx(numpy_frechet(*sides), rel=1e-5)
    assert told["floor_measured_on"] == [8, 6]
    assert told["floor_measured_between"] == "random parts of the whole split"
    assert any("real against real is measured between random parts" in note for note in followed.notes)


def test_fewer_than_four_videos_have_distances_but_no_floor(dataset, tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (3, 8, 16, 16, 3), np.uint8)
    np.save(tmp_path / "long.npy", video)
    long = ArrayVideos(
        [[tmp_path / "long.npy"]], num_frames=4, frame_stride=1, resolution=(16, 16), crop="squash"
    )
    followed = following(dataset, protocol(), available=3)
    assert "floor" not in followed.result(0).uncertainty["fvd_fast@8vs3"]
    curve = followed.drift(long, long.fingerprint, 2).distances["fvd_fast@8vs3"]
    assert len(curve.values) == 2 and curve.floor is None
    assert sum("needs 4 on both sides" in note for note in followed.notes) == 1


def test_without_other_videos_parts_stand_in_and_their_law_goes_on(dataset):
    followed = following(dataset, protocol(num_real=28))
    assert followed.floor_items() == []
    told = followed.result(0).uncertainty["fvd_fast@28vs6"]
    real = colours(torch.stack([dataset.clip(i, "random", 0)["frames"] for i in followed.real_items(0)]))
    by_size = []
    for size in (7, 14):
        draw, parts = torch.Generator().manual_seed(0), []
        for _ in range(8):
            order = torch.randperm(28, generator=draw).numpy()
            parts.append(numpy_frechet(real[order[:size]], real[order[size : 2 * size]]))
        by_size.append((size, float(np.mean(parts))))
    assert told["floor_measured_on"] == [14, 14]
    assert told["floor"] == pytest.approx(extrapolated_floor(by_size, (28, 6)), rel=1e-4)


def test_fewer_videos_than_the_protocol_wants_are_told(dataset):
    followed = following(dataset, protocol(num_real=64, num_generated=64), available=5)
    assert (followed.num_real, followed.num_generated) == (NUM_VIDEOS, 5)
    assert followed.notes == [
        f"only {NUM_VIDEOS} real videos, fewer than the protocol's 64",
        "only 5 videos given, fewer than the protocol's 64",
    ]
    assert followed.real_items(0) == list(range(NUM_VIDEOS)), "all of them, in their own order"
    everything = following(dataset, protocol(num_real=None))
    assert everything.num_real == NUM_VIDEOS and everything.notes == []


def test_a_side_that_isnt_resampled_is_that_of_the_first_seed(dataset):
    fixed = following(dataset, protocol(seeds=(2, 5), resample_real=False, resample_generated=False))
    values = list(fixed.result(0).uncertainty["fvd_fast@8vs6"]["by_seed"].values())
    assert values[0] == values[1]
    half = following(dataset, protocol(seeds=(2, 5), resample_generated=False))
    values = list(half.result(0).uncertainty["fvd_fast@8vs6"]["by_seed"].values())
    assert values[0] != values[1]
    assert torch.equal(half.generated_rows(2)["features"], half.generated_rows(5)["features"])


def test_the_deviation_over_seeds_says_which_sides_were_resampled(dataset):
    rules = protocol(seeds=(0, 3))
    name = "fvd_fast@8vs6"
    for available, generated in ((None, True), (7, True), (6, False)):
        followed = following(dataset, rules, available)
        told = followed.result(0).uncertainty[name]["resampled"]
        assert told == {"real": True, "generated": generated}
        said = [note for note in followed.notes if "all 6 given videos are used with every seed" in note]
        assert bool(said) is not generated
    fixed = following(dataset, protocol(seeds=(0, 3), real_videos="sorted", real_clip="first"))
    assert fixed.resampled == {"real": False, "generated": True}
    assert len(set(fixed.result(0).uncertainty[name]["by_seed"].values())) == 2


def test_sorted_videos_are_in_pythons_order_of_their_paths(dataset, monkeypatch):
    names = [f"class {i % 3}/{i}.mp4" for i in range(NUM_VIDEOS)]
    monkeypatch.setattr(type(dataset), "names", names)
    followed = following(dataset, protocol(real_videos="sorted"))
    assert [names[item] for item in followed.real_items(0)] == sorted(names)[:8]


@pytest.mark.parametrize(("where", "start"), [("first", 0), ("middle", None)])
def test_the_clip_of_a_video_is_the_one_that_the_protocol_names(dataset, where, start):
    followed = following(dataset, protocol(real_clip=where, real_videos="sorted"))
    item = followed.real_items(0)[3]
    start = (dataset.entries[item].num_frames - 4) // 2 if start is None else start
    expected = dataset.clip(item, start)["frames"]
    clips = chosen_clips(dataset, followed.real_items(0), where, 0, "real", "")
    assert torch.equal(clips.frames([3])[0], expected)
    assert torch.equal(followed.real_rows(0)["shown"][3], expected)


def test_arithmetic_and_covariance_are_the_protocols(dataset):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(12, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    plain, biased, single = (
        distances(a, b, protocol(**change))["frechet_distance"]
        for change in ({}, {"biased_covariance": True}, {"arithmetic": "float32_svd"})
    )
    assert plain == pytest.approx(numpy_frechet(a.numpy(), b.numpy()), rel=1e-9)
    assert biased == pytest.approx(numpy_frechet(a.numpy(), b.numpy(), ddof=0), rel=1e-9)
    assert single == pytest.approx(plain, rel=1e-4) and single != plain


def test_vectors_of_single_frames_are_taken_together():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    told = distances(a, b, protocol())["frechet_distance"]
    assert told == pytest.approx(numpy_frechet(a.numpy().reshape(20, 3), b.numpy().reshape(20, 3)), rel=1e-9)


def test_clips_along_time_follow_each_other(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (3, 27, 16, 16, 3), np.uint8)
    np.save(tmp_path / "long.npy", video)
    long = ArrayVideos(
        [[tmp_path / "long.npy"]], num_frames=4, frame_stride=2, resolution=(16, 16), crop="squash"
    )
    clips = clips_along(long, [2, 0], 3, "abc")
    assert clips.count == 6
    told = clips.frames([1, 2, 3, 5])
    for frames, (index, position) in zip(told, [(2, 1), (2, 2), (0, 0), (0, 2)], strict=True):
        np.testing.assert_array_equal(frames, video[index, 8 * position : 8 * position + 8 : 2])
    for positions in (0, 4):
        with pytest.raises(ValueError, match=f"num_positions={positions}: .* 27 frames, which hold 3 clips"):
            clips_along(long, [0], positions, "abc")


def test_drift_is_the_distance_of_each_position_and_where_the_band_is_left(dataset, tmp_path):
    """Long videos whose first half is real and whose second half is white."""
    real = torch.stack([dataset.clip(item, "first")["frames"] for item in range(20, 26)]).numpy()
    np.save(tmp_path / "long.npy", np.concatenate([real, real, np.full_like(real, 255)], axis=1))
    long = ArrayVideos(
        [[tmp_path / "long.npy"]], num_frames=4, frame_stride=1, resolution=(16, 16), crop="squash"
    )
    followed = following(dataset, protocol(), available=6)
    drift = followed.drift(long, long.fingerprint, 3)
    items = followed.real_items(0)
    side = colours(torch.stack([dataset.clip(item, "random", 0)["frames"] for item in items]))
    white = np.ones((6, 3))
    expected = [numpy_frechet(side, colours(torch.from_numpy(real)))] * 2
    expected.append(float(((side.mean(0) - white.mean(0)) ** 2).sum() + np.trace(np.cov(side, rowvar=False))))
    curve = drift.distances["fvd_fast@8vs6"]
    assert curve.values == pytest.approx(expected, rel=1e-4)
    assert curve.floor == pytest.approx(followed.result(0).uncertainty["fvd_fast@8vs6"]["floor"])
    assert drift.statistics["contrast"].left_at == 2 and drift.statistics["contrast"].median[2] == 0
    assert (drift.num_frames, drift.num_videos, drift.num_real) == (4, 6, 8)


def test_changes_from_the_beginning_stand_beside_those_of_real_videos(dataset, tmp_path):
    """The second half of each long video is another real one; without features distances are in pixels."""
    whole = torch.stack([torch.cat([c["frames"] for c in dataset.clips(i, [0, 4, 8])]) for i in range(6)])
    turned = torch.cat([whole, whole.roll(1, 0)], dim=1).numpy()
    np.save(tmp_path / "long.npy", turned)
    long = ArrayVideos(
        [[tmp_path / "long.npy"]], num_frames=4, frame_stride=1, resolution=(16, 16), crop="squash"
    )
    followed = following(dataset, protocol(), available=6)
    followed.extractor = None
    drift = followed.drift(long, long.fingerprint, 6)

    def means(videos: np.ndarray) -> np.ndarray:
        clips = videos.astype(np.float64).reshape(len(videos), -1, 4 * 16 * 16, 3)
        return clips.mean(2)

    items = followed.order(0)[:6]
    real = np.stack(
        [np.concatenate([c["frames"] for c in dataset.clips(i, [0, 4, 8, 12, 16])]) for i in items]
    )
    usual, gone = (np.linalg.norm(m - m[:, :1], axis=2) for m in (means(real), means(turned)))
    limit = np.quantile(usual[:, 1:], 0.95)
    change = drift.changes["colour"]
    assert change.limit == pytest.approx(limit, rel=1e-4)
    assert change.share_beyond == pytest.approx((gone > limit).mean(0)) and change.share_beyond[4] > 0
    assert change.median == pytest.approx(np.median(gone, 0), rel=1e-4, abs=1e-4)
    assert len(change.real_share_beyond) == 5, "real videos hold so many clips"
    curve = drift.distances["kernel_distance_of_pixels"]
    assert len(curve.values) == 6 and curve.floor is not None
    assert drift.blocks is None
    assert any("real videos reach 5 clips far, the long ones 6" in note for note in followed.notes)


def test_real_videos_reach_as_far_as_half_of_them_or_as_many_as_are_needed(dataset, monkeypatch):
    lengths = [4] * 4 + [8] * 8 + [13] * 12 + [20] * 6  # 1, 2, 3 and 5 clips of 4 frames
    monkeypatch.setattr(dataset, "length", lambda item: lengths[item])
    for num_generated, positions, expected in ((6, 9, 3), (20, 9, 2), (30, 9, 2), (6, 2, 2)):
        rows = following(dataset, protocol(num_generated=num_generated))._real_along(positions)
        assert rows is not None
        assert rows["colour"].shape == (min(num_generated, 26), expected, 3)


def test_without_two_real_clips_in_a_row_changes_are_not_told(tmp_path):
    np.save(tmp_path / "long.npy", np.zeros((6, 40, 16, 16, 3), np.uint8))
    long = ArrayVideos(
        [[tmp_path / "long.npy"]], num_frames=20, frame_stride=1, resolution=(16, 16), crop="squash"
    )
    followed = following(made_of(tmp_path, num_frames=20), protocol(), available=6)
    followed.extractor = None
    drift = followed.drift(long, long.fingerprint, 2)
    assert drift.changes == {} and any("no two clips one after the other" in note for note in followed.notes)


def test_each_set_is_measured_once_even_where_nothing_can_be_kept(dataset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(tmp_path / "file"))
    asked: list[int] = []

    def counted(seed: int, count: int) -> ClipSet:
        made = noise(seed, count)

        def frames(numbers: list[int]) -> Tensor:
            asked.append(seed)
            return made.frames(numbers)

        return replace(made, frames=frames)

    measuring = Measuring(Share(), 6, torch.device("cpu"))
    rules = protocol(seeds=(0, 3))
    followed = Following(
        rules, measuring, MeanColour(), dataset, dataset.fingerprint, counted, None  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.warns(UserWarning, match="can't keep what was measured"):
        followed.result(0)
        followed.suspicions()
        followed.generated_rows(0)
    assert asked == [0, 3]
    assert followed.generated_rows(3).keys() == {"features"} and "shown" in followed.generated_rows(0)


def test_floors_of_single_frames_have_no_kernel_distance():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 4, 3, generator=generator, dtype=torch.float64)
    assert floor_of_halves(features, (8, 8), protocol()).keys() == {"frechet_distance"}
