//! [`Kernel`]: a compiled function and how it is launched.

use std::{
    ffi::{CString, c_void},
    sync::Arc,
};

use cudarc::driver::sys;

use super::status::Check;
use crate::Error;

/// Loaded machine code, unloaded when the last [`Kernel`] of it is dropped.
struct Module(sys::CUmodule);

// SAFETY: a module may be used from any thread that has its context current.
unsafe impl Send for Module {}
// SAFETY: as above; it is never changed.
unsafe impl Sync for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: alive, and not used again. A failure leaves nothing to do.
        unsafe { sys::cuModuleUnload(self.0) };
    }
}

/// A function on the device.
#[derive(Clone)]
pub(super) struct Kernel {
    function: sys::CUfunction,
    name: &'static str,
    _module: Arc<Module>,
}

// SAFETY: a function may be used from any thread that has its context current.
unsafe impl Send for Kernel {}

/// A kernel's argument.
#[derive(Debug, Clone, Copy)]
pub(super) enum Arg {
    /// A device address; 0 is null.
    Ptr(u64),
    /// `int`.
    Int(i32),
    /// `float`.
    Float(f32),
    /// `unsigned long long`.
    Long(u64),
}

/// How many threads, and how they start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Launch {
    /// Blocks.
    pub(super) grid: [u32; 3],
    /// Threads of a block.
    pub(super) block: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub(super) shared_bytes: u32,
    /// Start while the kernel before is still running (programmatic dependent launch). The kernel itself waits
    /// before it reads what that one writes.
    pub(super) dependent: bool,
}

impl Kernel {
    /// The functions `names` of one piece of machine code.
    pub(super) fn load<const N: usize>(cubin: &[u8], names: [&'static str; N]) -> Result<[Self; N], Error> {
        let mut module = std::ptr::null_mut();
        // SAFETY: `cubin` is a whole ELF image, which carries its own length.
        unsafe { sys::cuModuleLoadData(&mut module, cubin.as_ptr().cast()) }.check("cuModuleLoadData")?;
        let module = Arc::new(Module(module));
        let mut kernels = Vec::with_capacity(N);
        for name in names {
            let mut function = std::ptr::null_mut();
            let c_name = CString::new(name).expect("kernel names have no NUL byte");
            // SAFETY: the module is alive and the name is NUL-terminated.
            unsafe { sys::cuModuleGetFunction(&mut function, module.0, c_name.as_ptr()) }
                .check(&format!("cuModuleGetFunction({name})"))?;
            // The same split of the L1 cache for all: a multiprocessor must run dry to change it.
            let carveout = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            // SAFETY: the function is alive.
            unsafe { sys::cuFuncSetAttribute(function, carveout, 100) }
                .check(&format!("cuFuncSetAttribute({name}, shared memory carveout)"))?;
            kernels.push(Self { function, name, _module: module.clone() });
        }
        Ok(kernels.try_into().unwrap_or_else(|_| unreachable!("one kernel for each name")))
    }

    /// Allows blocks of this kernel `n_bytes` of dynamic shared memory.
    pub(super) fn allow_shared(&self, n_bytes: u32) -> Result<(), Error> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is alive.
        unsafe { sys::cuFuncSetAttribute(self.function, attribute, n_bytes as i32) }
            .check(&format!("cuFuncSetAttribute({}, {n_bytes} bytes of shared memory)", self.name))
    }

    /// Enqueues the kernel. `args` must be what its signature says; a grid of no blocks is no launch.
    pub(super) fn launch(&self, stream: sys::CUstream, launch: Launch, args: &[Arg]) -> Result<(), Error> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let mut params: [*mut c_void; 32] = [std::ptr::null_mut(); 32];
        for (param, arg) in params.iter_mut().zip(args) {
            *param = match arg {
                Arg::Ptr(v) | Arg::Long(v) => std::ptr::from_ref(v).cast_mut().cast(),
                Arg::Int(v) => std::ptr::from_ref(v).cast_mut().cast(),
                Arg::Float(v) => std::ptr::from_ref(v).cast_mut().cast(),
            };
        }
        // SAFETY: all zeros is a valid attribute; its value is set below.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: stream,
            attrs: &mut attribute,
            numAttrs: u32::from(launch.dependent),
        };
        // SAFETY: the function is alive; `params` point to live arguments, which the driver copies before it returns.
        // The kernel's own accesses are in range by the contracts in its source.
        unsafe { sys::cuLaunchKernelEx(&config, self.function, params.as_mut_ptr(), std::ptr::null_mut()) }
            .check(self.name)
    }
}
