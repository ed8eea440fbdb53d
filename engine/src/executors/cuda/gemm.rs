//! [`Gemm`]: matrix products through cuBLASLt, each shape by the algorithm that measured fastest here.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::c_void,
    path::PathBuf,
};

use cudarc::cublaslt::{result as lt, sys};

use super::{
    compile,
    device::{Event, Gpu},
    memory::DeviceBuffer,
    status::Check,
};
use crate::Error;

/// Scratch memory for split-K.
const WORKSPACE_BYTES: usize = 64 << 20;
/// Algorithms asked for and timed.
const N_CANDIDATES: usize = 24;

/// `y[M, N] = x[M, K] W[N, K]^T` in bf16 with float32 sums; row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct GemmShape {
    /// Rows of `x` and `y`.
    pub(super) m: usize,
    /// Rows of `W`.
    pub(super) n: usize,
    /// Columns of `x` and `W`.
    pub(super) k: usize,
    /// What happens to `y`.
    pub(super) output: GemmOutput,
}

/// What a product does with its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum GemmOutput {
    /// Written as bf16.
    Bf16,
    /// Written as float32.
    F32,
    /// Added to float32.
    AddF32,
}

/// Rows to compute for `m` rows: few enough different numbers that every one has a plan. Rows past `m` are
/// computed from whatever the buffers hold and ignored.
pub(super) fn padded_rows(m: usize) -> usize {
    let step = match m {
        0..=256 => 8,
        257..=1024 => 64,
        _ => 128,
    };
    m.next_multiple_of(step)
}

/// Addresses of a product's operands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operands {
    /// bf16 `[m, k]`.
    pub(super) x: u64,
    /// bf16 `[n, k]`.
    pub(super) w: u64,
    /// `[m, n]`.
    pub(super) y: u64,
}

/// A product ready to run.
struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algo: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: all alive and not used again. A failure leaves nothing to do.
        unsafe {
            for layout in [self.w, self.x, self.y] {
                sys::cublasLtMatrixLayoutDestroy(layout);
            }
            sys::cublasLtMatmulDescDestroy(self.desc);
        }
    }
}

/// cuBLASLt on one device.
pub(super) struct Gemm {
    handle: sys::cublasLtHandle_t,
    workspace: DeviceBuffer,
    plans: HashMap<GemmShape, Plan>,
    tuned: TunedAlgorithms,
}

// SAFETY: the handle and descriptors may be used from any thread, one at a time.
unsafe impl Send for Gemm {}

impl Drop for Gemm {
    fn drop(&mut self) {
        // SAFETY: alive and not used again. A failure leaves nothing to do.
        unsafe { sys::cublasLtDestroy(self.handle) };
    }
}

impl Gemm {
    /// A handle, with the algorithms found in earlier runs.
    pub(super) fn new(gpu: &Gpu) -> Result<Self, Error> {
        gpu.bind()?;
        let handle = lt::create_handle().check("cublasLtCreate")?;
        let workspace = DeviceBuffer::new(gpu, WORKSPACE_BYTES, "the matrix product workspace")?;
        Ok(Self { handle, workspace, plans: HashMap::new(), tuned: TunedAlgorithms::open(gpu) })
    }

    /// Enqueues a product. A shape that was not tuned runs by cuBLASLt's first suggestion.
    pub(super) fn run(&mut self, gpu: &Gpu, shape: GemmShape, operands: Operands) -> Result<(), Error> {
        if !self.plans.contains_key(&shape) {
            let plan = self.plan(shape)?;
            self.plans.insert(shape, plan);
        }
        let plan = &self.plans[&shape];
        self.enqueue(gpu, plan, shape, operands)
    }

