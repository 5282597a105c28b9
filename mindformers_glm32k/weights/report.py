"""The report of a conversion: what was read, what was written, and a checksum of every tensor."""

import json

from mindformers_glm32k.files import atomic_path
from mindformers_glm32k.weights.model_dims import sizes_as_dict


def make_report(source, output, job, digests, skipped, sizes, config):
    """Collects the report.

    Args:
        source (source.Source): what was read.
        output (pathlib.Path): as named to the user.
        job (job.Job): what was written.
        digests (dict[str, list]): SHA-256 and CRC-32 of each tensor's values, from job.run().
        skipped (list[str]): names in the source that are no weights.
        sizes (sizes.Sizes): of the model.
        config (dict | None): its config.json, for the way back.

    Returns:
        dict: JSON-ready.
    """
    files, groups = job.files, job.groups
    holder = {name: file.name for file in files for name in file.segments}
    tensors = {}
    for group in groups:
        for target in group.targets:
            tensors[target.name] = {
                "file": holder[target.name],
                "shape": list(target.shape),
                "dtype": target.dtype,
                "sha256": digests[target.name][0],
                "crc32": f"{digests[target.name][1]:08x}",
                "from": list(dict.fromkeys(move.source.name for move in group.moves if move.target is target)),
            }
    order = [name for file in files for name in file.segments]
    return {
        "source": {"path": str(source.path), "files": {file.name: file.stat().st_size for file in source.files}},
        "output": {"path": str(output), "files": {file.name: file.size for file in files}},
        "fingerprint": job.fingerprint(),
        "checksums": "of the little-endian values, without the file format's framing",
        "tensor_bytes": sum(target.nbytes for group in groups for target in group.targets),
        "sizes": sizes_as_dict(sizes),
        "skipped": skipped,
        "huggingface_config": config,
        "tensors": {name: tensors[name] for name in order},
    }


def write_report(path, report):
    """Writes a report as JSON; readers never see half of it."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_report(path):
    """Reads a report back; None when there is none or it cannot be read."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def is_done(job, path):
    """Whether a report tells of the same conversion from the same files, and its output is still there.

    Args:
        job (job.Job): the conversion about to start.
        path (pathlib.Path): the report.

    Returns:
        bool
    """
    report = load_report(path)
    return (
        report is not None
        and report.get("fingerprint") == job.fingerprint()
        and all(
            (job.destination / file.name).is_file() and (job.destination / file.name).stat().st_size == file.size
            for file in job.files
        )
    )
