import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from src.data.latents import LatentDataset, LatentWriter
from src.data.sampler import LatentBatch, PositionSampler, batches, epoch_order, held_out_batches

METADATA: dict[str, Any] = {
    "autoencoder": "abc123",
    "fingerprint": "def456",
    "num_frames": 8,
    "frame_stride": 1,
    "resolution": (32, 32),
}


def clips(begin: int, end: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Latents that tell their number."""
    number = torch.arange(begin, end)
    mean = number.float().reshape(-1, 1, 1, 1, 1).expand(-1, 4, 2, 3, 5) + torch.arange(5) / 8
    return mean.to(dtype), (mean / 2).to(dtype), number % 3 - 1


def write(folder: Path, num_clips: int = 23, clips_per_shard: int = 10) -> None:
    with LatentWriter(folder, METADATA, clips_per_shard=clips_per_shard) as writer:
        for begin in range(0, num_clips, 4):
            writer.write(*clips(begin, min(begin + 4, num_clips)))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    data = LatentDataset(tmp_path, METADATA, seed=0)
    assert len(data) == 23 and data.latent_shape == (4, 2, 3, 5)
    mean, std, label = clips(0, 23)
    for index in (0, 9, 10, 19, 20, 22):
        item = data.held_out(index)
        assert torch.equal(item["mean"], mean[index]) and torch.equal(item["std"], std[index])
        assert item["label"] == label[index] and item["position"] == index
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [len(load_file(shard)["mean"]) for shard in shards] == [10, 10, 3]


def test_the_order_is_a_permutation_per_epoch(tmp_path: Path) -> None:
    write(tmp_path)
    data = LatentDataset(tmp_path, METADATA, seed=7)
    for epoch in (0, 3):
        seen = [int(data[23 * epoch + k]["mean"][0, 0, 0, 0]) for k in range(23)]
        assert seen == epoch_order(23, 7, epoch)
    assert data[23 * 3 + 5]["position"] == 23 * 3 + 5


def test_batches_of_latents_with_and_without_workers(tmp_path: Path) -> None:
    write(tmp_path)
    data = LatentDataset(tmp_path, METADATA, seed=0)
    data[0]
    assert len(pickle.dumps(data)) < 5000
    sampler = PositionSampler(global_batch_size=6, micro_batch_size=3, num_steps=2)
    for num_workers in (0, 2):
        found = list(batches(data, sampler, num_workers=num_workers, device="cpu"))
        assert len(found) == 4
        for batch in found:
            assert isinstance(batch, LatentBatch)
            for k, position in enumerate(batch.positions.tolist()):
                assert torch.equal(batch.mean[k], data[position]["mean"])
                assert batch.label[k] == data[position]["label"]
    (batch,) = held_out_batches(data, batch_size=50, num_clips=None, device="cpu")
    assert isinstance(batch, LatentBatch) and torch.equal(batch.mean, clips(0, 23)[0])


def test_half_precision_on_disk_is_float_in_hand(tmp_path: Path) -> None:
    with LatentWriter(tmp_path, METADATA) as writer:
        writer.write(*clips(0, 5, torch.float16))
    assert load_file(tmp_path / "00000.safetensors")["mean"].dtype == torch.float16
    item = LatentDataset(tmp_path, METADATA, seed=0).held_out(3)
    assert item["mean"].dtype == torch.float32 and torch.equal(item["mean"], clips(3, 4)[0][0])


def test_an_interrupted_encoding_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), LatentWriter(tmp_path, METADATA, clips_per_shard=10) as writer:
        writer.write(*clips(0, 14))
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError, match=r"are not finished(.|\n)*python -m src\.encode"):
        LatentDataset(tmp_path, METADATA, seed=0)
    with LatentWriter(tmp_path, METADATA, clips_per_shard=10) as writer:
        assert writer.num_written == 10
        writer.write(*clips(10, 23))
    data = LatentDataset(tmp_path, METADATA, seed=0)
    assert [int(data.held_out(k)["mean"][0, 0, 0, 0]) for k in range(23)] == list(range(23))


def test_other_latents_are_refused_with_what_differs(tmp_path: Path) -> None:
    write(tmp_path)
    for changed in ({"autoencoder": "other"}, {"resolution": (64, 64)}, {"frame_stride": 2}):
        (key,) = changed
        for use in (
            lambda other: LatentDataset(tmp_path, other, seed=0),
            lambda other: LatentWriter(tmp_path, other),
        ):
            with pytest.raises(ValueError, match=rf"something else:\n    {key}: .* -> .*\nDelete"):
                use(METADATA | changed)
    with pytest.raises(ValueError, match="crop: None -> squash"):
        LatentDataset(tmp_path, METADATA | {"crop": "squash"}, seed=0)


def test_what_is_no_latents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="are not there"):
        LatentDataset(tmp_path / "nowhere", METADATA, seed=0)
    with pytest.raises(ValueError, match="no latents were written"):
        LatentWriter(tmp_path, METADATA).close()
    mean, std, label = clips(0, 3)
    for wrong in ((mean[0], std[0], label), (mean, std[:2], label), (mean, std, label[:2])):
        with pytest.raises(ValueError, match="expected mean and std b c t h w"):
            LatentWriter(tmp_path, METADATA).write(*wrong)
