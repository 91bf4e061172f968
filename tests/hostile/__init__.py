"""Files of others: damaged, made to harm, or no files at all, given to every reader: `python -m tests.hostile --help`.

    readers.py      what reads files, and a small valid file for each
    variants.py     what is made of a valid file, and what was never one
    child.py        readers and variants in a process of their own, with little memory
"""
