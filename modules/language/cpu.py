"""What a CPU needs to train at full speed: freed memory kept, and a warning where bf16 is slower than fp32."""

from __future__ import annotations

import ctypes
import time

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed, for the rest of the process; True if it obeyed.

    A training step frees and takes the same activations again and again. By default large ones go back to the kernel,
    which zeroes every page anew: 10 to 20 thousand page faults a step for a 17M-parameter model, 2 to 5% of its time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    options = ((_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    obeyed = [mallopt(option, value) == 1 for option, value in options]
    return all(obeyed)


def bf16_speedup(size: int = 512, repeats: int = 5) -> float:
    """How many times faster this CPU multiplies bf16 matrices than fp32 ones, measured (about 20 ms, this thread's CPU
    time).

    Instruction sets do not tell: avx512_bf16 doubles the rate on some CPUs and halves it on others. Below 1, train in
    fp32.
    """
    times: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(size, size, dtype=dtype)
        samples = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            samples.append(time.perf_counter() - start)
        times[dtype] = min(samples[1:])  # the first call chooses and builds its kernel
    return times[torch.float32] / times[torch.bfloat16]
