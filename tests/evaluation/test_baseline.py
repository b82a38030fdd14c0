"""The cache of dense baselines."""

import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sparsetune.errors import CacheError, GenerationError, SparsetuneError
from sparsetune.evaluation.baseline import BaselineCache, BaselineKey, canonical_hash
from sparsetune.locks import exclusive

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
ENTRY_GB = 6.7e-6
"""One entry of `FRAMES`, noise that can't be packed, takes a little less."""


def never() -> tuple[npt.NDArray[np.uint8], float]:
    raise AssertionError("rendered although it was cached")


def test_what_was_put_is_got_back(cache: BaselineCache, key: BaselineKey) -> None:
    assert cache.get(key) is None
    cache.put(key, FRAMES, 3.5)
    found = cache.get(key)
    assert found is not None
    np.testing.assert_array_equal(found.frames, FRAMES)
    assert (found.seconds, found.cached, found.frames.flags.writeable) == (3.5, True, False)


def test_a_video_is_rendered_once(cache: BaselineCache, key: BaselineKey) -> None:
    first = cache.get_or_render(key, lambda: (FRAMES.copy(), 3.5))
    second = cache.get_or_render(key, never)
    assert (first.cached, second.cached) == (False, True)
    np.testing.assert_array_equal(first.frames, second.frames)


OTHERS: dict[str, Any] = {
    "source": "other",
    "revision": "abc",
    "fingerprint": "0",
    "pipeline_class": "Other",
    "prompt": "other",
    "negative_prompt": "ugly",
    "seed": 43,
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "num_inference_steps": 5,
    "guidance_scale": 1.0,
    "max_sequence_length": 64,
    "scheduler": "Other-1",
    "dtype": "float16",
    "device": "cuda X",
    "vae_tiling": True,
    "versions": (("torch", "0"),),
    "image": "abc",
    "guidance_scale_2": 1.0,
    "sigmas": (1.0, 0.5),
    "compiled": True,
}


@pytest.mark.parametrize("name", [field.name for field in fields(BaselineKey)])
def test_every_field_of_the_key_changes_the_address(key: BaselineKey, name: str) -> None:
    assert replace(key, **{name: OTHERS[name]}).digest != key.digest


def test_the_address_is_that_of_before_compilation_and_sigmas_could_be_chosen(key: BaselineKey) -> None:
    content = {"format": 1, **asdict(key)}
    del content["compiled"], content["sigmas"]
    assert key.digest == canonical_hash(content)


def test_the_address_is_the_same_in_every_process(key: BaselineKey) -> None:
    assert replace(key).digest == key.digest
    assert len(key.digest) == 64


