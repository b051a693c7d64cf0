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


def test_five_classes_have_no_top_five():
    task = ClassificationTask()
    metrics = task.metrics(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), torch.tensor([0]))
    assert {name: value.item() for name, value in metrics.items()} == {"top1": 0}
    assert task.line({"top1": 0.0}) == "Accuracy: Top1: 0.0000%"
    assert task.brief({"loss": 1.0, "top1": 0.0}) == "Loss: 1.0000 Top1: 0.00%"
    model = KNNClassifier(K=1, metric="euclidean")
    model.fit(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 4]), num_classes=5)
    report = evaluate_neighbors(
        model, [(torch.tensor([[0.1]]), torch.tensor([0]))], device=torch.device("cpu")
    )
    assert report.metrics == {1: {"top1": 100.0}}


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
