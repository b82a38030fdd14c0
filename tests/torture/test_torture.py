"""A share of `make torture` that runs with the other tests."""

from pathlib import Path

import pytest

from tests.torture.inputs import READERS, Reader, faults

pytestmark = pytest.mark.slow
SEED, INPUTS = 7, 4


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_damaged_file_is_read_or_refused_in_a_sentence(reader: Reader, working_folder: Path) -> None:
    assert list(faults(reader, working_folder / "files", SEED, range(INPUTS))) == []


def test_code_in_a_checkpoint_would_be_noticed(working_folder: Path) -> None:
    import torch

    (reader,) = (reader for reader in READERS if reader.name == ".pt with code")
    unsafe = Reader("unsafe", reader.write, lambda path: torch.load(path, weights_only=False))
    assert [fault.text for fault in faults(unsafe, working_folder / "files", SEED, [0])] == ["ran the file's code"]
