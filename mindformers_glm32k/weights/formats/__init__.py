"""File formats of checkpoints: each module lists a file's tensors without their values, and frames those to write."""

__all__ = ["ckpt", "safetensors", "torch_bin"]
