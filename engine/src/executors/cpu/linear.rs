//! [`Linear`]: `y = x W^T + b` for weights as they are stored.

use std::{cell::RefCell, ops::Range};

use super::{
    activations::{Activations, Rows},
    arena::Arena,
    disjoint::Disjoint,
    kernels::{
        ActivationBlock, DOT_ROWS, DOT_WIDTH, Expanded, ExpandedGroup, FloatType, Kernels, MAX_WIDTH, Output,
        scale_columns,
    },
    packed::{PackedMatrix, ROWS},
    pool::Pool,
};
use crate::{Error, quant::GROUP, weights::StoredTensor};

/// Bytes of weights that a task reads: they stay in the L2 cache while all activations pass.
const TASK_BYTES: usize = 128 * 1024;
/// Tasks per thread at least, so that threads end together.
const TASKS_PER_THREAD: usize = 6;

/// Codes that are decoded at once: with them, a block of activations meets weights from the L2 cache.
const EXPANDED_CODES: usize = 80 * 1024;

/// Matrices one below the other, with a bias.
pub struct Linear {
    parts: Vec<Part>,
    tasks: Vec<Task>,
    n_rows: usize,
    /// `[n_rows]`.
    bias: Option<Vec<f32>>,
}

struct Part {
    /// Row of the whole at which it starts.
    first_row: usize,
    matrix: Matrix,
}

enum Matrix {
    Packed(PackedMatrix),
    /// Floats, or a quantised format that has no codes to pack.
    Stored(StoredTensor),
}

/// A piece of work: eight-row groups of a packed part, or [`DOT_ROWS`]-row groups of a stored one.
struct Task {
    part: usize,
    groups: Range<usize>,
}

impl Matrix {
    fn n_rows(&self) -> usize {
        match self {
            Self::Packed(packed) => packed.n_rows(),
            Self::Stored(stored) => stored.shape()[0],
        }
    }

    /// Number of groups and bytes of one.
    fn groups(&self) -> (usize, usize) {
        match self {
            Self::Packed(packed) => (packed.n_groups(), packed.group_bytes()),
            Self::Stored(stored) => {
                let n_rows = stored.shape()[0];
                (n_rows.div_ceil(DOT_ROWS), (stored.bytes().len() / n_rows).max(1) * DOT_ROWS)
            }
        }
    }
}

impl Linear {
    /// The product with `tensors`, `[n, n_cols]` each, one below the other; `bias`: one element per row.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no memory left for packed weights.
    pub fn new(
        tensors: Vec<StoredTensor>,
        bias: Option<Vec<f32>>,
        (arena, n_threads): (&mut Arena, usize),
    ) -> Result<Self, Error> {
        let mut parts = Vec::with_capacity(tensors.len());
        let mut first_row = 0;
        for tensor in tensors {
            let packed = PackedMatrix::pack(&tensor.view(), arena)?;
            let matrix = packed.map_or(Matrix::Stored(tensor), Matrix::Packed);
            let n_rows = matrix.n_rows();
            parts.push(Part { first_row, matrix });
            first_row += n_rows;
        }
        let n_bytes: usize = parts.iter().map(|part| part.matrix.groups()).map(|(n, bytes)| n * bytes).sum();
        let task_bytes = TASK_BYTES.min(n_bytes.div_ceil(TASKS_PER_THREAD * n_threads));
        let mut tasks = Vec::new();
        for (i, part) in parts.iter().enumerate() {
            let (n_groups, group_bytes) = part.matrix.groups();
            // Whole pairs: some kernels take two groups at once.
            let per_task = task_bytes.div_ceil(group_bytes).next_multiple_of(2);
            for first in (0..n_groups).step_by(per_task) {
                tasks.push(Task { part: i, groups: first..(first + per_task).min(n_groups) });
            }
        }
        Ok(Self { parts, tasks, n_rows: first_row, bias })
    }

    /// Columns of the result.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Whether the product needs its input as integers.
    pub fn wants_integers(&self) -> bool {
        self.parts.iter().any(|part| matches!(part.matrix, Matrix::Packed(_)))
    }

