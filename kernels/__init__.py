"""Decayed linear attention (Lightning Attention-2): one public operator over Triton and PyTorch backends."""

from kernels.lightning_attention import default_backend, lightning_attention, lightning_attention_step

__all__ = ["default_backend", "lightning_attention", "lightning_attention_step"]
