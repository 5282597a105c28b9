"""All findings of `glm32k check` in one list; and the YAML with those mended whose fix is certain."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mindformers_glm32k import compat
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.preflight.checkpoint import checkpoint_findings
from mindformers_glm32k.preflight.data import disk_findings, records_findings, schedule_findings
from mindformers_glm32k.preflight.findings import ERROR, SEVERITIES, WARNING, Finding, apply_edits
from mindformers_glm32k.preflight.rules import TRAINS, checkpoint_of, is_template, layout_findings, weights_findings
from mindformers_glm32k.preflight.run_config import config_findings
from mindformers_glm32k.weights.config_json import dims_of_run
from mindformers_glm32k.weights.names import model_keys

# sections that MindFormers fills in where a YAML lacks them
DEFAULTED = ("runner_config", "runner_wrapper", "optimizer", "lr_schedule")
_ROUNDS = 5  # an edit can bring the next finding to light


def all_findings(config: Mapping[str, Any], run_mode: str) -> list[Finding]:
    """Findings of every kind about a configuration as the YAML and the command line have it, the errors first.

    Layout, records, checkpoint, steps and disk are checked only where keys and values have no errors.
    """
    found = config_findings(config, run_mode, (), DEFAULTED)
    readable = not any(finding.severity == ERROR for finding in found)
    found += [Finding(WARNING, what, value, fix) for what, value, fix in compat.version_problems()]
    found += weights_findings(config, run_mode)
    if readable:
        found += [*layout_findings(config), *_of_files(config, run_mode)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def findings_of_yaml(written: Mapping[str, Any], run_mode: str | None = None) -> list[Finding]:
    """Findings about a YAML that MindFormers fails to read: its keys and values alone, no data and no checkpoint."""
    return config_findings(written, run_mode or str(written.get("run_mode")), (), DEFAULTED)


def _of_files(config, run_mode):
    found, records = [], None
    sections = {"eval": ["eval_dataset"]}.get(run_mode, ["train_dataset"] if run_mode in TRAINS else [])
    if run_mode in TRAINS and config.get("do_eval") is True:
        sections.append("eval_dataset")
    for section in sections:
        if (config.get(f"{section}_task") or {}).get("type") == "GLM32KDataset":
            more, count = records_findings(config, section)
            found += more
            records = count if section == "train_dataset" else records
    path = checkpoint_of(config)
    try:
        dims = dims_of_run(config, "model_config")
    except InputError as error:
        return [*found, Finding(ERROR, "model.model_config", str(error))]
    if path:
        found += checkpoint_findings(path, config, dims)
    if run_mode in TRAINS and records is not None:
        found += schedule_findings(config, records)
    if run_mode in TRAINS and not is_template(config, run_mode):
        keys = model_keys(dims.num_layers, dims.qkv_bias, True, True)
        parameters = sum(_values_of(dims.shape(key)) for key in keys)
        found += disk_findings(config, parameters)
    return found


def _values_of(shape):
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def mended(config: Mapping[str, Any], run_mode: str) -> tuple[dict, list[str]]:
    """A copy of the configuration with every certain edit made, and a line for each."""
    config, lines = copy.deepcopy(dict(config)), []
    for _ in range(_ROUNDS):
        config, done = apply_edits(config, config_findings(config, run_mode, (), DEFAULTED))
        lines += done
        if not done:
            break
    return config, lines
