//! [`TensorMap`]: how Hopper's copy engine sees a matrix: boxes of 64 bf16 columns, swizzled by 128 bytes, zeros past
//! its ends. [`DeviceMaps`]: such maps where the engine reads them.

use cudarc::driver::sys;

use super::{
    compile,
    device::Gpu,
    kernel::{Arg, Launch},
    memory::DeviceBuffer,
    packed_weights::{BLOCK_BYTES, BLOCK_COLUMNS, BLOCK_ROWS},
    status::Check,
};
use crate::Error;

/// Columns of a box: the width of the 128-byte swizzle, in bf16.
const BOX_COLUMNS: u32 = 64;

/// Misses bring 256 bytes to the L2 cache: 3 to 4 % faster than 128 for weights that stream (docs/log.md).
const WHOLE_LINES: sys::CUtensorMapL2promotion = sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B;

/// Bytes of a tensor map.
const MAP_BYTES: usize = size_of::<sys::CUtensorMap>();

/// Tensor maps in device memory. None changes once it is there, as parameters of kernels do from launch to launch.
pub(super) struct DeviceMaps {
    memory: DeviceBuffer,
}

/// One of [`DeviceMaps`]: its place among them.
#[derive(Clone, Copy)]
pub(super) struct MapAt(pub(super) usize);

impl DeviceMaps {
    /// Copies `maps` to the device and has every multiprocessor know them (`kernels/acquire_maps_sm90.cu`), and waits.
    pub(super) fn new(gpu: &Gpu, maps: &[TensorMap]) -> Result<Self, Error> {
        let memory = DeviceBuffer::new(gpu, maps.len() * MAP_BYTES, "tensor maps")?;
        let words: Vec<u64> = maps.iter().flat_map(|map| map.0.opaque).collect();
        memory.write(gpu, 0, &words)?;
        let [acquire_maps] = compile::load(gpu, &compile::ACQUIRE_MAPS_SM90, &[], ["acquire_maps"])?;
        acquire_maps.allow_shared(gpu.max_shared)?;
        let launch = Launch { grid: [gpu.n_sms, 1, 1], block: 32, shared_bytes: gpu.max_shared, dependent: false };
        let args = [Arg::Ptr(memory.ptr()), Arg::Int(maps.len() as i32)];
        acquire_maps.launch(gpu.cu_stream(), launch, &args)?;
        gpu.synchronize()?;
        Ok(Self { memory })
    }

    /// A map's address on the device.
    pub(super) fn ptr(&self, MapAt(i): MapAt) -> u64 {
        self.memory.ptr() + (i * MAP_BYTES) as u64
    }
}

/// A tensor map.
pub(super) struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// Activations (or keys, or values) at address `x`, bf16 `[n_rows, k]`, in boxes of `box_rows` rows.
    pub(super) fn of_activations(x: u64, n_rows: usize, k: usize, box_rows: usize) -> Result<Self, Error> {
        Self::encode(x, &[k, n_rows], &[k], &[box_rows as u32])
    }

    /// Weights at address `w`, bf16 `[n, k]`, in boxes of `box_rows` rows.
    pub(super) fn of_weights(w: u64, (n, k): (usize, usize), box_rows: usize) -> Result<Self, Error> {
        Self::encode(w, &[k, n], &[k], &[box_rows as u32])
    }

    /// Gate and up weights at address `w`, bf16 `[n, k]`, in boxes of `box_rows` rows: eight of gate, their eight of up,
    /// the next eight of gate, ...; `n` and `box_rows` are multiples of 16.
    pub(super) fn of_gated_weights(w: u64, (n, k): (usize, usize), box_rows: usize) -> Result<Self, Error> {
        Self::encode(w, &[k, 8, 2, n / 16], &[k, n / 2 * k, 8 * k], &[8, 2, box_rows as u32 / 16])
    }

    /// Blocks of packed weights `[n, k]` at address `planes`, in boxes of the blocks of `box_rows` rows and one column.
    pub(super) fn of_packed(planes: u64, (n, k): (usize, usize), box_rows: usize) -> Result<Self, Error> {
        let across = (k / BLOCK_COLUMNS) as u64;
        let row_bytes = BLOCK_BYTES as u64;
        let layout = Layout {
            element: sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
            dims: &[row_bytes / 8, across, (n / BLOCK_ROWS) as u64],
            strides: &[row_bytes, row_bytes * across],
            box_dims: &[BLOCK_BYTES as u32 / 8, 1, (box_rows / BLOCK_ROWS) as u32],
            swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        };
        layout.encode(planes)
    }

    /// `dims` and `box_rows` from the innermost out, the box's columns left out; `strides` in elements.
    fn encode(address: u64, dims: &[usize], strides: &[usize], box_rows: &[u32]) -> Result<Self, Error> {
        let dims: Vec<u64> = dims.iter().map(|&n| n as u64).collect();
        let strides: Vec<u64> = strides.iter().map(|&n| n as u64 * 2).collect();
        let box_dims: Vec<u32> = [BOX_COLUMNS].iter().chain(box_rows).copied().collect();
        let layout = Layout {
            element: sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            dims: &dims,
            strides: &strides,
            box_dims: &box_dims,
            swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        layout.encode(address)
    }
}

/// What a tensor map says, from the innermost dimension out.
struct Layout<'a> {
    element: sys::CUtensorMapDataType,
    /// In elements.
    dims: &'a [u64],
    /// In bytes, the innermost left out.
    strides: &'a [u64],
    /// In elements.
    box_dims: &'a [u32],
    swizzle: sys::CUtensorMapSwizzle,
}

impl Layout<'_> {
    fn encode(&self, address: u64) -> Result<TensorMap, Error> {
        // SAFETY: all zeros is a valid value of this plain struct.
        let mut map: sys::CUtensorMap = unsafe { std::mem::zeroed() };
        let element_strides = vec![1; self.dims.len()];
        // SAFETY: all pointers are to arrays of the rank's length; the driver copies them.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                self.element,
                self.dims.len() as u32,
                address as *mut std::ffi::c_void,
                self.dims.as_ptr(),
                self.strides.as_ptr(),
                self.box_dims.as_ptr(),
                element_strides.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                self.swizzle,
                WHOLE_LINES,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .check("cuTensorMapEncodeTiled")?;
        Ok(TensorMap(map))
    }
}
