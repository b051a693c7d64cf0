import pytest
import torch

from ops.topk import topk_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("n", "K"), [(1, 1), (9, 9), (100, 3), (1156, 9), (6000, 100), (9000, 1)])
def test_topk_rows_is_a_stable_sort(path, n, K, largest):
    for rows in (torch.randn(6, n), torch.randn(6, n).mul(3).round(), torch.zeros(6, n)):
        ordered = rows.sort(dim=1, descending=largest, stable=True)
        values, indices = topk_rows(rows, K, largest)
        assert torch.equal(values, ordered.values[:, :K])
        assert torch.equal(indices, ordered.indices[:, :K])


def test_topk_rows_takes_views_and_any_leading_shape(path):
    s = torch.randn(3, 4, 200)
    for view in (s, s[..., ::2], s.transpose(0, 1), s[..., 50:], s[0]):
        values, indices = topk_rows(view, 5)
        torch.testing.assert_close(values, view.topk(5).values)
        torch.testing.assert_close(view.gather(-1, indices), values)
    with pytest.raises(ValueError, match="K=201 for 200"):
        topk_rows(s, 201)