    /// Times the best suggestions for `shape` and keeps the fastest for this and later runs. `weights`: addresses of
    /// several layers' weights, so that no run finds its weights in the cache; `x` and `y` are overwritten.
    pub(super) fn tune(&mut self, gpu: &Gpu, shape: GemmShape, weights: &[u64], xy: (u64, u64)) -> Result<(), Error> {
        if self.tuned.get(shape).is_some() {
            return Ok(());
        }
        let mut plan = self.describe(shape)?;
        let candidates = self.suggest(&plan, N_CANDIDATES)?;
        let (start, end) = (Event::new(true)?, Event::new(true)?);
        let mut best = (f32::INFINITY, candidates[0].algo);
        // Long products need no repetition.
        let n_runs = if shape.m * shape.n * shape.k > 1 << 37 { 2 } else { 2 * weights.len() };
        for candidate in &candidates {
            plan.algo = candidate.algo;
            let run = |i: usize| {
                let operands = Operands { x: xy.0, w: weights[i % weights.len()], y: xy.1 };
                self.enqueue(gpu, &plan, shape, operands)
            };
            // A suggestion may still be refused when it runs.
            if run(0).is_err() {
                continue;
            }
            start.record(gpu.cu_stream())?;
            for i in 1..=n_runs {
                run(i)?;
            }
            end.record(gpu.cu_stream())?;
            end.wait()?;
            let milliseconds = end.milliseconds_since(&start)?;
            if milliseconds < best.0 {
                best = (milliseconds, candidate.algo);
            }
        }
        self.plans.remove(&shape);
        self.tuned.insert(shape, best.1);
        Ok(())
    }

    /// Keeps the tuned algorithms for later runs.
    pub(super) fn save(&mut self) {
        self.tuned.save();
    }

    fn describe(&self, shape: GemmShape) -> Result<Plan, Error> {
        let y_type = match shape.output {
            GemmOutput::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            GemmOutput::F32 | GemmOutput::AddF32 => sys::cudaDataType::CUDA_R_32F,
        };
        let bf16 = sys::cudaDataType::CUDA_R_16BF;
        let (m, n, k) = (shape.m as u64, shape.n as u64, shape.k as u64);
        let desc = lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F)
            .check("cublasLtMatmulDescCreate")?;
        // cuBLAS is column-major: row-major y[M, N] is its y[N, M], so the product is W^T x.
        let plan = Plan {
            desc,
            w: lt::create_matrix_layout(bf16, k, n, k as i64).check("cublasLtMatrixLayoutCreate")?,
            x: lt::create_matrix_layout(bf16, k, m, k as i64).check("cublasLtMatrixLayoutCreate")?,
            y: lt::create_matrix_layout(y_type, n, m, n as i64).check("cublasLtMatrixLayoutCreate")?,
            algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        let transpose = cudarc::cublas::sys::cublasOperation_t::CUBLAS_OP_T;
        // SAFETY: the attribute is an operation of this size.
        unsafe {
            lt::set_matmul_desc_attribute(
                desc,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                std::ptr::from_ref(&transpose).cast(),
                size_of_val(&transpose),
            )
        }
        .check("cublasLtMatmulDescSetAttribute")?;
        Ok(plan)
    }

    fn plan(&self, shape: GemmShape) -> Result<Plan, Error> {
        let mut plan = self.describe(shape)?;
        plan.algo = match self.tuned.get(shape) {
            Some(algo) => algo,
            None => self.suggest(&plan, 1)?[0].algo,
        };
        Ok(plan)
    }

