"""Writes strategy files with given layouts, as MindSpore would."""

from mindspore.train import node_strategy_pb2


def write_strategy(path, layouts, stage=0):
    """Writes the file of one stage.

    Args:
        path (pathlib.Path): its name; the folder is created.
        layouts (dict[str, tuple]): name -> (dev_matrix, tensor_map, opt_weight_shard_step, opt_weight_shard_size);
            where an entry of the map is a list, all of it is written as MindSpore writes such maps.
        stage (int): of the pipeline.
    """
    strategy = node_strategy_pb2.ParallelStrategyMap(current_stage=1)
    item = strategy.parallel_strategy_item.add(node_name="MatMul")
    item.parallel_strategys.stage = stage
    item.parallel_strategys.parallel_strategy.add().dim.extend([1, 1])
    for name, (matrix, tensor_map, step, size) in layouts.items():
        layout = strategy.parallel_layout_item.add(param_name=name).parallel_layouts
        layout.field = 0
        layout.opt_weight_shard_step, layout.opt_weight_shard_size = step, size
        layout.dev_matrix.add().dim.extend(matrix)
        if any(isinstance(entry, list) for entry in tensor_map):
            for entry in tensor_map:
                layout.tensor_map.add().dim.extend(entry if isinstance(entry, list) else [entry])
        else:
            layout.tensor_map.add().dim.extend(tensor_map)
        layout.param_split_shape.add()
        layout.indices_offset.add()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(strategy.SerializeToString())
