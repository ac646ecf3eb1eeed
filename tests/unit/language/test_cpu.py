"""Allocator and precision helpers."""

from __future__ import annotations

import ctypes
import platform
import resource

import pytest
import torch

from modules.language.cpu import bf16_speedup, keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_kept_memory_is_not_faulted_in_again() -> None:
    assert keep_freed_memory()

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            torch.zeros(4 << 20)  # 16 MiB = 4096 pages, freed at once
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 10_240  # all five anew would be 20,480; one may, where the heap's layout asks for it


def test_another_libc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoMallopt:
        def __getattr__(self, name: str) -> None:
            raise AttributeError(name)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: NoMallopt())
    assert not keep_freed_memory()


def test_bf16_speedup_is_a_plausible_ratio() -> None:
    assert 0.02 < bf16_speedup(size=128, repeats=2) < 50
