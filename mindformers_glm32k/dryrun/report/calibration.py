"""Published speeds, the programs behind them, and how far the estimate is from them.

Published for this model at 32768 tokens on 8 cards of an Atlas 800T A2, in tokens per second and card:
    1758, 1442, 1583   research/glm32k/glm32k.md of MindFormers on 28 June, 9 September and 26 October 2024, dp 2 x pp 4 with
                       recompute, 16 micro batches. One YAML, other versions of the software: they differ by 22 %.
    2501               Megatron on the same NPUs, cp 8 (Ulysses) without recompute. The public script for it (ModelLink, now
                       MindSpeed-LLM: examples/mcore/chatglm3/pretrain_chatglm3_6B_32K.sh) accumulates 32 rows a step.

CARD and ULYSSES are figures of compiled programs, as a report holds them, of one rank of each stage; both extrapolated from 2
and 4 layers a stage. CARD is the program of upstream's card: fp32 residual, vocabulary split over dp, whole logits,
`recompute_slice_activation`. ULYSSES is that of `finetune_glm32k_cp8.yaml` with 32 rows a step: what the second row of
`--runner_config.gradient_accumulation_steps 2` adds to the first, 31 times more. The YAML itself takes one row a step and pays
for the optimizer's communication with each.
"""

from dataclasses import dataclass

from mindformers_glm32k.dryrun.report.estimate import FRACTION, estimate
from mindformers_glm32k.dryrun.report.hardware import ATLAS_800T_A2


@dataclass(frozen=True)
class Published:
    """A published speed.

    Args:
        what (str): layout and source.
        speed (int): tokens per second and card.
        report (dict): the program that the estimate is made from.
    """

    what: str
    speed: int
    report: dict


def _program(stage, matmul, attention, moved, collectives):
    return {
        "rank": stage,
        "stage": stage,
        "work": {"matmul_flops": {"float16": matmul}, "attention_flops": {"float16": attention}, "vector_bytes": moved},
        "collectives": [
            {"kind": kind, "group_ranks": ranks, "bytes": size, "count": count}
            for kind, ranks, size, count in collectives
        ],
    }


CARD = {
    "config": "CARD",
    "world_size": 8,
    "tokens_per_step": 1048576,
    "layout_sizes": {"stages": 4, "micro_batches": 16},
    "programs": [
        _program(
            0,
            5.5762e15,
            4.4334e15,
            8.2318e12,
            [
                ("AllGather", (0,), 5.154e10, 96),
                ("Send", (0, 2), 8.590e09, 16),
                ("Receive", (0, 2), 8.590e09, 16),
                ("AllGather", (0, 1), 3.388e09, 29),
                ("ReduceScatter", (0, 1), 3.388e09, 29),
            ],
        ),
        _program(
            1,
            5.5762e15,
            4.4334e15,
            8.0979e12,
            [
                ("AllGather", (2,), 5.154e10, 96),
                ("Receive", (0, 2), 8.590e09, 16),
                ("Send", (2, 4), 8.590e09, 16),
                ("Receive", (2, 4), 8.590e09, 16),
                ("Send", (0, 2), 8.590e09, 16),
                ("AllGather", (2, 3), 2.855e09, 28),
                ("ReduceScatter", (2, 3), 2.855e09, 28),
            ],
        ),
        _program(
            2,
            5.5762e15,
            4.4334e15,
            8.0979e12,
            [
                ("AllGather", (4,), 5.154e10, 96),
                ("Receive", (2, 4), 8.590e09, 16),
                ("Send", (4, 6), 8.590e09, 16),
                ("Receive", (4, 6), 8.590e09, 16),
                ("Send", (2, 4), 8.590e09, 16),
                ("AllGather", (4, 5), 2.855e09, 28),
                ("ReduceScatter", (4, 5), 2.855e09, 28),
            ],
        ),
        _program(
            3,
            6.4140e15,
            4.4334e15,
            1.2176e13,
            [
                ("AllGather", (6,), 5.154e10, 96),
                ("AllGather", (6, 7), 1.145e10, 60),
                ("ReduceScatter", (6, 7), 1.145e10, 44),
                ("Receive", (4, 6), 8.590e09, 16),
                ("Send", (4, 6), 8.590e09, 16),
                ("AllReduce", (6, 7), 1.289e07, 71),
            ],
        ),
    ],
}
ULYSSES = {
    "config": "ULYSSES",
    "world_size": 8,
    "tokens_per_step": 1048576,
    "layout_sizes": {"stages": 1, "micro_batches": 1},
    "programs": [
        _program(
            0,
            4.7086e15,
            3.4482e15,
            1.3422e13,
            [
                ("AlltoAll", (0, 1, 2, 3, 4, 5, 6, 7), 4.467e11, 13312),
                ("AllGather", (0, 1, 2, 3, 4, 5, 6, 7), 1.249e10, 242),
                ("ReduceScatter", (0, 1, 2, 3, 4, 5, 6, 7), 1.249e10, 178),
                ("AllReduce", (0, 1, 2, 3, 4, 5, 6, 7), 1.192e06, 87),
            ],
        )
    ],
}

CALIBRATED_ON = Published("dp 2 x pp 4 with recompute, MindFormers' model card, June 2024", 1758, CARD)
OTHERS = (
    Published("the same layout, September 2024", 1442, CARD),
    Published("the same layout, October 2024", 1583, CARD),
    Published(
        "context parallel 8 (Ulysses) without recompute, 32 rows a step, Megatron on the same NPUs", 2501, ULYSSES
    ),
)


def solve():
    """float: the fraction of the peak with which CALIBRATED_ON comes out exactly; estimate.FRACTION is this, rounded."""
    low, high = 0.05, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        found = estimate(CALIBRATED_ON.report, ATLAS_800T_A2, middle)["tokens_per_second_per_device"]
        low, high = (middle, high) if found < CALIBRATED_ON.speed else (low, middle)
    return low


def errors():
    """The estimate against the figures that it is not calibrated on.

    Returns:
        list[tuple[Published, float, float]]: the figure, the estimate, and its error relative to the figure.
    """
    rows = []
    for published in OTHERS:
        found = estimate(published.report)["tokens_per_second_per_device"]
        rows.append((published, found, found / published.speed - 1))
    return rows


def note():
    """str: what must stand beside every estimate."""
    others = "; ".join(
        f"{published.what}: published {published.speed}, estimated {found:.0f} ({error:+.0%})"
        for published, found, error in errors()
    )
    return (
        f"Speeds are estimates, not a measurement: a roofline of the compiled programs for {ATLAS_800T_A2.name}, matrix "
        f"products and attention at {FRACTION:.0%} of the peak, calibrated on one published figure "
        f"({CALIBRATED_ON.what}: {CALIBRATED_ON.speed} tokens/s/p). On the others: {others}."
    )


def estimated(report):
    """What is printed: `estimate` of a report, with the note.

    Args:
        report (dict): see `estimate`.

    Returns:
        dict: `estimate`'s, and "note".
    """
    return {**estimate(report), "note": note()}
