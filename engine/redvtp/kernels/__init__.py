"""Work of a step that is many launches in torch and one in Triton, each beside its twin in torch.

`score` chooses for attention, `redvtp.kv.compaction` for moves: the kernel on CUDA, the twin elsewhere. The kernels are
in `triton_*`, imported only where one runs, so the engine needs no Triton on a CPU.
"""
