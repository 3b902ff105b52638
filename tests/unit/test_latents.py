import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from src.data import latents
from src.data.latents import LatentDataset, LatentWriter
from src.data.sampler import LatentBatch, PositionSampler, batches, epoch_order, held_out_batches

METADATA: dict[str, Any] = {
    "autoencoder": "abc123",
    "fingerprint": "def456",
    "num_frames": 8,
    "frame_stride": 1,
    "resolution": (32, 32),
}


def clips(numbers: range, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Latents that tell their number."""
    number = torch.tensor(list(numbers))
    mean = number.float().reshape(-1, 1, 1, 1, 1).expand(-1, 4, 2, 3, 5) + torch.arange(5) / 8
    return mean.to(dtype), (mean / 2).to(dtype), number % 3 - 1


def write(folder: Path, num_clips: int = 23, dtype: torch.dtype = torch.float32) -> None:
    writer = LatentWriter(folder, METADATA, num_clips=num_clips, clips_per_shard=10)
    for shard in reversed(range(writer.num_shards)):  # any order will do
        writer.write(shard, *clips(writer.clips_of(shard), dtype))
    writer.finish()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    data = LatentDataset(tmp_path, METADATA, seed=0)
    assert len(data) == 23 and data.latent_shape == (4, 2, 3, 5)
    mean, std, label = clips(range(23))
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
    assert isinstance(batch, LatentBatch) and torch.equal(batch.mean, clips(range(23))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_held_on_the_device_they_are_the_loaders_batches_bit_for_bit(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Over epochs, from a later step, for the second of two processes."""
    write(tmp_path, dtype=dtype)
    data = LatentDataset(tmp_path, METADATA, seed=3)
    sampler = PositionSampler(
        global_batch_size=8, micro_batch_size=2, start_step=2, num_steps=11, rank=1, world_size=2
    )
    resident = data.on_device("cpu")
    loaded = list(batches(data, sampler, num_workers=0, device="cpu"))
    held = list(resident.batches(sampler))
    assert len(held) == len(loaded) == 18
    for one, other in zip(held, loaded, strict=True):
        assert isinstance(other, LatentBatch)
        for name in ("mean", "std", "label", "positions"):
            a, b = getattr(one, name), getattr(other, name)
            assert torch.equal(a, b) and a.dtype == b.dtype, name


def test_latents_that_the_device_cant_hold_are_refused_with_the_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    data = LatentDataset(tmp_path, METADATA, seed=0)
    needed = 23 * (2 * 4 * 2 * 3 * 5 * 4 + 8)
    assert latents._free_memory(torch.device("cpu")) > 1e6
    monkeypatch.setattr(latents, "_free_memory", lambda device: needed)
    data.on_device("cpu")
    monkeypatch.setattr(latents, "_free_memory", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"2\.23e-05 GB, and cpu has 2\.23e-05 GB free.*latents_on_device"):
        data.on_device("cpu")


def test_half_precision_on_disk_is_float_in_hand(tmp_path: Path) -> None:
    write(tmp_path, dtype=torch.float16)
    assert load_file(tmp_path / "00000.safetensors")["mean"].dtype == torch.float16
    item = LatentDataset(tmp_path, METADATA, seed=0).held_out(3)
    assert item["mean"].dtype == torch.float32 and torch.equal(item["mean"], clips(range(3, 4))[0][0])


def test_an_interrupted_encoding_goes_on(tmp_path: Path) -> None:
    writer = LatentWriter(tmp_path, METADATA, num_clips=23, clips_per_shard=10)
    writer.write(1, *clips(range(10, 20)))
    with pytest.raises(ValueError, match=r"2 of 3 shards are missing in .*: \[0, 2\]"):
        writer.finish()
    with pytest.raises(FileNotFoundError, match=r"are not finished(.|\n)*python -m src\.encode"):
        LatentDataset(tmp_path, METADATA, seed=0)
    # Killed while it wrote a shard; and power was lost before another's content had come to the disk.
    (tmp_path / ".00000.safetensors.123.part").write_bytes(b"half")
    whole = (tmp_path / "00001.safetensors").read_bytes()
    (tmp_path / "00001.safetensors").write_bytes(whole[:-1])
    again = LatentWriter(tmp_path, METADATA, num_clips=23, clips_per_shard=7)
    again.remove_leftovers()
    assert again.clips_per_shard == 10 and again.missing() == [0, 1, 2]
    assert again.is_written(1) and not again.is_written(0)
    again.write(2, *clips(range(20, 23)))
    assert again.missing() == [0, 1]
    (tmp_path / "00001.safetensors").write_bytes((tmp_path / "00002.safetensors").read_bytes())
    assert again.missing() == [0, 1], "of another length"
    for shard in again.missing():
        again.write(shard, *clips(again.clips_of(shard)))
    again.finish()
    assert (tmp_path / "00001.safetensors").read_bytes() == whole
    data = LatentDataset(tmp_path, METADATA, seed=0)
    assert [int(data.held_out(k)["mean"][0, 0, 0, 0]) for k in range(23)] == list(range(23))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.safetensors", "00001.safetensors", "00002.safetensors", "index.json", "started.json"
    ]  # fmt: skip


