"""Sets of clips are measured once, in the same batches on any number of processes."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from src.evaluation.measuring import NUM_SHOWN, ClipSet, Measuring, through_jpeg
from src.training.share import Share


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path / "cache" / "features"


class Counted:
    """Squares of numbers, and the batches that were asked for."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.batches: list[list[int]] = []
        self.fails_at = fails_at

    def __call__(self, numbers: list[int]) -> dict[str, Tensor]:
        if self.fails_at is not None and self.fails_at in numbers:
            raise OSError("the disk is gone")
        self.batches.append(numbers)
        return {"square": torch.tensor(numbers).double() ** 2, "shown": torch.tensor(numbers)}


def measuring(batch_size: int = 4) -> Measuring:
    return Measuring(Share(), batch_size, torch.device("cpu"))


def squares(count: int) -> Tensor:
    return torch.arange(count).double() ** 2


@pytest.mark.parametrize("count", [1, 4, 10, 23])
def test_rows_are_those_of_each_clip_in_batches_of_one_size(count):
    compute = Counted()
    rows = measuring().rows("x", count, {"a": 1}, compute)
    assert torch.equal(rows["square"], squares(count))
    assert torch.equal(rows["shown"], torch.arange(min(count, NUM_SHOWN)))
    assert len({len(batch) for batch in compute.batches}) == 1, "the last batch is filled up"
    assert len(compute.batches[0]) <= 4 and len(compute.batches) == -(-count // 4)


def test_what_was_measured_is_measured_once(cache):
    first, again, other, larger = Counted(), Counted(), Counted(), Counted()
    told = measuring().rows("x", 10, {"a": 1}, first)
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"], "its parts are gone"
    known = measuring().rows("x", 10, {"a": 1}, again)
    assert not again.batches and torch.equal(told["square"], known["square"])
    measuring().rows("x", 10, {"a": 2}, other)
    measuring().rows("x", 11, {"a": 1}, larger)
    assert other.batches and larger.batches, "another key, another number: other rows"


def test_what_was_interrupted_goes_on(cache):
    with pytest.raises(OSError, match="the disk is gone"):
        measuring().rows("x", 12, {"a": 1}, Counted(fails_at=8))
    rest = Counted()
    assert torch.equal(measuring().rows("x", 12, {"a": 1}, rest)["square"], squares(12))
    assert rest.batches == [[8, 9, 10, 11]]


def test_damaged_files_are_made_again(cache):
    measuring().rows("x", 10, {"a": 1}, Counted())
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    again = Counted()
    assert torch.equal(measuring().rows("x", 10, {"a": 1}, again)["square"], squares(10))
    assert len(again.batches) == 3


def test_where_nothing_can_be_kept_it_goes_on_without(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("no folder")
    with pytest.warns(UserWarning, match="can't keep what was measured"):
        rows = measuring().rows("x", 10, {"a": 1}, Counted())
    assert torch.equal(rows["square"], squares(10))


class OneOf(Share):
    """One of two processes that run one after another in this one; what they tell each other lies between."""

    def __init__(self, rank: int, between: dict[int, object]) -> None:
        super().__init__()
        self.rank, self.world_size, self._between = rank, 2, between

    def from_first(self, make: Callable[[], object]) -> object:
        return make()

    def collect(self, parts: dict[int, object]) -> dict[int, object]:
        self._between |= parts
        return {number: self._between[number] for number in sorted(self._between)}

    def wait(self) -> None:
        pass


def test_two_processes_ask_for_the_same_batches_as_one(cache, monkeypatch, tmp_path):
    alone, shared = Counted(), [Counted(), Counted()]
    whole = measuring().rows("x", 23, {"a": 1}, alone)
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(tmp_path / "another"))
    between: dict[int, object] = {}
    for rank in (1, 0):
        rows = Measuring(OneOf(rank, between), 4, torch.device("cpu")).rows("x", 23, {"a": 1}, shared[rank])
    assert torch.equal(rows["square"], whole["square"])
    assert sorted(shared[0].batches + shared[1].batches) == alone.batches
    assert len(shared[0].batches) == len(shared[1].batches) == 3


def frames(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 5, 8, 10, 3), generator=generator, dtype=torch.uint8)


def test_jpeg_is_pillows():
    video = frames(2)
    for i in range(2):
        for t in range(5):
            file = io.BytesIO()
            Image.fromarray(video[i, t].numpy()).save(file, "JPEG", quality=95)
            expected = np.asarray(Image.open(file))
            np.testing.assert_array_equal(through_jpeg(video, 95)[i, t].numpy(), expected)


class MeanColour:
    """An extractor whose features can be told by hand."""

    name, resize, dim, min_frames, weights_sha256 = "mean_colour", "none", 3, 1, "0"

    def __call__(self, video: Tensor) -> Tensor:
        return video.mean((2, 3, 4))


def test_clips_are_kept_as_features_and_statistics():
    video = frames(10)
    clips = ClipSet("x", 10, lambda numbers: video[numbers], {"set": "random"})
    rows = measuring().clips(clips, MeanColour(), None)  # type: ignore[arg-type]
    values = video.double() / 127.5 - 1
    expected = {
        "features": values.mean((1, 2, 3)),
        "contrast": values.flatten(2).std(2, correction=0).mean(1),
        "motion_energy": values.diff(dim=1).abs().mean((1, 2, 3, 4)),
        "colour": video.double().mean((1, 2, 3)),
    }
    for name, value in expected.items():
        torch.testing.assert_close(rows[name].double(), value, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows["shown"], video[:NUM_SHOWN])
    compressed = measuring().clips(clips, MeanColour(), 20)  # type: ignore[arg-type]
    assert torch.equal(compressed["shown"], through_jpeg(video, 20)[:NUM_SHOWN])
    assert not torch.equal(compressed["features"], rows["features"])


def test_batches_are_let_go():
    """What is kept of many clips holds no more memory than its own numbers."""
    import gc
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    def drawn(numbers: list[int]) -> Tensor:
        batch = torch.zeros(len(numbers), 5, 8, 10, 3, dtype=torch.uint8)
        alive.append(weakref.ref(batch.untyped_storage()))  # type: ignore[arg-type]
        gc.collect()
        assert sum(storage() is not None for storage in alive) <= 2
        return batch

    measuring().clips(ClipSet("x", 40, drawn, {"set": "zeros"}), MeanColour(), None)  # type: ignore[arg-type]


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        measuring(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measuring(1)
