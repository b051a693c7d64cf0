import torch

from ops.rows import add_rows, flat_index, take_rows


def test_rows_are_those_of_their_own_sample():
    torch.manual_seed(0)
    x, index = torch.randn(3, 7, 2), torch.randint(7, (3, 4, 5))
    taken = take_rows(x, index)
    assert taken.shape == (3, 4, 5, 2)
    out = torch.zeros_like(x)
    add_rows(out, index, taken)
    expected = torch.zeros_like(x)
    for b in range(3):
        for i in range(4):
            for j in range(5):
                assert torch.equal(taken[b, i, j], x[b, index[b, i, j]])
                expected[b, index[b, i, j]] += taken[b, i, j]
    torch.testing.assert_close(out, expected)
    assert torch.equal(flat_index(index[1:], 7, 1), flat_index(index, 7)[20:])


def test_shared_positions_may_be_expanded():
    x, index = torch.randn(2, 5, 3), torch.tensor([4, 0])
    assert torch.equal(take_rows(x, index.expand(2, -1)), x[:, index])
