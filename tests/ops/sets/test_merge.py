import torch

from ops.sets.merge import merge_neighbors


def test_merge_keeps_the_best_and_the_lower_index():
    values = torch.tensor([[1.0, 3.0, 1.0, 2.0, 9.0]])
    indices = torch.tensor([[7, 2, 4, 0, -1]])
    near, where = merge_neighbors(values, indices, 3, "euclidean")
    assert near.tolist() == [[1, 1, 2]]
    assert where.tolist() == [[4, 7, 0]]
    far, where = merge_neighbors(values, indices, 3, "dot")
    assert far.tolist() == [[3, 2, 1]]
    assert where.tolist() == [[2, 0, 4]]
