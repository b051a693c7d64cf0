"""Two views of a scene: epipolar distances, poses, and scenes made up at random.

Camera 1 looks along z from the origin; a point X of it is R X + t in camera 2. Matches (x, y, x',
y') are in normalised camera coordinates.
"""

import torch
from torch import Tensor

__all__ = [
    "check_rotation",
    "draw_scene",
    "epipolar_distances",
    "essential_matrix",
    "pose_errors",
    "recover_pose",
]

INLIER = 1e-4  # symmetric epipolar distance below which a match is right, as published


def essential_matrix(rotation: Tensor, translation: Tensor) -> Tensor:
    """Return E = [t]× R of Frobenius norm 1, (…, 3, 3)."""
    x, y, z = translation.double().unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).unflatten(-1, (3, 3))
    matrix = cross @ rotation.double()
    return matrix / matrix.flatten(-2).norm(dim=-1)[..., None, None]


def epipolar_distances(matches: Tensor, essential: Tensor) -> Tensor:
    """Return symmetric epipolar distances, squared, of matches (…, N, 4) to E (…, 3, 3).

    (x'ᵀ E x)² (1 / ‖(E x)₁₂‖² + 1 / ‖(Eᵀ x')₁₂‖²)
    """
    first, second = matches.double().split(2, -1)
    one = torch.ones_like(first[..., :1])
    first, second = torch.cat((first, one), -1), torch.cat((second, one), -1)
    lines = first @ essential.double().transpose(-1, -2)  # E x
    back = second @ essential.double()  # Eᵀ x'
    residual = (second * lines).sum(-1).square()
    slopes = [each[..., :2].square().sum(-1).clamp(min=1e-15) for each in (lines, back)]
    return residual * (1 / slopes[0] + 1 / slopes[1])


def recover_pose(essential: Tensor, matches: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rotation (B, 3, 3) and direction (B, 3) that put most matches before the cameras.

    Args:
        essential: (B, 3, 3).
        matches: (B, N, 4).
        chosen: Weight of each match in that vote (B, N).
    """
    u, _, vh = torch.linalg.svd(essential.double())
    u = u * torch.linalg.det(u)[:, None, None].sign()
    vh = vh * torch.linalg.det(vh)[:, None, None].sign()
    turn = u.new_tensor([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    rotations = [u @ turn @ vh, u @ turn.T @ vh]
    direction = u[..., 2]
    poses = [(r, s * direction) for r in rotations for s in (1, -1)]
    first, second = matches.double().split(2, -1)
    one = torch.ones_like(first[..., :1])
    first, second = torch.cat((first, one), -1), torch.cat((second, one), -1)
    votes = []
    for rotation, translation in poses:
        turned = first @ rotation.transpose(-1, -2)  # R x
        # z' x' = z R x + t: the cross product with x' leaves z, the one with R x leaves z'.
        away = translation[:, None].expand_as(turned)
        normal = torch.linalg.cross(second, turned)
        length = normal.square().sum(-1).clamp(min=1e-15)
        near = -(torch.linalg.cross(second, away) * normal).sum(-1) / length
        far = -(torch.linalg.cross(turned, away) * normal).sum(-1) / length
        votes.append((((near > 0) & (far > 0)) * chosen).sum(-1))
    best = torch.stack(votes, -1).argmax(-1)
    at = torch.arange(len(best), device=best.device)
    return (
        torch.stack([r for r, _ in poses], 1)[at, best],
        torch.stack([t for _, t in poses], 1)[at, best],
    )


def pose_errors(
    rotation: Tensor, translation: Tensor, true_rotation: Tensor, true_translation: Tensor
) -> Tensor:
    """Return the larger of the angles, in degrees, that rotation and direction are off by, (B,).

    The direction is known up to its sign alone, as published: a line, not a ray.
    """
    relative = rotation.double().transpose(-1, -2) @ true_rotation.double()
    cosine = (relative.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    first = torch.nn.functional.normalize(translation.double(), dim=-1)
    second = torch.nn.functional.normalize(true_translation.double(), dim=-1)
    line = (first * second).sum(-1).abs()
    return torch.rad2deg(torch.arccos(torch.minimum(cosine, line).clamp(-1, 1)))


def check_rotation(matrix: Tensor) -> str | None:
    """Say why a matrix is no rotation; None if it is one."""
    if matrix.shape != (3, 3):
        return f"its shape is {tuple(matrix.shape)} instead of (3, 3)"
    off = (matrix.double() @ matrix.double().T - torch.eye(3, dtype=torch.float64)).abs().max()
    if not off <= 1e-3:
        return f"R Rᵀ differs from the identity by {off:.2g}"
    if torch.linalg.det(matrix.double()) < 0:
        return "its determinant is -1: it mirrors"
    return None


def draw_scene(
    num_matches: int,
    outliers: float,
    pixel_noise: float,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Make up points in view of two cameras, and matches of them, some wrong.

    The second camera is turned by up to 30 degrees about any axis, and moved to any side by a tenth
    to a third of the points' mean distance; they lie between 2 and 8 away. Views are one unit wide
    and high (53 degrees). A wrong match ends anywhere in the second picture.

    Args:
        num_matches: N.
        outliers: Share of wrong matches.
        pixel_noise: Standard deviation of positions, in pixels of a picture 1000 wide.
        generator: Source of randomness; None: the global one.

    Returns:
        ``xs`` (N, 4) float32, ``ys`` (N,) symmetric epipolar distances, ``R`` (3, 3), ``t`` (3,),
        all float64, and ``E`` (3, 3).
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    right = num_matches - round(outliers * num_matches)
    while True:
        axis = torch.nn.functional.normalize(normal(3), dim=0) * (uniform(1) * torch.pi / 6)
        x, y, z = axis.tolist()
        skew = axis.new_tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        rotation = torch.linalg.matrix_exp(skew)
        translation = torch.nn.functional.normalize(normal(3), dim=0) * (0.5 + uniform(1))
        count = 8 * right + 64
        depth = 2 + 6 * uniform(count, 1)
        first = uniform(count, 2) - 0.5
        points = torch.cat((first * depth, depth), 1)
        moved = points @ rotation.T + translation
        second = moved[:, :2] / moved[:, 2:]
        seen = (moved[:, 2] > 0.5) & (second.abs() <= 0.5).all(1)
        if seen.sum() >= max(right, 8):
            break  # the pictures overlap enough
    kept = seen.nonzero()[:right, 0]
    first = torch.cat((first[kept], uniform(num_matches - right, 2) - 0.5))
    second = torch.cat((second[kept], uniform(num_matches - right, 2) - 0.5))
    matches = torch.cat((first, second), 1)
    matches[:right] += normal(right, 4) * (pixel_noise / 1000)
    matches = matches[torch.randperm(num_matches, generator=generator)]
    essential = essential_matrix(rotation, translation)
    return {
        "xs": matches.float(),
        "ys": epipolar_distances(matches, essential),
        "R": rotation,
        "t": translation,
        "E": essential,
    }