    /// cuBLASLt's best suggestions, at least one.
    fn suggest(&self, plan: &Plan, n: usize) -> Result<Vec<sys::cublasLtMatmulHeuristicResult_t>, Error> {
        let preference = lt::create_matmul_pref().check("cublasLtMatmulPreferenceCreate")?;
        // SAFETY: all zeros is a valid value of this plain struct; the pointers are valid for the given counts.
        let (status, found) = unsafe {
            let mut found = vec![std::mem::zeroed::<sys::cublasLtMatmulHeuristicResult_t>(); n];
            let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            let size = &raw const WORKSPACE_BYTES_VALUE;
            let mut status =
                sys::cublasLtMatmulPreferenceSetAttribute(preference, attribute, size.cast(), size_of::<usize>());
            let mut n_found = 0;
            if status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
                status = sys::cublasLtMatmulAlgoGetHeuristic(
                    self.handle,
                    plan.desc,
                    plan.w,
                    plan.x,
                    plan.y,
                    plan.y,
                    preference,
                    n as i32,
                    found.as_mut_ptr(),
                    &mut n_found,
                );
            }
            found.truncate(n_found.max(0) as usize);
            sys::cublasLtMatmulPreferenceDestroy(preference);
            (status, found)
        };
        status.check("cublasLtMatmulAlgoGetHeuristic")?;
        let found: Vec<_> =
            found.into_iter().filter(|f| f.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS).collect();
        if found.is_empty() {
            return Err(Error::Device("cublasLtMatmulAlgoGetHeuristic knows no algorithm for a matrix product".into()));
        }
        Ok(found)
    }

    fn enqueue(&self, gpu: &Gpu, plan: &Plan, shape: GemmShape, operands: Operands) -> Result<(), Error> {
        let alpha = 1.0f32;
        let beta = if shape.output == GemmOutput::AddF32 { 1.0f32 } else { 0.0 };
        // SAFETY: descriptors and buffers are alive and the buffers hold what the layouts say.
        unsafe {
            sys::cublasLtMatmul(
                self.handle,
                plan.desc,
                std::ptr::from_ref(&alpha).cast(),
                operands.w as *const c_void,
                plan.w,
                operands.x as *const c_void,
                plan.x,
                std::ptr::from_ref(&beta).cast(),
                operands.y as *const c_void,
                plan.y,
                operands.y as *mut c_void,
                plan.y,
                &plan.algo,
                self.workspace.ptr() as *mut c_void,
                self.workspace.n_bytes(),
                gpu.cu_stream().cast(),
            )
        }
        .check("cublasLtMatmul")
    }
}

/// [`WORKSPACE_BYTES`] with an address.
static WORKSPACE_BYTES_VALUE: usize = WORKSPACE_BYTES;

/// Algorithms by shape, kept on disk for one device type and one version of cuBLASLt: NVIDIA documents that they may
/// be stored and used again with the same version.
struct TunedAlgorithms {
    file: Option<PathBuf>,
    by_shape: BTreeMap<String, [u64; 8]>,
    is_changed: bool,
}

impl TunedAlgorithms {
    fn open(gpu: &Gpu) -> Self {
        // SAFETY: no conditions.
        let version = unsafe { sys::cublasLtGetVersion() };
        let device: String = gpu.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let file = compile::cache_folder().map(|folder| folder.join(format!("gemm/{device}-{version}.json")));
        let text = file.as_ref().and_then(|file| std::fs::read(file).ok());
        let by_shape = text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { file, by_shape, is_changed: false }
    }

    fn get(&self, shape: GemmShape) -> Option<sys::cublasLtMatmulAlgo_t> {
        self.by_shape.get(&shape.key()).map(|&data| sys::cublasLtMatmulAlgo_t { data })
    }

    fn insert(&mut self, shape: GemmShape, algo: sys::cublasLtMatmulAlgo_t) {
        self.by_shape.insert(shape.key(), algo.data);
        self.is_changed = true;
    }

    fn save(&mut self) {
        let Some(file) = self.file.as_ref().filter(|_| self.is_changed) else { return };
        let text = serde_json::to_vec(&self.by_shape).expect("numbers by name are valid JSON");
        if let Err(error) = compile::write_whole(file, &text) {
            tracing::warn!("{} cannot be written: {error}", file.display());
        }
        self.is_changed = false;
    }
}

impl GemmShape {
    fn key(self) -> String {
        format!("{}x{}x{} {:?}", self.m, self.n, self.k, self.output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padded_rows_cover_and_are_few() {
        assert!((1..=8192).all(|m| padded_rows(m) >= m && padded_rows(m) < m + 128));
        assert_eq!([1, 8, 9, 256, 257, 1025].map(padded_rows), [8, 8, 16, 256, 320, 1152]);
        let different: std::collections::HashSet<_> = (1..=8192).map(padded_rows).collect();
        assert!(different.len() <= 101, "{}", different.len());
    }
}