def test_other_latents_are_refused_with_what_differs(tmp_path: Path) -> None:
    write(tmp_path)
    for changed in ({"autoencoder": "other"}, {"resolution": (64, 64)}, {"frame_stride": 2}):
        ((key, new),) = changed.items()
        old = METADATA[key]
        told = [str(list(value) if isinstance(value, tuple) else value) for value in (old, new)]
        for use in (
            lambda other: LatentDataset(tmp_path, other, seed=0),
            lambda other: LatentWriter(tmp_path, other, num_clips=23, clips_per_shard=10),
        ):
            with pytest.raises(ValueError, match="something else") as refused:
                use(METADATA | changed)
            _, line, remedy = str(refused.value).splitlines()
            assert line.replace("(", "[").replace(")", "]") == f"    {key}: {told[0]} -> {told[1]}"
            assert remedy.startswith("Delete the folder")
    with pytest.raises(ValueError, match="crop: None -> squash"):
        LatentDataset(tmp_path, METADATA | {"crop": "squash"}, seed=0)


def test_latents_of_another_format_or_of_nobody_knows_what_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(latents, "FORMAT", 99)
        for use in (
            lambda: LatentDataset(tmp_path, METADATA, seed=0),
            lambda: LatentWriter(tmp_path, METADATA, num_clips=23, clips_per_shard=10),
        ):
            with pytest.raises(ValueError, match="format: 2 -> 99"):
                use()
    for name in ("started.json", "index.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"no started\.json"):
        LatentWriter(tmp_path, METADATA, num_clips=23, clips_per_shard=10)


@pytest.mark.parametrize("damage", ["deleted", "truncated", "shorter"])
def test_a_damaged_shard_says_how_to_make_it_again(tmp_path: Path, damage: str) -> None:
    write(tmp_path)
    shard = tmp_path / "00001.safetensors"
    if damage == "deleted":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.write_bytes((tmp_path / "00002.safetensors").read_bytes())
    data = LatentDataset(tmp_path, METADATA, seed=0)
    assert data.missing() == [1]
    data.held_out(3)
    message = r"latents in .*00001\.safetensors can't be read \((.|\n)*python -m src\.encode"
    with pytest.raises(ValueError, match=message):
        data.held_out(12)
    with pytest.raises(ValueError, match=message):
        data.on_device("cpu")


@pytest.mark.parametrize("content", ["[1]", '{"format": 2}', '{"format": 2, "metadata": [], "shards": 1}'])
def test_an_index_of_another_shape_is_refused(tmp_path: Path, content: str) -> None:
    write(tmp_path)
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"index\.json is damaged: expected a dictionary with format, metadata"
    ):
        LatentDataset(tmp_path, METADATA, seed=0)
    (tmp_path / "started.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"started\.json is damaged: expected a dictionary with format, meta"
    ):
        LatentWriter(tmp_path, METADATA, num_clips=23, clips_per_shard=10)


def test_what_is_no_latents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="are not there"):
        LatentDataset(tmp_path / "nowhere", METADATA, seed=0)
    for sizes in ((0, 10), (10, 0)):
        with pytest.raises(ValueError, match="at least 1, got"):
            LatentWriter(tmp_path, METADATA, num_clips=sizes[0], clips_per_shard=sizes[1])
    writer = LatentWriter(tmp_path, METADATA, num_clips=5, clips_per_shard=3)
    mean, std, label = clips(range(3))
    for wrong in ((mean[0], std[0], label), (mean, std[:2], label), (mean, std, label[:2])):
        with pytest.raises(ValueError, match="expected mean and std b c t h w"):
            writer.write(0, *wrong)
    with pytest.raises(ValueError, match="shard 1 is of 2 clips, got 3"):
        writer.write(1, mean, std, label)


def test_what_the_disk_refuses_is_one_clear_error_and_leaves_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LatentWriter(tmp_path, METADATA, num_clips=5, clips_per_shard=3)
    writer.write(0, *clips(range(3)))

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(latents, "save_tensors", full)
        with pytest.raises(
            OSError, match=rf"can't write latents to {tmp_path}: .*No space left.*same command"
        ):
            writer.write(1, *clips(range(3, 5)))
    assert not list(tmp_path.glob(".*.part"))
    assert LatentWriter(tmp_path, METADATA, num_clips=5, clips_per_shard=3).missing() == [1]
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match="can't write latents to"):
        LatentWriter(file / "below", METADATA, num_clips=5, clips_per_shard=3)
