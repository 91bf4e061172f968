"""Seeded random calls, each held to the reference under the derived bounds: `python -m tests.fuzz --help`.

    draw.py         a case's random decisions, sizes and numbers
    options.py      options of attention that fit these sizes
    memory.py       arrays at any strides and alignment, and whether the bytes in and around them changed
    dense.py        flash_attention, the engine, scaled_dot_product_attention, merge_states
    int8.py         flash_attention_int8
    sequences.py    the two varlen functions, and caches
    tally.py        what the cases were worth: nothing is shown by rows that see no key
    run.py          cases one after another, in a process that may die or hang
"""
