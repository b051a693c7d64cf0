import pytest
import torch

from ops.budget import DEFAULT_MAX_BYTES, check_memory, chunk_bytes, pieces


def test_long_rows_get_more_room_but_not_without_bound():
    cpu = torch.device("cpu")
    assert chunk_bytes(cpu, row_bytes=400) == DEFAULT_MAX_BYTES["cpu"]
    assert chunk_bytes(cpu, row_bytes=60_000) == 512 * 60_000
    assert chunk_bytes(cpu, row_bytes=1 << 30) == 64 << 20
    assert chunk_bytes(cpu, max_bytes=7, row_bytes=60_000) == 7


def test_pieces_cover_everything_once_within_the_budget():
    for b, m, rows in ((3, 10, 4), (3, 10, 25), (1, 7, 0), (5, 1, 100), (4, 6, 6)):
        seen = torch.zeros(b, m)
        for samples, part in pieces(b, m, rows):
            assert seen[samples, part].numel() <= max(1, rows)
            seen[samples, part] += 1
        assert (seen == 1).all()


def test_memory_check_knows_this_machine():
    with pytest.raises(MemoryError, match="bytes needed"):
        check_memory(1 << 60, torch.device("cpu"))
    check_memory(1, torch.device("cpu"))
