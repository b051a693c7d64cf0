"""Text: encoding, windows, bits, generation."""

import torch

from layers.dynamic import DynamicNeighbors
from ops.centers.distances import DistanceKernel
from tasks.language import LanguageTask, TextEncoder, build_text, generate_text

TEXT = "the cat sat on the mat and the dog sat on the cat; " * 12


def test_generation_is_seeded_and_cools_down():
    encoder = TextEncoder(4, "ascii", [])
    model = DynamicNeighbors(num_features=4, num_classes=128, kernel=DistanceKernel("euclidean"))
    codes = encoder.codes(TEXT)
    windows = codes.unfold(0, 4, 1)[:-1]
    model.grow(encoder.encode(windows)[:200], codes[4:].long()[:200])
    first, same, other = (
        generate_text(model, encoder, "the ", 30, temperature=3.0, seed=s) for s in (1, 1, 2)
    )
    assert first == same != other
    cold = generate_text(model, encoder, "the ", 30, temperature=0)
    assert cold == generate_text(model, encoder, "the ", 30, temperature=0, seed=5)
    assert generate_text(model, encoder, "the ", 0) == "the "


def test_text_encoder():
    encoder = TextEncoder(3, "onehot", [97, 98, 99], decay=0.5)
    x = encoder.encode(torch.tensor([[97, 99, 122]]))
    expected = [[0.25, 0, 0], [0, 0, 0.5], [0, 0, 0]]  # z has no column
    torch.testing.assert_close(x.view(3, 3), torch.tensor(expected))
    assert encoder.width == 9
    plain = TextEncoder(3, "ascii", [])
    assert plain.encode(torch.tensor([[97, 99, 122]])).tolist() == [[97, 99, 122]]
    assert encoder.codes("aéb").tolist() == [97, 98]


def test_embedded_text():
    options = {"num_features": 10, "text_encoding": "ascii", "text_decay": 1.0}
    data = build_text(text_path=None, test_text_path=None, **options)
    assert len(data.train) > 8 * len(data.test) > 300_000
    x, y = data.train.__getitems__([0, 5])
    assert x.shape == (2, 10)
    text = bytes([*data.train.windows[0].tolist(), int(y[0])]).decode()
    assert len(text) == 11
    assert data.train[5][0][4] == data.train[0][0][9]


def test_bits_per_character():
    task = LanguageTask(uniform=0.5)
    scores = torch.zeros(2, 128)
    scores[0, 3] = scores[1, 4] = 1
    metrics = task.metrics(scores, torch.tensor([3, 3]))
    assert metrics["top1"].tolist() == [100, 0]
    expected = -torch.tensor([0.5 + 0.5 / 128, 0.5 / 128]).log2()
    torch.testing.assert_close(metrics["bits"], expected)
