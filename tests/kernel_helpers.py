"""Inputs of attention, and how far a result is off, for the tests of its kernels."""

import torch

# Slow (weights split around their mean), usual, none, and one whose inverse powers overflow fp32 in a chunk.
SLOPES = [0.02, 0.3, 0.0, 9.0]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5 if DEVICE == "cuda" else 1e-6  # fp32; the GPU's exp2 is approximate


def make_inputs(B, N, H, Dk, Dv, num_states=None, device=DEVICE, dtype=torch.float32, seed=0):
    """q, k, v, initial_state, and gradients of o and of the final state; slopes."""
    generator = torch.Generator(device).manual_seed(seed)
    state = (num_states or B, H, Dk, Dv)
    shapes = [(B, N, H, Dk), (B, N, H, Dk), (B, N, H, Dv), state, (B, N, H, Dv), state]
    dtypes = [dtype, dtype, dtype, torch.float32, dtype, torch.float32]
    tensors = [
        torch.randn(s, device=device, generator=generator).to(d) for s, d in zip(shapes, dtypes, strict=True)
    ]
    slopes = torch.tensor((SLOPES * H)[:H], device=device)
    return tensors, slopes


def relative_error(result, truth):
    return float((result.double() - truth).norm() / truth.norm().clamp(min=1e-30))
