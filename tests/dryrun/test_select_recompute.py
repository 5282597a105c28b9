"""What the MLP in chunks keeps for the backward pass where only parts of a layer are recomputed."""

from dryrun.tiny import run_dryrun
from mindformers_glm32k.dryrun.analysis.mindir import read_program
from mindformers_glm32k.dryrun.analysis.trace import trace_program


def test_both_halves_of_the_projection_are_gone_before_the_backward_pass(tmp_path):
    result = run_dryrun(
        tmp_path,
        "--keep_programs",
        parallel_config__data_parallel=1,
        parallel_config__pipeline_stage=1,
        parallel_config__micro_batch_num=1,
        use_parallel=False,
        model__model_config__num_layers=1,
        model__model_config__mlp_chunk_size=24,
        recompute_config__recompute=False,
        recompute_config__select_recompute='["mlp"]',
    )
    assert result.returncode == 0, result.stderr
    trace = trace_program(read_program(tmp_path / "programs" / "rank_0.mindir"))
    backward = next(event.index for event in trace.events if event.part == "backward")
    halves = [
        buffer
        for event in trace.events[:backward]
        if event.node.op == "SplitWithSize" and "mlp" in event.node.scope and event.reads[0].spec.shape[-1] > 160
        for buffer in event.writes
    ]
    assert len(halves) == 2 * 3  # of each chunk
    assert all(buffer.last < backward for buffer in halves)
