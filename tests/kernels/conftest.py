"""Kernels are tested in graph mode, the mode that trains.

(MindSpore 2.9.0's PyNative mode computes a wrong Softmax gradient on CPU after a first call with one column.)
"""

import mindspore as ms
import pytest


@pytest.fixture(autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)
