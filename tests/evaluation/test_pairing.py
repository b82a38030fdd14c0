import pytest

from sparsetune.errors import VideoError
from sparsetune.evaluation.pairing import SUFFIXES, pairs


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def names_of(found):
    return [(name, dense.name, sparse.name) for name, dense, sparse in found]


def test_what_eval_writes_is_paired_within_one_folder(tmp_path):
    kinds = ("dense", "sparse", "compare")
    videos = touch(tmp_path / "videos", *(f"prompt_{index}_{kind}.mp4" for index in (0, 10) for kind in kinds))
    expected = [(f"prompt_{index}.mp4", f"prompt_{index}_dense.mp4", f"prompt_{index}_sparse.mp4") for index in (0, 10)]
    assert names_of(pairs(videos, videos)) == expected


def test_dense_and_sparse_videos_are_paired_across_folders(tmp_path):
    before, after = touch(tmp_path / "a", "x_dense.mp4", "x_sparse.mp4"), touch(tmp_path / "b", "x_sparse.mp4")
    ((name, dense, sparse),) = pairs(before, after)
    assert (name, dense.parent, sparse.parent) == ("x.mp4", before, after)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_type_is_found_in_folders(tmp_path, suffix):
    dense, sparse = (touch(tmp_path / side, f"a{suffix}", f"B{suffix.upper()}", "notes.txt") for side in "ds")
    assert [name for name, _, _ in pairs(dense, sparse)] == [f"B{suffix.upper()}", f"a{suffix}"]


def test_a_dense_video_without_a_sparse_one_is_refused(tmp_path):
    videos = touch(tmp_path / "videos", "a_dense.mp4", "b_dense.mp4", "a_sparse.mp4")
    with pytest.raises(VideoError, match=r"lacks b.mp4"):
        pairs(videos, videos)
