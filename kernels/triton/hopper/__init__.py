"""Attention kernels whose programs stay, for Hopper, in Gluon: Triton's layer below, where a kernel
says itself what each warp does, and where blocks lie in shared memory."""
