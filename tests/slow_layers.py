"""The ConvNN formulas as plain loops over positions, slow and in float64, to compare against.

Positions of the padded map are tuples; `number` counts them row by row.
"""

import itertools
import math
from fractions import Fraction

import torch


def unshuffle(x, r):
    dims = x.dim() - 2
    parts = []
    for c in range(x.shape[1]):
        for offset in itertools.product(range(r), repeat=dims):
            parts.append(x[(slice(None), c, *[slice(o, None, r) for o in offset])])
    return torch.stack(parts, 1)


def shuffle(x, r):
    dims = x.dim() - 2
    out = x.new_zeros(x.shape[0], x.shape[1] // r**dims, *[s * r for s in x.shape[2:]])
    channel = 0
    for c in range(out.shape[1]):
        for offset in itertools.product(range(r), repeat=dims):
            out[(slice(None), c, *[slice(o, None, r) for o in offset])] = x[:, channel]
            channel += 1
    return out


def coordinate(i, side):
    return -1.0 if side == 1 else -1 + 2 * i / (side - 1)


class Grid:
    """The padded map of one input: features, coordinates, queries, candidates."""

    def __init__(self, x, padding, stride):
        self.x, self.padding, self.stride = x, padding, stride
        self.sides = [s + 2 * padding for s in x.shape[2:]]
        self.positions = list(itertools.product(*map(range, self.sides)))
        self.inner = [range(padding, s - padding) for s in self.sides]
        self.queries = list(itertools.product(*[r[::stride] for r in self.inner]))

    def number(self, position):
        n = 0
        for i, side in zip(position, self.sides, strict=True):
            n = n * side + i
        return n

    def features(self, b, position):
        if any(i not in r for i, r in zip(position, self.inner, strict=True)):
            return self.x.new_zeros(self.x.shape[1])
        return self.x[(b, slice(None), *[i - self.padding for i in position])]

    def coordinates(self, position):
        pairs = list(zip(position, self.sides, strict=True))
        return self.x.new_tensor([coordinate(i, s) for i, s in reversed(pairs)])

    def spatial(self, n, sample_padding):
        """Numbers of the sampling grid, None for all."""
        sides = self.x.shape[2:]
        if n > min(sides):
            return None
        lines = []
        for side in sides:
            span = side - 1 - 2 * sample_padding
            if span < 0:
                return None
            at = {math.floor(sample_padding + Fraction(i * span, max(1, n - 1))) for i in range(n)}
            lines.append(sorted(self.padding + i for i in at))
        return [self.number(p) for p in itertools.product(*lines)]


def similarity(a, b, metric):
    """Larger is nearer."""
    if metric == "euclidean":
        return -float(((a - b) ** 2).sum())
    norm = max(float(a.norm()), 1e-12) * max(float(b.norm()), 1e-12)
    return float(a @ b) / norm


def check_choice(grid, chosen, pairs, metric, K, candidates, ascending):
    """Assert that `chosen` (B, M, K) are neighbors as the formulas want them.

    `pairs(b, i, j)` gives the features of query i and key j.
    """
    everyone = range(len(grid.positions)) if candidates is None else candidates
    for b, m in itertools.product(range(grid.x.shape[0]), range(len(grid.queries))):
        own = grid.number(grid.queries[m])
        row = chosen[b, m].tolist()
        assert len(set(row)) == K, "neighbors are distinct"
        scores = {j: similarity(*pairs(b, own, j), metric) for j in {*everyone, own}}
        others = sorted((s for j, s in scores.items() if j != own), reverse=True)[: K - 1]
        if ascending:
            assert row == sorted(row)
            assert own in row
            best = sorted((j for j in scores if j != own), key=lambda j: (-round(scores[j], 9), j))
            assert row == sorted([own, *best[: K - 1]]), "ties go to the lower index"
            continue
        assert row[0] == own, "a position is its own first neighbor"
        got = [scores[j] for j in row[1:]]
        for a, c in zip(got, others, strict=True):
            assert abs(a - c) < 1e-9, "best first, none left out"


def convnn(layer, x, candidates=None):
    """Loop through `_ConvNN`, checking its choice of neighbors on the way."""
    r_in, r_out = layer.scale_in, layer.scale_out
    inside = unshuffle(x, r_in) if r_in > 1 else x
    grid = Grid(inside, layer.padding, layer.stride)
    b_all, dims = x.shape[0], inside.dim() - 2
    if layer.sampling_type == "spatial":
        candidates = grid.spatial(layer.num_samples, layer.sample_padding)

    everything = [
        torch.stack([grid.features(b, p) for p in grid.positions]).detach() for b in range(b_all)
    ]
    spreads = []
    for f in everything:  # unbiased, over channels and padded positions
        flat = f.flatten()
        spreads.append(float(((flat - flat.mean()) ** 2).sum() / (len(flat) - 1)) ** 0.5 + 1e-6)

    def described(b, number):
        p = grid.positions[number]
        f, c = everything[b][number], grid.coordinates(p)
        if layer.similarity_type == "Col":
            return f
        if layer.similarity_type == "Loc":
            return c
        lam = layer.lambda_param
        return torch.cat([lam * f / spreads[b], (1 - lam) * c])

    keys, key_shape = layer.pad_and_flatten(x)
    state = torch.get_rng_state()
    chosen = layer.find_neighbors(keys.detach(), key_shape)
    torch.set_rng_state(state)
    chosen = chosen.expand(b_all, -1, -1)
    loc = layer.similarity_type == "Loc" and layer.K > 1
    check_choice(
        grid,
        chosen,
        lambda b, i, j: (described(b, i), described(b, j)),
        layer.magnitude_type,
        layer.K,
        candidates,
        loc,
    )
    weight, bias = layer.conv1d_layer.weight, layer.conv1d_layer.bias
    samples = []
    for b in range(b_all):
        columns = []
        for m in range(len(grid.queries)):
            y = bias
            for k in range(layer.K):
                p = grid.positions[int(chosen[b, m, k])]
                f = grid.features(b, p)
                if layer.aggregation_type == "Loc_Col":
                    f = torch.cat([f, grid.coordinates(p)])
                y = y + weight[:, :, k] @ f
            columns.append(y)
        samples.append(torch.stack(columns, 1))
    y = torch.stack(samples)
    y = y.reshape(*y.shape[:2], *[len(r[:: layer.stride]) for r in grid.inner])
    assert y.dim() == dims + 2
    return shuffle(y, r_out) if r_out > 1 else y


def attention(layer, x, candidates=None):
    """Loop through `_ConvNNAttention` (without dropout), checking its choice on the way."""
    inside = unshuffle(x, layer.scale_in) if layer.scale_in > 1 else x
    grid = Grid(inside, layer.padding, layer.stride)
    if layer.sampling_type == "spatial":
        candidates = grid.spatial(layer.num_samples, layer.sample_padding)
    w_q, w_k, w_v = (w.weight[:, :, 0] for w in (layer.w_q, layer.w_k, layer.w_v))
    q, k, v = {}, {}, {}
    for b in range(x.shape[0]):
        for n, p in enumerate(grid.positions):
            f = grid.features(b, p)
            if layer.aggregation_type == "Loc_Col":
                f = torch.cat([f, grid.coordinates(p)])
            q[b, n], k[b, n], v[b, n] = w_q @ f, w_k @ f, w_v @ f
    own = [grid.number(p) for p in grid.queries]
    state = torch.get_rng_state()
    chosen = layer.find_neighbors(
        torch.stack([torch.stack([k[b, i] for i in own]) for b in range(x.shape[0])]).detach(),
        torch.stack(
            [torch.stack([q[b, n] for n in range(len(grid.positions))]) for b in range(x.shape[0])]
        ).detach(),
        torch.tensor(own),
        tuple(grid.sides),
    ).expand(x.shape[0], -1, -1)
    torch.set_rng_state(state)
    check_choice(
        grid,
        chosen,
        lambda b, i, j: (k[b, i].detach(), q[b, j].detach()),
        layer.magnitude_type,
        layer.K,
        candidates,
        False,
    )
    depthwise = layer.conv1d_layer
    samples = []
    for b in range(x.shape[0]):
        columns = []
        for m, i in enumerate(own):
            scores = []
            for j in chosen[b, m].tolist():
                a, c = k[b, i], q[b, j]
                if layer.magnitude_type == "euclidean":
                    scores.append(a.new_tensor(0.1) if j == i else -((a - c) ** 2).sum())
                else:
                    cosine = (a / a.norm().clamp(min=1e-12)) @ (c / c.norm().clamp(min=1e-12))
                    scores.append(a.new_tensor(1.1) if j == i else cosine)
            e = torch.stack([s.exp() for s in scores])
            e = e / e.sum()
            y = depthwise.bias
            for n, j in enumerate(chosen[b, m].tolist()):
                y = y + depthwise.weight[:, 0, n] * e[n] * v[b, j]
            y = layer.pointwise_conv.weight[:, :, 0] @ y + layer.pointwise_conv.bias
            columns.append(layer.w_o.weight[:, :, 0] @ y)
        samples.append(torch.stack(columns, 1))
    y = torch.stack(samples)
    y = y.reshape(*y.shape[:2], *[len(r[:: layer.stride]) for r in grid.inner])
    return shuffle(y, layer.scale_out) if layer.scale_out > 1 else y


def conv(x, weight, bias, padding, stride):
    """Loop through a zero-padded convolution with a weight (O, C, k, ...)."""
    grid = Grid(x, padding, stride)
    offsets = list(itertools.product(*map(range, weight.shape[2:])))
    samples = []
    for b in range(x.shape[0]):
        columns = []
        for p in grid.queries:
            y = bias
            for o in offsets:
                at = tuple(i + d - padding for i, d in zip(p, o, strict=True))
                if at in grid.positions:
                    y = y + weight[(slice(None), slice(None), *o)] @ grid.features(b, at)
            columns.append(y)
        samples.append(torch.stack(columns, 1))
    y = torch.stack(samples)
    return y.reshape(*y.shape[:2], *[len(r[::stride]) for r in grid.inner])


def assert_same(layer, x, slow):
    """Compare values and gradients of `layer` with those of `slow(x)`."""
    x = x.detach().requires_grad_()
    inputs = [x, *layer.parameters()]
    state = torch.get_rng_state()
    fast = layer(x)
    torch.set_rng_state(state)
    expected = slow(x)
    torch.testing.assert_close(fast, expected, rtol=1e-9, atol=1e-9)
    upstream = torch.randn(fast.shape, dtype=fast.dtype)
    got = torch.autograd.grad((fast * upstream).sum(), inputs, allow_unused=True)
    want = torch.autograd.grad((expected * upstream).sum(), inputs, allow_unused=True)
    for g, w, p in zip(got, want, inputs, strict=True):
        zero = torch.zeros_like(p)
        torch.testing.assert_close(
            zero if g is None else g, zero if w is None else w, rtol=1e-8, atol=1e-8
        )


def autograd_rounds(logits, K):
    """Weights of the relaxed selection, straight from its formulas."""
    alpha, out = logits, []
    for _ in range(K):
        w = torch.softmax(alpha, -1)
        out.append(w)
        alpha = alpha + torch.log1p(-w)
    return torch.stack(out, -2)