def damage_by_truncation(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def damage_by_a_flipped_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def damage_by_other_frames(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path) as archive:
        info = archive.read("entry.json")
    with zipfile.ZipFile(path, "w") as archive, archive.open("frames.npy", "w") as member:
        np.lib.format.write_array(member, FRAMES + 1)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("entry.json", info)


def damage_by_emptying(path: Path) -> None:
    path.write_bytes(b"")


def damage_by_a_directory_before_the_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[300:])


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_truncation, damage_by_a_flipped_byte, damage_by_other_frames, damage_by_emptying,
        damage_by_a_directory_before_the_file,
    ],
)  # fmt: skip
def test_a_damaged_entry_is_rendered_again_with_a_warning(
    cache: BaselineCache, key: BaselineKey, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    cache.put(key, FRAMES, 3.5)
    damage(cache.ls()[0].path)
    with caplog.at_level(logging.WARNING):
        found = cache.get_or_render(key, lambda: (FRAMES.copy(), 4.0))
    assert "is damaged" in caplog.text and "rendered again" in caplog.text
    assert (found.cached, found.seconds) == (False, 4.0)
    assert cache.get_or_render(key, never).seconds == 4.0


def test_an_entry_under_another_keys_name_is_damaged(
    cache: BaselineCache, key: BaselineKey, caplog: pytest.LogCaptureFixture
) -> None:
    cache.put(key, FRAMES, 3.5)
    other = replace(key, seed=43)
    cache.ls()[0].path.rename(cache.folder / f"{other.digest}.npz")
    assert cache.get(other) is None
    assert "belongs to another key" in caplog.text


def test_an_entry_that_was_cut_off_is_still_listed_and_cleared(cache: BaselineCache, key: BaselineKey) -> None:
    cache.put(key, FRAMES, 3.5)
    damage_by_truncation(cache.ls()[0].path)
    assert [entry.digest for entry in cache.ls()] == [key.digest]
    assert cache.clear().num_entries == 1


def others_files(folder: Path, key: BaselineKey) -> dict[Path, bytes]:
    """Files of a user's own, whose names and contents are as near to an entry's as they can be by chance."""
    cache = BaselineCache(folder / "elsewhere", 1.0)
    cache.put(key, FRAMES, 1.0)
    entry = cache.ls()[0].path
    digest = replace(key, prompt="another").digest
    names = (
        "embeddings_of_my_thesis.npz", "2025_results.npz", "0a.npz", ".draft.npz", f".{digest}.npz",
        f"{digest.upper()}.npz", f"{digest}0.npz", f"{digest}.npz",
    )  # fmt: skip
    for name in names:
        np.savez(folder / name, vectors=np.arange(4000))
        os.utime(folder / name, (0, 0))
    entry.rename(folder / f"{digest[::-1]}.npz")  # renamed: perhaps kept on purpose
    os.utime(folder / f"{digest[::-1]}.npz", (0, 0))
    (folder / "elsewhere").rmdir()
    return {path: path.read_bytes() for path in folder.iterdir()}


def test_only_files_that_are_certainly_ours_are_counted_evicted_or_cleared(tmp_path: Path, key: BaselineKey) -> None:
    theirs = others_files(tmp_path, key)
    cache = BaselineCache(tmp_path, ENTRY_GB / 10)
    cache.put(key, FRAMES, 1.0)
    cache.put(replace(key, prompt="b"), FRAMES, 1.0)
    assert [entry.digest for entry in cache.ls()] == [replace(key, prompt="b").digest]
    assert cache.clear().num_entries == 1
    assert {path: path.read_bytes() for path in theirs} == theirs


def test_links_folders_and_pipes_are_not_entries(tmp_path: Path, key: BaselineKey) -> None:
    kept = BaselineCache(tmp_path / "kept", 1.0)
    kept.put(key, FRAMES, 1.0)
    cache = BaselineCache(tmp_path / "cache", 1.0)
    cache.folder.mkdir()
    (cache.folder / f"{key.digest}.npz").symlink_to(kept.ls()[0].path)
    (cache.folder / f"{replace(key, seed=1).digest}.npz").mkdir()
    os.mkfifo(cache.folder / f"{replace(key, seed=2).digest}.npz")
    assert (cache.ls(), cache.clear().num_entries) == ((), 0)
    assert len(list(cache.folder.iterdir())) == 3
    for seed in (1, 2):
        with pytest.raises(CacheError, match="is not a file; remove it"):
            cache.get_or_render(replace(key, seed=seed), never)


def put_at(cache: BaselineCache, key: BaselineKey, prompt: str, moment: float) -> BaselineKey:
    named = replace(key, prompt=prompt)
    cache.put(named, FRAMES, 1.0)
    os.utime(cache.folder / f"{named.digest}.npz", (moment, moment))
    return named


def test_the_least_recently_used_entry_goes_first(tmp_path: Path, key: BaselineKey) -> None:
    cache = BaselineCache(tmp_path, 3 * ENTRY_GB)
    now = time.time()
    first, second, third = (put_at(cache, key, name, now - 100 + n) for n, name in enumerate("abc"))
    assert cache.get(first) is not None  # used again, so the second is the oldest now
    fourth = replace(key, prompt="d")
    cache.put(fourth, FRAMES, 1.0)
    assert [cache.get(one) is not None for one in (first, second, third, fourth)] == [True, False, True, True]
    assert sum(entry.size_bytes for entry in cache.ls()) <= cache.max_bytes


def test_the_entry_just_written_stays_even_if_it_alone_is_beyond_the_bound(tmp_path: Path, key: BaselineKey) -> None:
    cache = BaselineCache(tmp_path, ENTRY_GB / 10)
    cache.put(key, FRAMES, 1.0)
    assert cache.get(key) is not None


def test_an_entry_in_use_is_not_evicted(tmp_path: Path, key: BaselineKey) -> None:
    cache = BaselineCache(tmp_path, 2 * ENTRY_GB)
    now = time.time()
    oldest, older = put_at(cache, key, "a", now - 100), put_at(cache, key, "b", now - 50)
    with exclusive(tmp_path / "locks" / f"{oldest.digest}.lock", what="a test"):
        cache.put(replace(key, prompt="c"), FRAMES, 1.0)
        assert cache.get(oldest) is not None
        assert cache.get(older) is None


def test_a_bound_too_small_for_one_run_is_said(
    tmp_path: Path, key: BaselineKey, caplog: pytest.LogCaptureFixture
) -> None:
    cache = BaselineCache(tmp_path, 1.5 * ENTRY_GB)
    for prompt in "abc":
        cache.put(replace(key, prompt=prompt), FRAMES, 1.0)
    assert "too small for this run's dense videos" in caplog.text


def test_a_bound_of_zero_stores_nothing(tmp_path: Path, key: BaselineKey) -> None:
    cache = BaselineCache(tmp_path, 0.0)
    cache.get_or_render(key, lambda: (FRAMES.copy(), 1.0))
    assert cache.ls() == ()


def test_a_negative_bound_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"cache\.max_gb must be at least 0 GB, got -1"):
        BaselineCache(tmp_path, -1.0)


