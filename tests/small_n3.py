"""A small N3Net, and the names and shapes of the published one."""

TINY = {
    "num_blocks": 1,
    "depth": 2,
    "features": 4,
    "block_channels": 2,
    "num_volumes": 2,
    "window": 5,
    "embed_channels": 2,
    "embed_features": 4,
    "embed_depth": 2,
}


def published_shapes():
    """Names and shapes of the published checkpoints, as they are documented."""
    shapes = {}

    def norm(prefix, n):
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{prefix}.{name}"] = (n,)

    for i, (nin, nout) in enumerate([(1, 8), (64, 8), (64, 1)]):
        shapes |= {f"blocks.{i}.conv1.weight": (64, nin, 3, 3), f"blocks.{i}.conv1.bias": (64,)}
        shapes |= {f"blocks.{i}.conv2.weight": (nout, 64, 3, 3), f"blocks.{i}.conv2.bias": (nout,)}
        norm(f"blocks.{i}.bn1", 64)
        for j in (0, 3, 6, 9):
            shapes[f"blocks.{i}.layer1.{j}.weight"] = (64, 64, 3, 3)
            norm(f"blocks.{i}.layer1.{j + 1}", 64)
    for i in range(2):
        for part, last in (("embedcnn", 8), ("tempcnn", 1)):
            shapes[f"nls.{i}.{part}.0.weight"] = (64, 8, 3, 3)
            shapes[f"nls.{i}.{part}.3.weight"] = (64, 64, 3, 3)
            shapes[f"nls.{i}.{part}.6.weight"] = (last, 64, 3, 3)
            shapes[f"nls.{i}.{part}.6.bias"] = (last,)
            norm(f"nls.{i}.{part}.1", 64)
            norm(f"nls.{i}.{part}.4", 64)
        norm(f"nls.{i}.n3aggregation.aggregation.nnn.bn", 1)
    return shapes
