"""One GPU's memory, stream and CUDA graphs, through the CUDA driver alone, without a toolkit or a Python package.

It uses the device's primary context, as TensorRT does. Importing it needs no GPU. docs/adr/0011 compares `cuda.core`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from ctypes import byref, c_int, c_size_t, c_ubyte, c_uint64, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

LIBRARY = "libcuda.so.1"

COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76
STREAM_NON_BLOCKING = 1
CAPTURE_THREAD_LOCAL = 1
"""Values from cuda.h: CUdevice_attribute, CUstream_flags, CUstreamCaptureMode."""


class CudaError(Exception):
    """The driver is missing or a call failed; the message names the call and the reason."""


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine."""

    name: str
    sm: int
    """Its generation: 89 for compute capability 8.9."""
    memory_bytes: int
    driver: str
    """The newest CUDA version that its driver supports."""


class Driver:
    """The driver's functions, called by name; a failed call raises CudaError."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError:
            raise CudaError(f"no NVIDIA driver is installed (no {LIBRARY})") from None
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver; raises CudaError unless it returns CUDA_SUCCESS."""
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, byref(text))
            raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")

    def number(self, name: str, *arguments: int) -> int:
        """The integer that a function returns through its first parameter."""
        number = c_int()
        self.call(name, byref(number), *arguments)
        return number.value

    def device(self, index: int) -> int:
        """A device's handle."""
        count = self.number("cuDeviceGetCount")
        if index >= count:
            raise CudaError(f"there is no GPU {index}: this machine has {count}")
        return self.number("cuDeviceGet", index)

    def describe(self, index: int) -> Gpu:
        """The device's name, generation, memory and driver."""
        device, name, memory = self.device(index), ctypes.create_string_buffer(128), c_size_t()
        self.call("cuDeviceGetName", name, len(name), device)
        self.call("cuDeviceTotalMem_v2", byref(memory), device)
        version = self.number("cuDriverGetVersion")
        major = self.number("cuDeviceGetAttribute", COMPUTE_CAPABILITY_MAJOR, device)
        minor = self.number("cuDeviceGetAttribute", COMPUTE_CAPABILITY_MINOR, device)
        driver = f"{version // 1000}.{version % 1000 // 10}"
        return Gpu(name.value.decode(), 10 * major + minor, memory.value, driver)


def find_gpu() -> Gpu:
    """The machine's GPU; raises CudaError if there is no driver or no GPU."""
    return Driver().describe(0)


class Device:
    """One GPU's primary context, current in the thread that creates this object, and the stream for all work."""

    def __init__(self, index: int = 0) -> None:
        """Retain the context; raises CudaError if there is no such GPU."""
        self._driver = Driver()
        self.gpu = self._driver.describe(index)
        self._device = self._driver.device(index)
        self._context, self._stream = c_void_p(), c_void_p()
        self._driver.call("cuDevicePrimaryCtxRetain", byref(self._context), self._device)
        self.make_current()
        self._driver.call("cuStreamCreate", byref(self._stream), STREAM_NON_BLOCKING)

    def make_current(self) -> None:
        """Make the context current in the calling thread; steps may come from different threads."""
        self._driver.call("cuCtxSetCurrent", self._context)

    @property
    def stream(self) -> int:
        """The stream's handle as an integer, which TensorRT takes."""
        return int(self._stream.value or 0)

    def allocate(self, num_bytes: int) -> Memory:
        """Allocate memory, at least one byte, with undefined contents; it is freed with the object."""
        address = c_uint64()
        self._driver.call("cuMemAlloc_v2", byref(address), c_size_t(max(1, num_bytes)))
        return Memory(self._driver, address.value, num_bytes)

    def clear(self, memory: Memory) -> None:
        """Fill with zero bytes, in stream order."""
        address, size = c_uint64(memory.address), c_size_t(memory.num_bytes)
        self._driver.call("cuMemsetD8Async", address, c_ubyte(0), size, self._stream)

    def write(self, memory: Memory, values: NDArray[Any]) -> None:
        """Copy a contiguous array to the memory in stream order; the array may be changed afterwards."""
        host, device, size = _copied(values, memory)
        # The driver copies pageable host memory before the call returns.
        self._driver.call("cuMemcpyHtoDAsync_v2", device, host, size, self._stream)

    def read(self, memory: Memory, values: NDArray[Any]) -> None:
        """Copy the memory to a contiguous array in stream order, and wait for it."""
        host, device, size = _copied(values, memory)
        self._driver.call("cuMemcpyDtoHAsync_v2", host, device, size, self._stream)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait until all work on the stream is done; raises CudaError if a kernel failed."""
        self._driver.call("cuStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """Record the work that `work` puts on the stream, instead of running it."""
        self._driver.call("cuStreamBeginCapture_v2", self._stream, CAPTURE_THREAD_LOCAL)
        graph = c_void_p()
        try:
            work()
        except BaseException:
            # A stream that remains in capture mode accepts no other work.
            with suppress(CudaError):
                self._driver.call("cuStreamEndCapture", self._stream, byref(graph))
            raise
        self._driver.call("cuStreamEndCapture", self._stream, byref(graph))
        return CapturedGraph(self._driver, self._stream, graph)

    def close(self) -> None:
        """Release the stream and the context; memory must have been freed before."""
        self._driver.call("cuStreamDestroy_v2", self._stream)
        self._driver.call("cuDevicePrimaryCtxRelease_v2", self._device)


def _copied(values: NDArray[Any], memory: Memory) -> tuple[c_void_p, c_uint64, c_size_t]:
    """The arguments of a copy between a contiguous array and memory that is large enough."""
    assert values.flags.c_contiguous
    assert values.nbytes <= memory.num_bytes
    return values.ctypes.data_as(c_void_p), c_uint64(memory.address), c_size_t(values.nbytes)


class Memory:
    """An allocation of GPU memory, freed with the object."""

    def __init__(self, driver: Driver, address: int, num_bytes: int) -> None:
        self._driver, self.address, self.num_bytes = driver, address, num_bytes

    def free(self) -> None:
        """Free the memory now; a second call does nothing."""
        if self.address:
            address, self.address = self.address, 0
            self._driver.call("cuMemFree_v2", c_uint64(address))

    def __del__(self) -> None:
        with suppress(CudaError):
            self.free()


class CapturedGraph:
    """A recorded sequence of work that is launched as one; freed with the object."""

    def __init__(self, driver: Driver, stream: c_void_p, graph: c_void_p) -> None:
        """Make the recording launchable, and free it."""
        self._driver, self._stream, self._executable = driver, stream, c_void_p()
        try:
            driver.call("cuGraphInstantiateWithFlags", byref(self._executable), graph, c_ulonglong(0))
        finally:
            driver.call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Launch it on the stream."""
        self._driver.call("cuGraphLaunch", self._executable, self._stream)

    def __del__(self) -> None:
        if self._executable:
            with suppress(CudaError):
                self._driver.call("cuGraphExecDestroy", self._executable)
