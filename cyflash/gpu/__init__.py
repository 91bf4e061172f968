"""Attention on the GPU, for arrays that live there. Nothing in here imports CuPy before such an array arrives.

    flash_attention(q, ...) --> where.py: where do the arrays live?
                                    |  on a GPU
    attention.py    checks and plans as the CPU path does; pieces of a call
        arrays.py       the caller's memory: address, shape, strides, device; results of the caller's kind
        quantise.py     float arrays to int8 codes with CuPy's operations; tensors.py: QuantizedTensor there
        planned.py      layers whose heads differ in how they are computed
        kernels.py      which kernels compute a piece, in which launches
        params.py       what a kernel is told: struct Params of params.h
        tensor_maps.py  ... and where arrays lie, for those of compute capability 9.0
        variants.py     which kernel, compiled with which macros, for what; decode.py: for few query rows
        launch.py       a variant, loaded on a device; grids
            cubins.py       compiled kernels on disk
                build.py        NVRTC: source and macros to machine code, without a GPU as well
    status.py       whether there is a GPU that runs this, and why not
    *.cu, *.cuh     the kernels
"""