    /// Whether the product needs its input as float32.
    pub fn wants_floats(&self) -> bool {
        self.parts.iter().any(|part| matches!(part.matrix, Matrix::Stored(_)))
    }

    /// Room for `max_rows` rows of `n_cols` as all of `linears` want them.
    pub fn inputs<'a>(linears: impl IntoIterator<Item = &'a Self>, max_rows: usize, n_cols: usize) -> Activations {
        let (mut integers, mut floats) = (false, false);
        for linear in linears {
            integers |= linear.wants_integers();
            floats |= linear.wants_floats();
        }
        let inputs = Activations::new(max_rows, n_cols, integers);
        if integers && !floats { inputs.without_floats() } else { inputs }
    }

    /// Bytes of memory, without what lies in memory maps.
    pub fn n_bytes(&self) -> usize {
        let of = |part: &Part| match &part.matrix {
            Matrix::Packed(packed) => packed.n_bytes(),
            Matrix::Stored(stored) => stored.owned_bytes(),
        };
        self.parts.iter().map(of).sum()
    }

    /// Multiplies the rows of `x`, which are of one segment: `out`, `[n_rows of x, self.n_rows()]`, is set, or added to
    /// with `accumulate`.
    pub fn run(&self, pool: &mut Pool, kernels: &Kernels, x: &Activations, (out, accumulate): (&mut [f32], bool)) {
        let x = x.segment(0);
        let out = Disjoint::new(&mut out[..x.n_rows() * self.n_rows]);
        pool.run(self.tasks.len(), &|i| self.run_task(i, kernels, &x, (&out, accumulate)));
    }

    /// Multiplies each segment of `x` with the product of the same place in `products`, all with as many rows: `out`,
    /// `[n_rows of all segments, n_rows()]`, is set. One job for all.
    pub fn run_grouped(products: &[&Self], pool: &mut Pool, kernels: &Kernels, x: &Activations, out: &mut [f32]) {
        let out = Disjoint::new(out);
        // First task of each product.
        let mut n_tasks = 0;
        let starts: Vec<usize> = products
            .iter()
            .map(|product| {
                n_tasks += product.tasks.len();
                n_tasks - product.tasks.len()
            })
            .collect();
        pool.run(n_tasks, &|i| {
            let product = starts.partition_point(|&start| start <= i) - 1;
            products[product].run_task(i - starts[product], kernels, &x.segment(product), (&out, false));
        });
    }

    /// Runs task `i` for the rows `x`. Row `m` of all segments has its results in row `m` of `out`.
    fn run_task(&self, i: usize, kernels: &Kernels, x: &Rows<'_>, (out, accumulate): (&Disjoint<'_, f32>, bool)) {
        let task = &self.tasks[i];
        let part = &self.parts[task.part];
        let origin = x.range().start * self.n_rows + part.first_row;
        let target = Target { out, stride: self.n_rows, origin, accumulate };
        let rows = match &part.matrix {
            Matrix::Packed(packed) => run_packed(packed, kernels, x, &target, task.groups.clone()),
            Matrix::Stored(stored) => run_stored(stored, kernels, x, &target, task.groups.clone()),
        };
        if let Some(bias) = &self.bias {
            let bias = &bias[part.first_row + rows.start..part.first_row + rows.end];
            for m in 0..x.n_rows() {
                let first = origin + m * self.n_rows;
                // SAFETY: these columns of the result belong to this task.
                let out = unsafe { out.range(first + rows.start..first + rows.end) };
                out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
            }
        }
    }
}

/// Where a part's results go.
struct Target<'a> {
    out: &'a Disjoint<'a, f32>,
    stride: usize,
    /// Element of the first row and column.
    origin: usize,
    accumulate: bool,
}

impl Target<'_> {
    /// From row `m`, column `column` of the part on.
    fn at(&self, m: usize, column: usize) -> Output {
        let ptr = self.out.ptr_at(self.origin + m * self.stride + column);
        Output { ptr, stride: self.stride, accumulate: self.accumulate }
    }
}

