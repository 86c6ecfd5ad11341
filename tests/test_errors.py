"""The tree of errors, and what becomes of errors from libraries."""

import errno

import pytest
import torch

from dpocli import errors
from dpocli.errors import DpoError, ExitCode, classify

CODES = {
    "UsageError": 2,
    "DataError": 3,
    "CacheError": 4,
    "NumericsError": 5,
    "GateError": 6,
    "ResourceError": 7,
    "PreemptedError": 75,
}


def subclasses(kind: type[DpoError]) -> list[type[DpoError]]:
    return [each for child in kind.__subclasses__() for each in (child, *subclasses(child))]


def test_every_class_has_an_exit_code_of_its_own() -> None:
    tree = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DpoError)]
    own = [kind for kind in tree if kind is not DpoError]
    assert {kind.__name__: kind.exit_code for kind in own} == CODES
    for kind in own:
        assert classify(kind("what happened")) == (kind.exit_code, "what happened")
    assert all(kind.exit_code in CODES.values() for kind in subclasses(DpoError))
    assert "exit_code" not in vars(DpoError), "the base is never raised"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"),
        torch.distributed.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"
        ),
        torch.distributed.DistBackendError("NCCL error, ncclUnhandledCudaError\nFailed to CUDA calloc 10485760 bytes"),
        torch.distributed.DistBackendError("NCCL error, ncclUnhandledCudaError\nFailed to CUDA calloc async 608 bytes"),
    ],
    ids=lambda error: str(error)[-60:],
)
def test_a_shortage_of_memory_in_every_wording(error: Exception) -> None:
    code, message = classify(error)
    assert code == ExitCode.RESOURCES
    assert message.startswith("Out of memory: ")
    assert "--token-budget" in message


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: invalid argument"),
        RuntimeError("Cuda failure 700 'an illegal memory access was encountered'"),
        RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"),
        ValueError("out of memory"),
    ],
    ids=str,
)
def test_other_failures_of_a_device_are_bugs(error: Exception) -> None:
    assert classify(error)[0] == ExitCode.BUG
