"""Message classes made of MindSpore's descriptors read what MindSpore's own classes write."""

from mindspore.train import node_strategy_pb2

from mindformers_glm32k.protobuf import message_class


def test_a_strategy_is_read_as_mindspore_wrote_it():
    written = node_strategy_pb2.ParallelStrategyMap(current_stage=3)
    written.parallel_layout_item.add(param_name="transformer.w").parallel_layouts.opt_weight_shard_step = 2
    read = message_class("node_strategy_pb2", "ParallelStrategyMap").FromString(written.SerializePartialToString())
    assert read.current_stage == 3
    assert read.parallel_layout_item[0].param_name == "transformer.w"
    assert read.parallel_layout_item[0].parallel_layouts.opt_weight_shard_step == 2


def test_a_class_is_made_once():
    assert message_class("mind_ir_pb2", "ModelProto") is message_class("mind_ir_pb2", "ModelProto")