/// Runs `groups` of a packed matrix; returns their rows.
fn run_packed(
    packed: &PackedMatrix,
    kernels: &Kernels,
    x: &Rows<'_>,
    target: &Target<'_>,
    groups: Range<usize>,
) -> Range<usize> {
    let rows = groups.start * ROWS..(groups.end * ROWS).min(packed.n_rows());
    if x.n_rows() < kernels.expand_from {
        multiply(packed.n_rows(), x, target, groups, |groups, block, out| {
            // SAFETY: `multiply` gives an output of eight columns of the block's rows for each group.
            unsafe { kernels.affine(&packed.groups(groups), block, out) };
        });
        return rows;
    }
    let n_cols = packed.n_cols();
    let (per_group, per_scale) = (ROWS * n_cols, ROWS * n_cols / scale_columns(packed.codes().scales));
    let per_minimum = ROWS * n_cols / GROUP;
    EXPANDED.with_borrow_mut(|(codes, scales)| {
        let n_at_once = (EXPANDED_CODES / per_group).max(1);
        codes.resize(codes.len().max(n_at_once * per_group), 0);
        scales.resize(scales.len().max(n_at_once * (per_scale + per_minimum)), 0.0);
        for first in groups.clone().step_by(n_at_once) {
            let some = first..(first + n_at_once).min(groups.end);
            for (i, group) in some.clone().enumerate() {
                let scales = &mut scales[i * (per_scale + per_minimum)..][..per_scale + per_minimum];
                let (scales, minima) = scales.split_at_mut(per_scale);
                let codes = &mut codes[i * per_group..][..per_group];
                kernels.expand(&packed.groups(group..group + 1), &mut Expanded { codes, scales, minima });
            }
            multiply(packed.n_rows(), x, target, some, |groups, block, out| {
                for (n, i) in (groups.start - first..groups.end - first).enumerate() {
                    let scales = &scales[i * (per_scale + per_minimum)..][..per_scale + per_minimum];
                    let (scales, minima) = scales.split_at(per_scale);
                    let group = ExpandedGroup { codes: &codes[i * per_group..][..per_group], scales, minima };
                    let out = Output { ptr: out.ptr.wrapping_add(n * ROWS), ..out };
                    // SAFETY: as above.
                    unsafe { kernels.expanded(&group, block, out) };
                }
            });
        }
    });
    rows
}

