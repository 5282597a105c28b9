"""What kernels really do: causal attention, bytes of memory-bound operators."""

from dryrun.tiny import LENGTH
from mindformers_glm32k.dryrun.analysis.cost import measure_work
from mindformers_glm32k.dryrun.analysis.mindir import Graph, Node, Program, Spec
from mindformers_glm32k.dryrun.analysis.trace import trace_program

HALF = Spec((8, 16), "float16", 2)


def literal(name, value):
    return Node(name, "Constant", [], value=value)


def measured(nodes, parameters=None):
    program = Program(
        Graph("main", ["x", "y"], nodes, [nodes[-1].name]),
        {},
        parameters or {},
        {"x": HALF, "y": Spec((16, 4), "float16", 2)},
    )
    return measure_work(trace_program(program))


def test_bytes_of_operators_that_are_no_products():
    nodes = [
        Node("a", "Add", ["x", "x"], HALF),
        Node("view", "Reshape", ["a"], Spec((128,), "float16", 2)),
        Node("cast", "Cast", ["view"], Spec((128,), "float32", 4)),
        Node("cut", "StridedSlice", ["cast"], Spec((2,), "float32", 4)),
        Node("sum", "AllReduce", ["cut"], Spec((2,), "float32", 4)),
    ]
    found = measured(nodes)
    assert found["vector_bytes"] == 3 * 256 + (256 + 512) + 2 * 8  # a slice reads what it writes; views cost nothing
    assert found["vector_operations"] == 3
    assert found["matmul_flops"] == {} and found["attention_flops"] == {}


def test_an_update_in_place_writes_too():
    parameter = Spec((8, 16), "float16", 2, "transformer.w")
    nodes = [Node("new", "AssignAdd", ["w", "x"], parameter)]
    assert measured(nodes, {"w": ("transformer.w", parameter)})["vector_bytes"] == 3 * 256


def test_products_by_element_type():
    nodes = [
        Node("p", "MatMul", ["x", "y", "no", "no2"], Spec((8, 4), "float16", 2)),
        literal("no", False),
        literal("no2", False),
    ]
    assert measured(nodes[1:] + nodes[:1])["matmul_flops"] == {"float16": 2 * 8 * 16 * 4}


def attention(next_tokens, mode, shape=(1, 64, 32), layout=0):
    tensor = Spec(shape, "float16", 2)
    tail = [
        literal("pre", 65536),
        literal("next", next_tokens),
        literal("inner", 0),
        literal("layout", layout),
        literal("mode", mode),
    ]
    nodes = [
        Node("q", "Exp", ["x"], tensor),
        Node("o", "FlashAttentionScore", ["q", "q", "q", *(node.name for node in tail)], tensor),
    ]
    return measured(tail + nodes)["attention_flops"]["float16"]


def test_attention_counts_the_pairs_that_the_kernel_works_on():
    whole, causal = 4 * 64 * 64 * 32, 2 * 64 * 65 * 32
    assert attention(0, 2) == attention(65536, 3) == attention(0, 0) == causal
    assert attention(65536, 0) == whole
    assert attention(0, 2, (64, 4, 8), layout=4) == causal  # TND: the tokens of a row behind each other


def test_the_compiled_program_is_causal(report):
    for program in report["programs"]:
        everything = sum(count for part, count in program["flops_by_part"].items() if part.startswith("attention"))
        assert program["work"]["attention_flops"] == {"float16": everything * (LENGTH + 1) // (2 * LENGTH)}
        products = sum(count for part, count in program["flops_by_part"].items() if part.startswith("matmul"))
        assert sum(program["work"]["matmul_flops"].values()) == products
        assert program["work"]["vector_bytes"] > 0
