"""What can be known before a run: of its YAML, its layout, its data and its checkpoint."""

from __future__ import annotations

from mindformers_glm32k.lazy import face

_FACE = {
    "Finding": "findings",
    "raise_errors": "findings",
    "all_findings": "check",
    "findings_of_yaml": "check",
    "mended": "check",
    "is_for_this_plugin": "stale",
    "weights_findings": "rules",
    "check_config": "run_config",
    "config_findings": "run_config",
    "check_run_layout": "run_config",
    "check_dataset": "data",
    "check_packing": "data",
    "check_checkpoint": "checkpoint",
    "check_finite": "checkpoint",
}
__all__ = list(_FACE)
__getattr__ = face(__name__, _FACE)