/// Calls `kernel` for each block of activations and all of `groups`, with the place for eight columns of results of each
/// group.
fn multiply(
    n_rows: usize,
    x: &Rows<'_>,
    target: &Target<'_>,
    groups: Range<usize>,
    kernel: impl Fn(Range<usize>, &ActivationBlock<'_>, Output),
) {
    // The last group may be filled up with rows that the matrix does not have.
    let whole = groups.start..groups.end.min(n_rows / ROWS);
    for (first, block) in x.blocks() {
        if !whole.is_empty() {
            kernel(whole.clone(), &block, target.at(first, whole.start * ROWS));
        }
        if whole.end == groups.end {
            continue;
        }
        let mut filled = [0f32; MAX_WIDTH * ROWS];
        let room = Output { ptr: filled.as_mut_ptr(), stride: ROWS, accumulate: false };
        kernel(whole.end..groups.end, &block, room);
        let out = target.at(first, whole.end * ROWS);
        for m in 0..block.width {
            for n in 0..n_rows % ROWS {
                // SAFETY: the last columns, which belong to this task.
                unsafe {
                    let at = out.ptr.add(m * out.stride + n);
                    *at = if out.accumulate { *at + filled[m * ROWS + n] } else { filled[m * ROWS + n] };
                }
            }
        }
    }
}

thread_local! {
    /// Decoded groups: codes, and scales and minima.
    static EXPANDED: RefCell<(Vec<i16>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
    /// Decoded weight rows.
    static DECODED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Runs `groups` of a stored matrix; returns their rows.
fn run_stored(
    stored: &StoredTensor,
    kernels: &Kernels,
    x: &Rows<'_>,
    target: &Target<'_>,
    groups: Range<usize>,
) -> Range<usize> {
    let n_rows = stored.shape()[0];
    let row_bytes = stored.bytes().len() / n_rows;
    let rows = groups.start * DOT_ROWS..(groups.end * DOT_ROWS).min(n_rows);
    let blocks = (0..x.n_rows()).step_by(DOT_WIDTH).map(|m| (m, DOT_WIDTH.min(x.n_rows() - m)));
    let few = |first: usize| (first, DOT_ROWS.min(rows.end - first));
    if let Some(float) = FloatType::of(stored.dtype()) {
        for (m, width) in blocks {
            for (row, n) in rows.clone().step_by(DOT_ROWS).map(few) {
                let weights = &stored.bytes()[row * row_bytes..(row + n) * row_bytes];
                // SAFETY: these rows and columns of the result belong to this task.
                unsafe { kernels.dots(float, (weights, n), (x.floats(m, width), width), target.at(m, row)) };
            }
        }
        return rows;
    }
    DECODED.with_borrow_mut(|decoded| {
        let n_cols = stored.shape()[1];
        decoded.resize(DOT_ROWS * n_cols, 0.0);
        for (row, n) in rows.clone().step_by(DOT_ROWS).map(few) {
            let decoded = &mut decoded[..n * n_cols];
            stored.dtype().decode(&stored.bytes()[row * row_bytes..(row + n) * row_bytes], decoded);
            for (m, width) in blocks.clone() {
                let weights = (bytemuck::cast_slice(decoded), n);
                // SAFETY: as above.
                unsafe { kernels.dots(FloatType::F32, weights, (x.floats(m, width), width), target.at(m, row)) };
            }
        }
    });
    rows
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::{super::packed::tests::random_tensor, *};
    use crate::weights::{DType, TensorView};

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    /// The product in double precision, `[n_tokens, n_rows]`.
    fn reference(weights: &[f32], x: &[f32], n_cols: usize, bias: &[f32]) -> Vec<f64> {
        let rows = x.chunks_exact(n_cols).flat_map(|x| {
            weights.chunks_exact(n_cols).zip(bias).map(move |(w, &bias)| {
                w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum::<f64>() + f64::from(bias)
            })
        });
        rows.collect()
    }

    fn check(tensors: Vec<StoredTensor>, n_cols: usize, tolerance: f64) {
        let weights: Vec<f32> = tensors.iter().flat_map(|t| t.view().to_f32().into_owned()).collect();
        let n_rows = weights.len() / n_cols;
        let bias = noise(n_rows, 3);
        let linear = Linear::new(tensors, Some(bias.clone()), (&mut Arena::default(), 2)).expect("memory");
        let mut pool = Pool::new(2).expect("threads");
        for kernels in Kernels::available() {
            for n_tokens in [1, 2, 3, 5, 8, 9, 45] {
                let values = noise(n_tokens * n_cols, n_tokens as u32);
                let mut x = Linear::inputs([&linear], 45, n_cols);
                let fill = |m: usize, row: &mut [f32]| row.copy_from_slice(&values[m * n_cols..][..n_cols]);
                x.fill(&mut pool, kernels, n_tokens, &fill);
                let mut out = vec![1.0; n_tokens * n_rows];
                linear.run(&mut pool, kernels, &x, (&mut out, false));
                let expected = reference(&weights, &values, n_cols, &bias);
                let scale = expected.iter().map(|v| v.abs()).fold(0.0, f64::max);
                for (i, (got, want)) in out.iter().zip(&expected).enumerate() {
                    let error = (f64::from(*got) - want).abs() / scale;
                    assert!(error < tolerance, "{}: {n_tokens} rows, element {i}: {got}, not {want}", kernels.name);
                }
                linear.run(&mut pool, kernels, &x, (&mut out, true));
                for (got, want) in out.iter().zip(&expected) {
                    assert!((f64::from(*got) - 2.0 * want).abs() / scale < 2.0 * tolerance, "accumulated");
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_batch() {
        const N_COLS: usize = 256;
        let tensors = vec![
            quantised(3, 24, N_COLS),
            quantised(2, 8, N_COLS),
            quantised(8, 21, N_COLS),
            quantised(12, 24, N_COLS),
            quantised(14, 24, N_COLS),
            floats(DType::F16, 7, N_COLS),
        ];
        let linear = Linear::new(tensors, None, (&mut Arena::default(), 2)).expect("memory");
        let mut pool = Pool::new(2).expect("threads");
        let values = noise(45 * N_COLS, 5);
        for kernels in Kernels::available() {
            let mut product = |rows: Range<usize>| {
                let mut x = Activations::new(45, N_COLS, true);
                let fill =
                    |m: usize, row: &mut [f32]| row.copy_from_slice(&values[(rows.start + m) * N_COLS..][..N_COLS]);
                x.fill(&mut pool, kernels, rows.len(), &fill);
                let mut out = vec![0.0; rows.len() * linear.n_rows()];
                linear.run(&mut pool, kernels, &x, (&mut out, false));
                out
            };
            let whole = product(0..45);
            for rows in [0..1, 7..15, 20..41] {
                let part = &whole[rows.start * linear.n_rows()..rows.end * linear.n_rows()];
                assert_eq!(part, product(rows.clone()), "{}: rows {rows:?}", kernels.name);
            }
        }
    }

    #[test]
    fn grouped_products_are_those_of_each() {
        let of = |seed: u64| {
            let packed = StoredTensor::new(random_tensor(8, 21, 64, seed), None);
            let tensors = vec![packed, floats(DType::F16, 7, 64)];
            Linear::new(tensors, Some(noise(28, seed as u32)), (&mut Arena::default(), 2)).expect("memory")
        };
        let products = [1, 2, 3].map(of);
        let lengths = [1, 30, 9];
        let values = noise(40 * 64, 5);
        let mut pool = Pool::new(2).expect("threads");
        for kernels in Kernels::available() {
            let mut x = Activations::new(40, 64, true);
            let fill = |m: usize, row: &mut [f32]| row.copy_from_slice(&values[m * 64..][..64]);
            x.fill_segments(&mut pool, kernels, lengths, &fill);
            let mut grouped = vec![0.0; 40 * 28];
            Linear::run_grouped(&products.each_ref(), &mut pool, kernels, &x, &mut grouped);
            let mut first = 0;
            for (product, n) in products.iter().zip(lengths) {
                let fill = |m: usize, row: &mut [f32]| fill(first + m, row);
                x.fill(&mut pool, kernels, n, &fill);
                let mut alone = vec![0.0; n * 28];
                product.run(&mut pool, kernels, &x, (&mut alone, false));
                assert_eq!(grouped[first * 28..(first + n) * 28], alone, "{}: {n} rows", kernels.name);
                first += n;
            }
        }
    }

    fn quantised(ggml_type: u32, n_rows: usize, n_cols: usize) -> StoredTensor {
        StoredTensor::new(random_tensor(ggml_type, n_rows, n_cols, u64::from(ggml_type)), None)
    }

    fn floats(dtype: DType, n_rows: usize, n_cols: usize) -> StoredTensor {
        let values = noise(n_rows * n_cols, 9);
        let data: Vec<u8> = match dtype {
            DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        };
        StoredTensor::new(TensorView { dtype, shape: vec![n_rows, n_cols], data: Cow::Owned(data) }, None)
    }

    #[test]
    fn quantised_products_are_those_of_float64() {
        // Errors are those of 16-bit activations.
        for (ggml_type, n_rows) in [(2, 64), (3, 64), (8, 64), (3, 61), (3, 72), (8, 5)] {
            check(vec![quantised(ggml_type, n_rows, 96)], 96, 5e-5);
        }
    }

    #[test]
    fn every_format_multiplies() {
        for format in crate::quant::FORMATS {
            let tolerance = if format.affine().is_some() { 5e-5 } else { 2e-6 };
            for n_rows in [40, 7] {
                check(vec![quantised(format.ggml_type(), n_rows, 512)], 512, tolerance);
            }
        }
    }

    #[test]
    fn float_products_are_those_of_float64() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            check(vec![floats(dtype, 32, 64)], 64, 2e-6);
            check(vec![floats(dtype, 7, 37)], 37, 2e-6);
        }
    }

    #[test]
    fn parts_of_different_types_make_one_product() {
        check(vec![quantised(3, 24, 64), floats(DType::BF16, 10, 64), quantised(8, 16, 64)], 64, 5e-5);
    }
}
