"""Graph layers against loops over nodes and edges, written from the formulas in float64."""

import pytest
import torch
import torch.nn.functional as F

from layers import GRAPH_LAYERS

pytestmark = pytest.mark.usefixtures("one_thread")


def grouped(linear, vector):
    """Map one vector by the matrix whose blocks are the groups' weights."""
    return torch.block_diag(*linear.weight.chunk(linear.groups)) @ vector


def joined(linear, a, b):
    """Every group's part of a, then of b."""
    pairs = zip(a.chunk(linear.groups), b.chunk(linear.groups), strict=True)
    return torch.cat([torch.cat(pair) for pair in pairs])


def normed(norm, rows):
    """Batch norm in training, or by running statistics."""
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        mean, variance = rows.mean(0), rows.var(0, unbiased=False)
    return (rows - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def slow(name, layer, x, indices, keys, present):
    """The layer by loops; rows of nodes that are not there are zeros."""
    nodes = [(i, m) for i in range(x.shape[0]) for m in range(x.shape[1]) if present[i, m]]
    linear, own = layer.linear, keys is x
    if name == "GraphSAGE":
        there = present if own else torch.ones(keys.shape[:2], dtype=torch.bool)
        inner = torch.stack([grouped(layer.inner_linear, row) for row in keys[there]])
        mapped = torch.zeros_like(keys)
        mapped[there] = F.gelu(normed(layer.inner_norm, inner))
        keys = mapped
    rows = []
    for i, m in nodes:
        found = [keys[i, j] for j in indices[i, m]]
        if name == "MaxRelative":
            most = torch.stack([k - x[i, m] for k in found]).amax(0)
            rows.append(grouped(linear, joined(linear, x[i, m], most)))
        elif name == "EdgeConv":
            rows += [grouped(linear, joined(linear, x[i, m], k - x[i, m])) for k in found]
        elif name == "GraphSAGE":
            rows.append(grouped(linear, joined(linear, x[i, m], torch.stack(found).amax(0))))
        else:
            rows.append(grouped(linear, (1 + layer.eps) * x[i, m] + sum(found)))
    y = normed(layer.norm, torch.stack(rows))
    if name == "EdgeConv":
        y = y.view(len(nodes), -1, y.shape[1]).amax(1)
    out = x.new_zeros(*x.shape[:2], y.shape[1])
    for row, (i, m) in zip(y, nodes, strict=True):
        out[i, m] = row
    return out


@pytest.mark.parametrize("name", GRAPH_LAYERS)
@pytest.mark.parametrize("case", ["nodes", "pooled keys", "unequal sizes"])
@pytest.mark.parametrize("training", [True, False])
def test_layers_match_loops(name, case, training):
    torch.manual_seed(0)
    layer = GRAPH_LAYERS[name](in_channels=4, out_channels=6, groups=2).double().train(training)
    for p in layer.parameters():  # gains of both signs
        p.data = torch.randn_like(p)
    layer.norm.running_mean.fill_(0.3)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    pooled, masked = case == "pooled keys", case == "unequal sizes"
    present = torch.ones(2, 5, dtype=torch.bool)
    if masked:
        present[1, 3:] = False
    indices = torch.randint(3, (2, 5, 3))
    got = layer(x, indices, keys if pooled else None, present if masked else None)
    expected = slow(name, layer, x, indices, keys if pooled else x, present)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    inputs = [x, *([keys] if pooled else []), *layer.parameters()]
    mine = torch.autograd.grad(got, inputs, upstream)
    want = torch.autograd.grad(expected, inputs, upstream)
    for m, w in zip(mine, want, strict=True):
        torch.testing.assert_close(m, w)


@pytest.mark.parametrize("name", GRAPH_LAYERS)
def test_gradcheck(name):
    torch.manual_seed(0)
    layer = GRAPH_LAYERS[name](in_channels=4, out_channels=4, groups=2).double()
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.stack([torch.randperm(5)[:3] for _ in range(5)])[None]
    assert torch.autograd.gradcheck(lambda x: layer(x, indices), x)


def test_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="groups 4 does not divide the 6 in_channels"):
        GRAPH_LAYERS["GIN"](in_channels=6, out_channels=8)
    with pytest.raises(ValueError, match="groups 3 does not divide the 4 out_channels"):
        GRAPH_LAYERS["GIN"](in_channels=6, out_channels=4, groups=3)


@pytest.mark.parametrize("name", GRAPH_LAYERS)
def test_mixed_precision(name):
    torch.manual_seed(0)
    layer = GRAPH_LAYERS[name](in_channels=8, out_channels=8, groups=2)
    x = torch.randn(2, 20, 8, requires_grad=True)
    indices = torch.randint(20, (2, 20, 4))
    expected = layer(x, indices)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x, indices)
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.1)
    got.float().square().sum().backward()
    assert x.grad.isfinite().all()
