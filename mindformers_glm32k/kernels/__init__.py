"""Portable cells that stand in for NPU-only kernels, one per file, and the substitution that puts them in place."""
