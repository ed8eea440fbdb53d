//! [`DeviceBuffer`]: device memory owned by Burn, used by address. [`PinnedBuffer`]: host memory the device reads.
//!
//! CubeCL's pools round sizes up and move what lives in them. A dedicated allocation is one `cuMemAlloc` of the
//! exact size that stays where it is, so every buffer is one.

use burn_cubecl::tensor::CubeTensor;
use cubecl::__private::Runtime;
use cubecl_cuda::CudaRuntime;
use cudarc::driver::sys;

use super::{device::Gpu, status::Check};
use crate::Error;

/// Device memory. Freed when dropped; drop it only when the stream no longer uses it.
pub(super) struct DeviceBuffer {
    /// The owner, as Burn sees it: bytes.
    _tensor: CubeTensor,
    ptr: u64,
    n_bytes: usize,
}

impl DeviceBuffer {
    /// `n_bytes` uninitialised bytes (at least one). `what` names them in errors.
    ///
    /// # Errors
    /// [`Error::Device`] if they do not fit, saying what helps.
    pub(super) fn new(gpu: &Gpu, n_bytes: usize, what: &str) -> Result<Self, Error> {
        let n_bytes = n_bytes.max(1);
        let out_of_memory = |free: usize, reason: String| {
            let gib = |n: usize| n as f64 / (1u64 << 30) as f64;
            Error::Device(format!(
                "out of memory: {what} needs {:.2} GiB, {:.2} GiB of {} are free{reason}. End other programs on the \
                 device, or lower --max-num-batched-tokens, --max-num-seqs or --max-model-len",
                gib(n_bytes),
                gib(free),
                gpu.name
            ))
        };
        let (free, _) = gpu.memory()?;
        if free < n_bytes {
            return Err(out_of_memory(free, String::new()));
        }
        let handle = gpu.client.memory_dedicated_allocation((), |()| gpu.client.empty(n_bytes));
        let resource = gpu
            .client
            .get_resource::<<CudaRuntime as Runtime>::Server>(handle.clone())
            .map_err(|e| out_of_memory(free, format!(" ({e})")))?;
        let ptr = resource.resource().ptr;
        let tensor = CubeTensor::new_contiguous(
            gpu.client.clone(),
            gpu.burn_device.clone(),
            [n_bytes].into(),
            handle,
            burn::tensor::DType::U8,
        );
        Ok(Self { _tensor: tensor, ptr, n_bytes })
    }

    /// `n_bytes` bytes of zero.
    pub(super) fn zeroed(gpu: &Gpu, n_bytes: usize, what: &str) -> Result<Self, Error> {
        let buffer = Self::new(gpu, n_bytes, what)?;
        // SAFETY: the range is this buffer.
        unsafe { sys::cuMemsetD8Async(buffer.ptr, 0, buffer.n_bytes, gpu.cu_stream()) }.check("cuMemsetD8Async")?;
        Ok(buffer)
    }

    /// The address on the device.
    pub(super) fn ptr(&self) -> u64 {
        self.ptr
    }

    /// The size.
    pub(super) fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// Copies `data` to `offset` bytes into the buffer, and waits.
    pub(super) fn write<T: bytemuck::Pod>(&self, gpu: &Gpu, offset: usize, data: &[T]) -> Result<(), Error> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        assert!(offset + bytes.len() <= self.n_bytes, "write past the end of a device buffer");
        // SAFETY: source and destination are in range; the source outlives the copy, which is waited for.
        unsafe {
            sys::cuMemcpyHtoDAsync_v2(self.ptr + offset as u64, bytes.as_ptr().cast(), bytes.len(), gpu.cu_stream())
        }
        .check("cuMemcpyHtoDAsync")?;
        gpu.synchronize()
    }

    /// Fills the buffer with copies of its first `n_bytes` bytes.
    pub(super) fn repeat(&self, gpu: &Gpu, n_bytes: usize) -> Result<(), Error> {
        let mut done = n_bytes.max(1);
        while done < self.n_bytes {
            let n = done.min(self.n_bytes - done);
            // SAFETY: both ranges are in the buffer and do not overlap.
            unsafe { sys::cuMemcpyDtoDAsync_v2(self.ptr + done as u64, self.ptr, n, gpu.cu_stream()) }
                .check("cuMemcpyDtoDAsync")?;
            done += n;
        }
        Ok(())
    }

    /// Copies `n` elements from `offset` bytes into the buffer to the host, after all work before.
    pub(super) fn read<T: bytemuck::Pod>(&self, gpu: &Gpu, offset: usize, n: usize) -> Result<Vec<T>, Error> {
        let mut data = vec![T::zeroed(); n];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut data);
        assert!(offset + bytes.len() <= self.n_bytes, "read past the end of a device buffer");
        // SAFETY: source and destination are in range; the destination outlives the copy, which is waited for.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr().cast(), self.ptr + offset as u64, bytes.len(), gpu.cu_stream())
        }
        .check("cuMemcpyDtoHAsync")?;
        gpu.synchronize()?;
        Ok(data)
    }
}

/// Page-locked host memory.
pub(super) struct PinnedBuffer {
    ptr: *mut u8,
    n_bytes: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for PinnedBuffer {}

impl PinnedBuffer {
    /// `n_bytes` bytes of zero.
    pub(super) fn new(n_bytes: usize) -> Result<Self, Error> {
        let n_bytes = n_bytes.max(1);
        let mut ptr = std::ptr::null_mut();
        // SAFETY: `ptr` is a valid place for the result; the fresh memory is then set to zero.
        unsafe {
            sys::cuMemHostAlloc(&mut ptr, n_bytes, 0).check("cuMemHostAlloc")?;
            ptr.cast::<u8>().write_bytes(0, n_bytes);
        }
        Ok(Self { ptr: ptr.cast(), n_bytes })
    }

    /// The whole as elements.
    pub(super) fn as_mut_slice<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        // SAFETY: initialised memory of this length, borrowed exclusively; page-locked memory is page-aligned.
        bytemuck::cast_slice_mut(unsafe { std::slice::from_raw_parts_mut(self.ptr, self.n_bytes) })
    }

    /// The address.
    pub(super) fn ptr(&self) -> *mut u8 {
        self.ptr
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `cuMemHostAlloc` and not used again. A failure leaves nothing to do.
        unsafe { sys::cuMemFreeHost(self.ptr.cast()) };
    }
}
