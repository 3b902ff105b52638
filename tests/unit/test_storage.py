"""Files and folders appear whole or not at all, and others may read them."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from src.data.storage import (
    atomic_folder,
    atomic_path,
    held,
    load_tensors,
    parse_json,
    part_of,
    remove_abandoned,
    remove_leftovers,
    save_tensors,
)

ROOT = Path(__file__).parents[2]


def test_tensors_may_be_read_by_whoever_may_read_other_files(tmp_path: Path) -> None:
    save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert torch.equal(load_tensors(tmp_path / "a.safetensors")["a"], torch.ones(2))


def test_a_folder_is_replaced_once_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as part:
        (part / "file").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_folder(target) as part:
        (part / "file").write_text("half")
        raise OSError("the disk is full")
    assert (target / "file").read_text() == "old"
    with atomic_folder(target) as part:
        (part / "file").write_text("new")
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_writer_had_set_aside_comes_back(tmp_path: Path) -> None:
    """Between its two renames a writer leaves nothing at the path; the next one finds the old content."""
    target, aside = tmp_path / "model", tmp_path / ".model.old.part"
    aside.mkdir()
    (aside / "file").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_folder(target) as part:
        assert (target / "file").read_text() == "old"
        (part / "file").write_text("half")
        raise OSError("the disk is full")
    assert (target / "file").read_text() == "old"


def test_what_killed_writers_of_a_file_have_left_goes_but_not_what_others_write(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive = ended.pid, os.getppid()
    long_ago = time.time() - 2 * 3600
    for name, when in (
        (f".run.json.{dead}.part", long_ago),
        (f".run.json.{alive}.part", long_ago),
        (f".run.json.{dead + 1}.part", time.time()),  # perhaps alive on another machine
        (f".run.json.old.{dead}.part", long_ago),  # of another file
    ):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (when, when))
    with atomic_path(tmp_path / "run.json") as part:
        part.write_text("whole")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "run.json", f".run.json.{alive}.part", f".run.json.{dead + 1}.part", f".run.json.old.{dead}.part"
    }  # fmt: skip
    (tmp_path / ".model.old.part").mkdir()
    remove_leftovers([tmp_path])
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", ".model.old.part"}


def test_parts_of_killed_processes_go_but_not_those_of_others(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive, here = ended.pid, os.getppid(), platform.node()
    kept = {
        part_of(tmp_path / "sample_2.mp4").name,
        f".sample_1.mp4.{here}.{alive}.part",
        f".sample_1.mp4.{here}-too.{dead}.part",  # of another machine
        f".other.mp4.{here}.{dead}.part",
        "sample_0.mp4",
    }
    for name in kept | {f".sample_{i}.mp4.{here}.{dead}.part" for i in range(3)}:
        (tmp_path / name).write_text("half")
    remove_abandoned(tmp_path, "sample_*.mp4")
    assert {path.name for path in tmp_path.iterdir()} == kept
    remove_abandoned(tmp_path / "none", "sample_*.mp4")


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\0" * 100, b"\xff\xfe{}"])
def test_damaged_json_that_is_needed_is_told_with_its_file_and_a_remedy(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is damaged.*; remove it"):
        parse_json(path, "remove it")
    path.write_text('{"ü": [1]}', encoding="utf-8")
    assert parse_json(path, "remove it") == {"ü": [1]}


def test_a_folder_is_held_until_its_process_ends_however_it_ends(tmp_path: Path) -> None:
    """Another process is refused and told who holds it; after SIGKILL not even its child does."""
    lock, ready = tmp_path / ".lock", tmp_path / "ready"
    holder = (
        "import os, sys, time; from pathlib import Path; from src.data.storage import held\n"
        "with held(Path(sys.argv[1]), 'busy'):\n"
        "    child = os.fork()\n"
        "    if child: open(sys.argv[2], 'w').write(str(child))\n"
        "    time.sleep(30)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(lock), str(ready)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (ready.exists() and ready.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    with (
        pytest.raises(ValueError, match=rf"the run is busy \(process {process.pid} on "),
        held(lock, "the run is busy"),
    ):
        pass
    process.kill()
    process.wait()
    with held(lock, "busy"):
        pass
    subprocess.run(["kill", ready.read_text()], check=True)
