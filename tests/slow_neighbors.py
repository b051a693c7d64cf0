"""Search, aggregation and attention as loops and sorted scores in float64, to compare against."""

import itertools
import math

import torch
import torch.nn.functional as F


def scores_of(queries, keys, metric):
    """All pairs in float64, larger is nearer."""
    q, k = queries.double(), keys.double()
    if metric == "euclidean":
        return -(q[:, :, None] - k[:, None]).square().sum(-1)
    if metric == "cosine":
        q, k = (t / t.norm(dim=-1, keepdim=True).clamp(min=1e-12) for t in (q, k))
    return (q[:, :, None] * k[:, None]).sum(-1)


def check_found(
    values, indices, queries, keys, K, metric, own=None, exclude=False, candidates=None
):
    """Compare with the sorted rows of all scores: best first, each within 1e-6 of its rank."""
    b, n, c = keys.shape
    rows = queries
    if queries is None:
        rows = keys.gather(1, own.expand(b, -1)[..., None].expand(-1, -1, c))
    m = rows.shape[1]
    assert values.shape == indices.shape == (b, m, K)
    assert indices.dtype == torch.int64
    scores = scores_of(rows, keys, metric)
    tolerance = 1e-6 * max(1.0, float(scores.abs().max()))
    signed = -values.double() if metric == "euclidean" else values.double()
    torch.testing.assert_close(signed, scores.gather(2, indices), rtol=0, atol=4 * tolerance)
    assert all(len(set(row)) == K for row in indices.view(-1, K).tolist())
    allowed = torch.full((b, m, n), -math.inf, dtype=torch.float64)
    pool = torch.arange(n) if candidates is None else candidates
    pool = pool.expand(b, -1)[:, None].expand(-1, m, -1)
    allowed.scatter_(2, pool, scores.gather(2, pool))
    first = 0
    if own is not None:
        allowed.scatter_(2, own.expand(b, m)[..., None], -math.inf)
        if not exclude:
            first = 1
            assert torch.equal(indices[..., 0], own.expand(b, m))
    best = allowed.sort(dim=2, descending=True).values[..., : K - first]
    got = allowed.gather(2, indices[..., first:])
    torch.testing.assert_close(got, best, rtol=0, atol=tolerance)


def slow_aggregate(x, indices, weight, bias):
    b, m, K = x.shape[0], *indices.shape[-2:]
    indices = indices.expand(b, m, K)
    rows = []
    for i, j in itertools.product(range(b), range(m)):
        taps = [weight[:, :, t] @ x[i, indices[i, j, t]] for t in range(K)]
        rows.append(sum(taps) + (0 if bias is None else bias))
    return torch.stack(rows).view(b, m, -1)


def slow_attend(q, k, v, indices, weight, bias, metric, self_score, keep):
    b, m, K = k.shape[0], *indices.shape[-2:]
    out = []
    for i, j in itertools.product(range(b), range(m)):
        chosen = indices.expand(b, m, K)[i, j].tolist()
        pairs = [(k[i, j], q[i, t]) for t in chosen]
        if metric == "euclidean":
            s = [-(a - c).square().sum() for a, c in pairs]
        elif metric == "cosine":
            s = [F.cosine_similarity(a, c, dim=0) for a, c in pairs]
        else:
            s = [a @ c for a, c in pairs]
        if self_score is not None:
            s[0] = torch.full_like(s[0], self_score)
        a = torch.stack(s).softmax(0) * keep[i, j]
        out.append(sum(a[t] * weight[:, t] * v[i, chosen[t]] for t in range(K)) + bias)
    return torch.stack(out).view(b, m, -1)