def test_ls_tells_what_an_entry_was_rendered_from(cache: BaselineCache, key: BaselineKey) -> None:
    cache.put(key, FRAMES, 3.5)
    (entry,) = cache.ls()
    assert entry.info is not None
    assert (entry.info.key["prompt"], entry.info.seconds, entry.info.shape) == (key.prompt, 3.5, FRAMES.shape)
    assert entry.size_bytes == entry.path.stat().st_size


def test_clear_removes_everything_but_what_is_in_use(cache: BaselineCache, key: BaselineKey) -> None:
    used = replace(key, prompt="b")
    cache.put(key, FRAMES, 1.0)
    cache.put(used, FRAMES, 1.0)
    stale = cache.folder / f".{key.digest}-0123abcd.npz"
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))
    size = (cache.folder / f"{key.digest}.npz").stat().st_size
    with exclusive(cache.folder / "locks" / f"{used.digest}.lock", what="a test"):
        cleared = cache.clear()
    assert (cleared.num_entries, cleared.size_bytes, cleared.num_in_use) == (1, size, 1)
    assert not stale.exists()
    assert [entry.digest for entry in cache.ls()] == [used.digest]


def test_nothing_is_listed_or_cleared_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    cache = BaselineCache(tmp_path / "none", 1.0)
    assert cache.ls() == ()
    assert cache.clear().num_entries == 0
    assert not cache.folder.exists()


def test_a_failed_rendering_leaves_nothing(cache: BaselineCache, key: BaselineKey) -> None:
    def fail() -> tuple[npt.NDArray[np.uint8], float]:
        raise GenerationError("all frames are black")

    with pytest.raises(GenerationError, match="black"):
        cache.get_or_render(key, fail)
    assert [path.name for path in cache.folder.rglob("*")] == ["locks"]


def test_a_video_that_cannot_be_stored_is_used_all_the_same(
    cache: BaselineCache, key: BaselineKey, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise SparsetuneError("the disk is full")

    monkeypatch.setattr("sparsetune.evaluation.baseline.write_entry", full)
    found = cache.get_or_render(key, lambda: (FRAMES.copy(), 1.0))
    np.testing.assert_array_equal(found.frames, FRAMES)
    assert "is not cached: the disk is full" in caplog.text


RENDER_SLOWLY = """
import os, sys, time
from pathlib import Path
import numpy as np
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.baseline import BaselineKey

def render():
    (Path(sys.argv[2]) / str(os.getpid())).touch()
    time.sleep(0.5)
    return np.full((2, 4, 4, 3), 7, np.uint8), 1.0

key = eval(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
found = BaselineCache(Path(sys.argv[1]), 1.0).get_or_render(key, render)
assert (found.frames == 7).all()
"""


def test_two_processes_that_want_one_video_render_it_once(tmp_path: Path, key: BaselineKey) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    command = [sys.executable, "-c", RENDER_SLOWLY, str(tmp_path / "cache"), str(marks), repr(key)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0]
    assert len(list(marks.iterdir())) == 1
