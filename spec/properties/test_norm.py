# May import: standard library, numpy, refswitch, its own folder.
"""RMSNorm: T-NORM-1."""

from __future__ import annotations

from properties.operations import Operations, Scene, assert_equal, operation, powers, scenes, truth


@operation("T-NORM-1", scene=scenes("BLD", points=truth), power=powers())
def test_norm_forward__linear_in_scale(ops: Operations, scene: Scene, power: float) -> None:
    """A scale times 2^k is an output times 2^k, to the bit."""
    x_BLD, scale_D = scene.normal("BLD"), scene.normal("D")
    one_BLD, _ = ops.norm_forward(x_BLD, scale_D, 2.0**-20, scene.points)
    other_BLD, _ = ops.norm_forward(x_BLD, power * scale_D, 2.0**-20, scene.points)
    assert_equal(other_BLD, power * one_BLD, "y_BLD")
