//! The kernels for AVX-VNNI: Intel clients since 2021, which have no AVX-512. AVX2's, with one instruction in place of
//! two in the products of integers.

use super::{Kernels, avx2};

pub static KERNELS: Kernels =
    Kernels { name: "avx-vnni", affine: avx2::affine::<true>, expanded: avx2::expanded::<true>, ..avx2::KERNELS };
