"""What layers say they chose is what they computed with."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layers import Conv1d_NN, Conv2d_Branching, Conv2d_NN, Conv2d_NN_Attn, record_neighbors
from layers.n3 import KNNBlock, N3Aggregation, N3Block
from layers.selection import HardNeighbors
from layers.tokens import Attention, BranchAttention, ConvNNAttention, KvtAttention, LocalAttention
from layers.tokens import NeighborhoodAttention as Neighborhood
from models.vit import ViT
from ops.patches.windows import Windows

close = torch.testing.assert_close

SAMPLING = {
    "all": {},
    "random": {"sampling_type": "random", "num_samples": 20},
    "spatial": {"sampling_type": "spatial", "num_samples": 4, "sample_padding": 1},
}


def at_positions(x, positions):
    """Values of maps (B, C, H, W) at whole positions (B, M, K, 2), zero outside: (B, M, K, C)."""
    b, c, height, width = x.shape
    border = 3
    padded = F.pad(x, [border] * 4)
    index = positions.round().long() + border
    flat = (index[..., 0] * (width + 2 * border) + index[..., 1]).flatten(1)  # (B, M·K)
    rows = padded.flatten(2).mT.gather(1, flat[..., None].expand(-1, -1, c))
    return rows.view(*positions.shape[:-1], c)


def all_positions(record, batch):
    found = record.places[record.indices]  # (B, G, M, K, 2)
    return found.expand(batch, -1, -1, -1, -1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("similarity", ["Col", "Loc", "Loc_Col"])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_convnn_convolves_what_it_says(sampling, similarity, stride, training):
    torch.manual_seed(0)
    layer = Conv2d_NN(3, 4, K=5, stride=stride, similarity_type=similarity, **SAMPLING[sampling])
    layer.train(training)
    x = torch.randn(2, 3, 7, 9)
    with record_neighbors(layer) as records:
        y = layer(x)
    (record,) = records
    assert record.map_shape == (7, 9)
    taken = at_positions(x, all_positions(record, 2)[:, 0])  # (B, M, K, C)
    expected = torch.einsum("bmkc,ock->bom", taken, layer.conv1d_layer.weight)
    expected += layer.conv1d_layer.bias[:, None]
    close(y.flatten(2), expected)


def test_the_positions_of_a_shuffled_map_lie_in_the_middle_of_its_blocks():
    torch.manual_seed(0)
    layer = Conv2d_NN(2, 3, K=4, padding=1, shuffle_pattern="B", shuffle_scale=2)
    x = torch.randn(1, 2, 8, 12)
    with record_neighbors(layer) as records:
        y = layer(x)
    record = records[0]
    assert record.map_shape == (8, 12)
    assert record.extent == 2
    assert record.queries[0].tolist() == [0.5, 0.5]
    assert record.places[0].tolist() == [-1.5, -1.5]  # the border is a block wide
    blocks = F.pixel_unshuffle(x, 2)
    taken = at_positions(blocks, (all_positions(record, 1)[:, 0] - 0.5) / 2)
    expected = torch.einsum("bmkc,ock->bom", taken, layer.conv1d_layer.weight)
    close(y.flatten(2), expected + layer.conv1d_layer.bias[:, None])


def test_sequences():
    torch.manual_seed(0)
    layer = Conv1d_NN(2, 3, K=4, stride=2)
    x = torch.randn(1, 2, 11)
    with record_neighbors(layer) as records:
        y = layer(x)
    positions = records[0].places[records[0].indices][0, 0, ..., 0].long()  # (M, K)
    taken = F.pad(x, [1, 1])[0, :, positions + 1]  # (C, M, K)
    expected = torch.einsum("cmk,ock->om", taken, layer.conv1d_layer.weight)
    close(y[0], expected + layer.conv1d_layer.bias[:, None])
    assert records[0].at(4).query.tolist() == [4.0]


def test_attention_weighs_by_what_it_says():
    torch.manual_seed(0)
    layer = Conv2d_NN_Attn(3, 4, K=5).eval()
    x = torch.randn(2, 3, 6, 7)
    with record_neighbors(layer) as records:
        y = layer(x)
    record = records[0]
    close(record.weights.sum(-1), torch.ones_like(record.weights[..., 0]))
    v = F.conv2d(x, layer.w_v.weight[..., None])
    taken = at_positions(v, all_positions(record, 2)[:, 0])
    summed = torch.einsum("bmkc,bmk->bmc", taken, record.weights[:, 0])
    expected = F.linear(
        F.linear(summed, layer.pointwise_conv.weight[..., 0], layer.pointwise_conv.bias),
        layer.w_o.weight[..., 0],
    )
    close(y.flatten(2).mT, expected)


def test_beside_stands_what_location_and_features_take():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 9, 9)
    with record_neighbors(nn.ModuleList([a := Conv2d_NN(3, 4, K=9)])) as records:
        a(x)
    seen = records[0].at(4, 6)
    window = {(float(i), float(j)) for i in (3, 4, 5) for j in (5, 6, 7)}
    assert {tuple(p) for p in seen.beside["Loc"].tolist()} == window
    assert seen.positions[0, 0].tolist() == [4, 6]
    b = Conv2d_NN(3, 4, K=9, similarity_type="Loc", magnitude_type="euclidean")
    with record_neighbors(b) as others:
        b(x)
    assert {tuple(p) for p in others[0].at(4, 6).positions[0].tolist()} == window
    b.similarity_type, b.magnitude_type = "Col", "cosine"
    with record_neighbors(b) as again:
        b(x)
    c = Conv2d_NN(3, 4, K=9, similarity_type="Loc")
    with record_neighbors(c) as last:
        c(x)
    assert torch.equal(last[0].beside["Col"], again[0].indices[:, 0])
    assert list(last[0].beside) == ["Col"]


def test_positions_are_those_of_the_image():
    torch.manual_seed(0)
    network = nn.Sequential(nn.MaxPool2d(2), Conv2d_Branching(3, 8, K=3), nn.AvgPool2d(2))
    with record_neighbors(network) as records:
        network(torch.randn(2, 3, 16, 24))
    assert [r.name for r in records] == ["1.branch1"]
    seen = records[0].at(7, 22, shape=(16, 24), sample=1)
    assert seen.query.tolist() == [6.5, 22.5]
    assert seen.extent.tolist() == [2, 2]
    taken = records[0].indices[1, 0, 3 * 12 + 11]
    close(seen.positions[0], records[0].places[taken] * 2 + 0.5)
    with pytest.raises(ValueError, match=r"\(16, 0\) lies outside the image of 16 x 24"):
        records[0].at(16, 0, shape=(16, 24))
    with pytest.raises(ValueError, match=r"1.branch1 has a map of 2 axes \(8, 12\)"):
        records[0].at(3)


def test_recording_changes_nothing_and_ends():
    layer = Conv2d_NN(3, 4, K=5, sampling_type="random", num_samples=20)
    other = Conv2d_NN(3, 4, K=5)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    results = []
    for records_it in (False, True):
        torch.manual_seed(1)
        if records_it:
            with record_neighbors(layer) as records:
                y = layer(x)
                other(x)  # no layer of the network that is looked at
        else:
            y = layer(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        results.append((y, grad, torch.rand(1)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    layer(x)
    assert len(records) == 1


def test_compiled_networks_are_seen():
    torch.manual_seed(0)
    layer = Conv2d_NN(3, 4, K=5)
    x = torch.randn(1, 3, 6, 6)
    expected = layer(x)
    layer.compile(fullgraph=True, backend="eager")
    close(layer(x), expected)
    with record_neighbors(layer) as records:
        layer(x)
    assert len(records) == 1
    close(layer(x), expected)
    assert len(records) == 1


TOKENS = {
    "Attention": Attention,
    "Kvt": lambda **sizes: KvtAttention(K=5, **sizes),
    "Neighborhood": lambda **sizes: Neighborhood(K=5, **sizes),
    "Local": lambda **sizes: LocalAttention(window_size=4, **sizes),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_token_layers_weigh_what_they_say(kind):
    torch.manual_seed(0)
    layer = TOKENS[kind](width=6, num_heads=2).eval()
    x = torch.randn(2, 10, 6)
    with record_neighbors(layer) as records:
        y = layer(x)
    (record,) = records
    assert (record.group, record.num_groups) == ("head", 2)
    if kind == "Attention":
        v, last = layer.W_v(x), layer.W_o
    elif kind == "Local":
        v, last = layer.to_qkv(x).chunk(3, 2)[2], layer.to_out
    else:
        v, last = layer.qkv(x).chunk(3, 2)[2], layer.proj
    v = v.unflatten(2, (2, 3)).transpose(1, 2)  # (B, h, N, D)
    indices = record.indices.expand(2, 2, -1, -1)
    taken = torch.stack([v[b, h][indices[b, h]] for b in range(2) for h in range(2)])
    summed = (taken.unflatten(0, (2, 2)) * record.weights[..., None]).sum(3)
    close(last(summed.transpose(1, 2).flatten(2)), y)


def test_convnn_attention_and_branches_of_tokens():
    torch.manual_seed(0)
    layer = BranchAttention(8, 2, K=3).eval()
    with record_neighbors(layer) as records:
        layer(torch.randn(1, 7, 8))
    assert [r.name for r in records] == ["convnn", "attention"]
    assert records[0].indices.shape == records[0].weights.shape == (1, 2, 7, 3)
    close(records[0].weights.sum(-1), torch.ones(1, 2, 7))
    sampled = ConvNNAttention(8, 2, K=3, sampling_type="random", num_samples=4)
    with record_neighbors(sampled) as records:
        sampled(torch.randn(1, 7, 8))
    assert torch.equal(records[0].indices[0, 0, :, 0], torch.arange(7))  # itself first


def test_the_tokens_of_a_vit_lie_on_its_patches():
    torch.manual_seed(0)
    model = ViT(
        layer=lambda **sizes: KvtAttention(K=4, **sizes),
        image_size=(16, 24),
        patch_size=8,
        num_layers=2,
        d_hidden=8,
        num_heads=2,
        d_mlp=8,
    ).eval()
    with record_neighbors(model) as records:
        model(torch.randn(1, 3, 16, 24))
    assert [r.name for r in records] == [f"transformer_encoder.{i}.attention" for i in range(2)]
    seen = records[0].at(12, 20, shape=(16, 24))
    assert seen.query.tolist() == [11.5, 19.5]  # the sixth patch: the seventh token
    order = records[0].weights[0, 1, 6].argsort(descending=True)
    tokens = records[0].indices[0, 1, 6][order]
    close(seen.positions[1], records[0].places[tokens] * 8 + 3.5, equal_nan=True)
    assert torch.isnan(records[0].places[0]).all()  # the class token
    assert seen.extent.tolist() == [8, 8]


def slow_nearest_patches(x, block, query):
    """Patches of a padded image, nearest to one of them first, by the sum of squares."""
    agg = block.n3aggregation
    grid = agg.grid(*x.shape[2:])
    padded = grid.pad(x)[0]
    size, step = agg.patch_size, agg.stride
    row, col = divmod(query, grid.cols)
    window = min(agg.window, grid.rows), min(agg.window, grid.cols)
    top = min(max(row - window[0] // 2, 0), grid.rows - window[0])
    left = min(max(col - window[1] // 2, 0), grid.cols - window[1])

    def patch(i, j):
        return padded[:, i * step : i * step + size, j * step : j * step + size]

    found = []
    for i in range(top, top + window[0]):
        for j in range(left, left + window[1]):
            if (i, j) != (row, col):
                d = (patch(i, j) - patch(row, col)).square().sum().item()
                found.append((d, i * grid.cols + j))
    return [index for _, index in sorted(found)]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("size", "stride", "sides"), [(4, 2, (13, 22)), (5, 3, (17, 14))])
def test_the_patches_of_a_hard_block(monkeypatch, compiled, size, stride, sides):
    if not compiled:
        monkeypatch.setattr(Windows, "usable", staticmethod(lambda *_: False))
    torch.manual_seed(0)
    block = KNNBlock(K=3, patch_size=size, stride=stride, window=5)
    x = torch.randn(1, 2, *sides)
    with torch.no_grad(), record_neighbors(block) as records:
        y = block(x)
    close(y, block(x))
    (record,) = records
    assert record.name == "n3aggregation"
    assert (record.group, record.num_groups, record.extent) == ("volume", 3, size)
    grid = block.n3aggregation.grid(*sides)
    top, _, left, _ = grid.pads
    for query in (0, 7, len(record.queries) - 1):
        expected = slow_nearest_patches(x, block, query)[:3]
        heaviest = record.weights[0, :, query].argmax(-1)
        assert record.indices[0, 0, query][heaviest].tolist() == expected
        row, col = divmod(query, grid.cols)
        middle = (size - 1) / 2
        center = [row * stride - top + middle, col * stride - left + middle]
        assert record.queries[query].tolist() == center
    seen = record.at(6, 6, shape=sides)
    assert seen.positions.shape == (3, record.indices.shape[-1], 2)
    close(seen.weights[:, :2], torch.tensor([[1.0, 0.0]] * 3))


@pytest.mark.parametrize("training", [False, True])
def test_the_weights_of_a_neural_block_are_those_of_both_paths(monkeypatch, training):
    torch.manual_seed(0)
    block = N3Block(2, K=2, patch_size=4, stride=2, window=3, embed_features=4)
    block.train(training)
    x = torch.randn(2, 2, 16, 12)
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(Windows, "usable", staticmethod(lambda *_: False))
        with record_neighbors(block) as records:
            block(x)
        record = records[0]
        table = torch.zeros(2, 2, len(record.queries), len(record.places))
        indices = record.indices.expand_as(record.weights)
        found.append(table.scatter_add_(3, indices, record.weights))
    close(found[0], found[1])
    close(found[0].sum(-1), torch.ones_like(found[0][..., 0]))


def test_sets():
    layer = N3Aggregation(HardNeighbors(2))
    items, queries = torch.tensor([[[0.0], [5.0], [2.0]]]), torch.tensor([[[4.5], [0.5]]])
    with record_neighbors(layer) as records:
        layer(items, items, queries, torch.arange(3).expand(2, 3))
    seen = records[0].at(0)
    assert seen.positions[:, 0, 0].tolist() == [1, 2]  # the nearest of each volume
