//! [`Gpu`]: one NVIDIA device, its stream and Burn's client for its memory.

use std::sync::Arc;

use cubecl::client::Client;
use cubecl_cuda::CudaDevice;
use cudarc::driver::{CudaContext, CudaStream, sys};

use super::{libraries, status::Check};
use crate::Error;

/// A device. All work of the executor goes to its one stream, in order.
pub(super) struct Gpu {
    /// The primary context, shared with Burn.
    pub(super) context: Arc<CudaContext>,
    /// The executor's stream. Burn's own is not used once the buffers are allocated.
    pub(super) stream: Arc<CudaStream>,
    /// Burn's client: owns the memory.
    pub(super) client: Client,
    /// Burn's name of the device.
    pub(super) burn_device: cubecl::Device,
    /// Such as `NVIDIA H100 80GB HBM3`.
    pub(super) name: String,
    /// Compute capability.
    pub(super) capability: (i32, i32),
    /// Streaming multiprocessors.
    pub(super) n_sms: u32,
    /// Most shared memory of a block, in bytes.
    pub(super) max_shared: u32,
}

impl Gpu {
    /// Opens device `index`, counted after `CUDA_VISIBLE_DEVICES`.
    ///
    /// # Errors
    /// [`Error::Device`] if a library or the device is missing, or if the device is older than compute
    /// capability 8.0.
    pub(super) fn open(index: usize) -> Result<Self, Error> {
        libraries::load()?;
        let n_devices = CudaContext::device_count().check("cuInit")?;
        if index >= n_devices.max(0) as usize {
            return Err(Error::Device(format!("there is no CUDA device {index}: {n_devices} found")));
        }
        let context = CudaContext::new(index).check("cuDevicePrimaryCtxRetain")?;
        let capability = context.compute_capability().check("cuDeviceGetAttribute")?;
        let name = context.name().check("cuDeviceGetName")?;
        if capability.0 < 8 {
            let (major, minor) = capability;
            return Err(Error::Device(format!(
                "{name} has compute capability {major}.{minor}; Ember's kernels need 8.0 (Ampere) or later"
            )));
        }
        let n_sms = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let n_sms = context.attribute(n_sms).check("cuDeviceGetAttribute")? as u32;
        let max_shared = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let max_shared = context.attribute(max_shared).check("cuDeviceGetAttribute")? as u32;
        let stream = context.new_stream().check("cuStreamCreate")?;
        let burn_device = cubecl::Device::Cuda(CudaDevice::new(index));
        let client = burn_device.client();
        Ok(Self { context, stream, client, burn_device, name, capability, n_sms, max_shared })
    }

    /// Whether kernels written for Hopper alone run on this device.
    pub(super) fn is_hopper(&self) -> bool {
        self.capability == (9, 0)
    }

    /// NVRTC's name of the architecture; on Hopper the one with its own instructions.
    pub(super) fn arch(&self) -> String {
        match self.capability {
            (9, 0) => "sm_90a".into(),
            (major, minor) => format!("sm_{major}{minor}"),
        }
    }

    /// Makes the context current on this thread.
    pub(super) fn bind(&self) -> Result<(), Error> {
        self.context.bind_to_thread().check("cuCtxSetCurrent")
    }

    /// Free and total bytes of device memory, other processes' use included.
    pub(super) fn memory(&self) -> Result<(usize, usize), Error> {
        self.context.mem_get_info().check("cuMemGetInfo")
    }

    /// The stream for driver calls.
    pub(super) fn cu_stream(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }

    /// Waits until the stream is empty.
    pub(super) fn synchronize(&self) -> Result<(), Error> {
        self.stream.synchronize().check("cuStreamSynchronize")
    }
}

/// A point in the stream.
pub(super) struct Event(sys::CUevent);

// SAFETY: events may be used from any thread that has the context current.
unsafe impl Send for Event {}

impl Event {
    /// An event; `timing` ones can be subtracted from each other.
    pub(super) fn new(timing: bool) -> Result<Self, Error> {
        let mut event = std::ptr::null_mut();
        let flags = if timing { 0 } else { sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32 };
        // SAFETY: `event` is a valid place for the result.
        unsafe { sys::cuEventCreate(&mut event, flags) }.check("cuEventCreate")?;
        Ok(Self(event))
    }

    /// Moves the event to the end of `gpu`'s stream.
    pub(super) fn record(&self, stream: sys::CUstream) -> Result<(), Error> {
        // SAFETY: event and stream are alive.
        unsafe { sys::cuEventRecord(self.0, stream) }.check("cuEventRecord")
    }

    /// Makes `stream` wait for the event before it goes on.
    pub(super) fn hold(&self, stream: sys::CUstream) -> Result<(), Error> {
        // SAFETY: event and stream are alive.
        unsafe { sys::cuStreamWaitEvent(stream, self.0, 0) }.check("cuStreamWaitEvent")
    }

    /// Whether the stream has passed the event.
    pub(super) fn is_done(&self) -> Result<bool, Error> {
        // SAFETY: the event is alive.
        match unsafe { sys::cuEventQuery(self.0) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            status => status.check("a kernel (cuEventQuery)").map(|()| true),
        }
    }

    /// Waits without a limit.
    pub(super) fn wait(&self) -> Result<(), Error> {
        // SAFETY: the event is alive.
        unsafe { sys::cuEventSynchronize(self.0) }.check("cuEventSynchronize")
    }

    /// Milliseconds from `start` to this one; both must have passed.
    pub(super) fn milliseconds_since(&self, start: &Self) -> Result<f32, Error> {
        let mut milliseconds = 0.0;
        // SAFETY: both events are alive.
        unsafe { sys::cuEventElapsedTime_v2(&mut milliseconds, start.0, self.0) }.check("cuEventElapsedTime")?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event is alive and not used again. A failure leaves nothing to do.
        unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}
