"""Attention kernels whose programs stay, for Hopper, in Gluon: Triton's layer below, where a kernel
says itself what each warp does, and where blocks lie in shared memory.

forward.py, gradients.py, unordered.py   the kernels
schedule.py   the warp that hands out tiles: as records.py says, with masks as masks.py draws them
pipeline.py   rings of buffers between the warps; how the one that fetches fills them
rows.py, key_tiles.py, adding.py   a tile's rows, bounds and results; sums of segments; into memory
"""
