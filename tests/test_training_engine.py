"""What the engine does to a model before DeepSpeed trains it."""

import torch

from training.engine import compile_for_any_documents


def test_blocks_compile_once_for_any_number_of_documents():
    """ZeRO 3 hands a block copies of its arguments, so that marks made before them are lost."""

    def block(x, cu_seqlens):
        return x * cu_seqlens.sum()

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = compile_for_any_documents(block)
    x = torch.ones(4)
    for bounds in ([0, 4], [0, 1, 4], [0, 1, 2, 3, 4]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        assert torch.equal(compiled(x, cu_seqlens), x * sum(bounds))
    assert counters["stats"]["unique_graphs"] == 1
