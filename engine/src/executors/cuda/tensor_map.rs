//! [`TensorMap`]: how Hopper's copy engine sees a layer's KV cache.

use cudarc::driver::sys;

use super::status::Check;
use crate::Error;

/// Columns of a box: the width of the 128-byte swizzle, in bf16.
const BOX_COLUMNS: u32 = 64;

/// A tensor map, passed to kernels by value.
pub(super) struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// The cache at address `cache`, bf16 `[n_rows, head_dim]`, in boxes of 64 columns and one page's 16 rows,
    /// swizzled by 128 bytes; columns past `head_dim` read as zero.
    pub(super) fn of_cache(cache: u64, n_rows: usize, head_dim: usize) -> Result<Self, Error> {
        // SAFETY: all zeros is a valid value of this plain struct.
        let mut map: sys::CUtensorMap = unsafe { std::mem::zeroed() };
        let dims = [head_dim as u64, n_rows as u64];
        let row_bytes = [head_dim as u64 * 2];
        let box_dims = [BOX_COLUMNS, crate::step::PAGE_SIZE as u32];
        let element_strides = [1, 1];
        // SAFETY: all pointers are to arrays of the rank's length; the driver copies them.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                dims.len() as u32,
                cache as *mut std::ffi::c_void,
                dims.as_ptr(),
                row_bytes.as_ptr(),
                box_dims.as_ptr(),
                element_strides.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .check("cuTensorMapEncodeTiled")?;
        Ok(Self(map))
    }

    /// Where the map lies, for a launch's list of parameters.
    pub(super) fn as_param(&self) -> *mut std::ffi::c_void {
        std::ptr::from_ref(&self.0).cast_mut().cast()
    }
}
