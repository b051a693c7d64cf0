"""Classification: metrics and losses."""

import torch
import torch.nn.functional as F

from models.knn import KNNClassifier
from tasks.classification import ClassificationTask, evaluate_neighbors


def test_metrics_by_hand():
    scores = torch.tensor([[0.1, 0.9, 0.0, 0, 0, 0, 0], [7.0, 6, 5, 4, 3, 2, 1]])
    task = ClassificationTask()
    metrics = task.metrics(scores, torch.tensor([1, 4]))
    assert metrics["top1"].tolist() == [100, 0]
    assert metrics["top5"].tolist() == [100, 100]
    assert task.metrics(scores, torch.tensor([0, 5]))["top5"].tolist() == [100, 0]


def test_fewer_than_five_classes():
    metrics = ClassificationTask().metrics(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    assert (metrics["top1"].item(), metrics["top5"].item()) == (0, 100)


def test_losses():
    scores, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(
        ClassificationTask(criterion="MSE").loss(scores, labels),
        ((scores - torch.eye(3)[labels]) ** 2).mean(),
    )
    torch.testing.assert_close(
        ClassificationTask().loss(scores, labels), F.cross_entropy(scores, labels)
    )


def test_top_five_counts_only_classes_that_got_a_vote():
    model = KNNClassifier(K=(1, 2), metric="euclidean")
    model.fit(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([2, 1, 0]), num_classes=8)
    batches = [(torch.tensor([[0.1], [0.2]]), torch.tensor([1, 0]))]
    report = evaluate_neighbors(model, batches, device=torch.device("cpu"))
    assert report.metrics == {1: {"top1": 0.0, "top5": 0.0}, 2: {"top1": 0.0, "top5": 50.0}}
    counts = report.confusion(1, 8)
    assert counts[1, 2] == counts[0, 2] == 1
    assert counts.sum() == 2
