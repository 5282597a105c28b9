"""The keys of a `train_dataset` or `eval_dataset` section; GLM32KDataset's docstring says what they mean."""

from mindformers_glm32k.checks import boolean, choice, reject_unknown, whole_number, workers
from mindformers_glm32k.data.encode import ON_LONG_ANSWER, RAISE
from mindformers_glm32k.data.packing import COLUMNS as PACKED_COLUMNS
from mindformers_glm32k.data.truncation import TRUNCATIONS
from mindformers_glm32k.errors import InputError

ROW_COLUMNS = ["input_ids", "labels"]
SAMPLE, TOKEN = "sample", "token"
# Read here, with the value that stands for a missing key (None: needed, or nothing).
DEFAULTS = {
    "data_loader": None,
    "tokenizer": None,
    "input_columns": ROW_COLUMNS,
    "max_source_length": None,
    "max_target_length": None,
    "seq_length": None,
    "truncation": "middle",
    "on_long_answer": RAISE,
    "packing": False,
    "packing_window": 64,
    "rows_per_epoch": None,
    "documents_per_row": None,
    "loss_weights": SAMPLE,
    "sort_by_length": False,
    "pad_to_multiple_of": None,
    "cache_tokens": None,
    "cache_dir": None,
    "ignore_pad_token_for_loss": True,
    "batch_size": 8,
    "repeat": 1,
    "drop_remainder": True,
    "num_parallel_workers": 1,
    "python_multiprocessing": False,
    "seed": 0,
    "prefetch_size": 1,
    "numa_enable": False,
}
# What MindFormers' trainer writes into the section or reads from it; nothing for this class to do.
_HOST_KEYS = (
    "do_eval",
    "auto_tune",
    "filepath_prefix",
    "autotune_per_step",
    "profile",
    "micro_batch_num",
    "output_columns",
    "construct_args_key",
    "mixup_op",
)
KNOWN_KEYS = frozenset(DEFAULTS) | frozenset(_HOST_KEYS)


def checked(dataset_config):
    """A copy of the section with the defaults filled in.

    Args:
        dataset_config (dict): the `train_dataset` or `eval_dataset` section.

    Returns:
        MindFormerConfig

    Raises:
        InputError: names what is wrong with it.
    """
    from mindformers.tools.register import MindFormerConfig

    reject_unknown(dataset_config, KNOWN_KEYS, "dataset_config")
    given = {key: value for key, value in dataset_config.items() if value is not None}
    config = MindFormerConfig()
    config.update({**DEFAULTS, **given})
    row_length(config)
    for name in ("batch_size", "repeat", "prefetch_size", "packing_window"):
        whole_number(config[name], name, 1)
    for name in ("rows_per_epoch", "documents_per_row", "pad_to_multiple_of"):
        if config[name] is not None:
            whole_number(config[name], name, 1)
    config.num_parallel_workers = workers(config.num_parallel_workers, "num_parallel_workers")
    whole_number(config.seed, "seed", 0)
    for name in ("drop_remainder", "python_multiprocessing", "numa_enable", "packing", "sort_by_length"):
        boolean(config[name], name)
    choice(config.cache_tokens, "cache_tokens", (None, True, False))
    choice(config.loss_weights, "loss_weights", (SAMPLE, TOKEN))
    for name in ("sort_by_length", "pad_to_multiple_of") if config.packing else ("rows_per_epoch", "documents_per_row"):
        if config[name]:
            raise InputError(f"{name}: {config[name]!r} has no meaning with packing: {config.packing}; remove it")
    choice(config.truncation, "truncation", tuple(TRUNCATIONS))
    choice(config.on_long_answer, "on_long_answer", ON_LONG_ANSWER)
    columns = PACKED_COLUMNS if config.packing else ROW_COLUMNS
    if list(config.input_columns) not in (columns, ROW_COLUMNS):
        raise InputError(f"input_columns: {config.input_columns!r} is not {columns}, the columns there are")
    if config.ignore_pad_token_for_loss is not True:
        raise InputError(
            f"ignore_pad_token_for_loss: {config.ignore_pad_token_for_loss!r} is not True; "
            "padding is never trained on, remove the key"
        )
    for name in ("data_loader", "tokenizer"):
        if config[name] is None:
            raise InputError(f"{name}: missing; give a section with its type")
    return config


def row_length(dataset_config):
    """Tokens of a row: `seq_length` where it is given, else max_source_length + max_target_length + 1 (end token).

    Args:
        dataset_config (dict): the `train_dataset` or `eval_dataset` section.

    Returns:
        int

    Raises:
        InputError: lengths missing or no whole numbers, or seq_length smaller than source + target + 1.
    """
    source = whole_number(dataset_config.get("max_source_length"), "max_source_length", 1)
    target = whole_number(dataset_config.get("max_target_length"), "max_target_length", 1)
    needed, given = source + target + 1, dataset_config.get("seq_length")
    if given is None:
        return needed
    if whole_number(given, "seq_length", 1) < needed:
        raise InputError(
            f"seq_length={given} is smaller than max_source_length={source} + max_target_length={target} "
            f"+ 1 for the end token = {needed}; raise it or lower the lengths"
        )
    return given
