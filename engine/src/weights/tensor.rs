//! [`TensorView`]: a stored tensor and its conversion to the element types that executors use.

use std::{borrow::Cow, fmt, ops::Range, sync::Arc};

use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;

use crate::quant::{GROUP, QuantFormat};

/// Elements converted by one task: a multiple of every block size, small enough for the L2 cache.
const CHUNK: usize = 16 * 1024;

/// Element type of a stored tensor.
#[derive(Clone, Copy)]
pub enum DType {
    /// IEEE single precision, little endian.
    F32,
    /// IEEE half precision, little endian.
    F16,
    /// bfloat16, little endian.
    BF16,
    /// Blocks of a quantised format.
    Quant(&'static dyn QuantFormat),
}

impl DType {
    /// The type's name in GGUF tools, such as `BF16` or `Q4_0`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Quant(format) => format.name(),
        }
    }

    /// Elements that are stored together: 1, or the block size of a quantised format.
    pub fn block_size(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Quant(format) => format.block_size(),
        }
    }

    /// Bytes of [`DType::block_size`] elements.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Quant(format) => format.block_bytes(),
        }
    }

    /// Bytes of `n_elements` elements; `None` if they are not whole blocks or the number overflows.
    pub fn size_of(self, n_elements: usize) -> Option<usize> {
        if !n_elements.is_multiple_of(self.block_size()) {
            return None;
        }
        (n_elements / self.block_size()).checked_mul(self.block_bytes())
    }
}

impl fmt::Debug for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl PartialEq for DType {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for DType {}

/// A stored tensor, usually a slice of a memory map.
#[derive(Debug, Clone)]
pub struct TensorView<'a> {
    /// Element type.
    pub dtype: DType,
    /// `[rows, columns]` or `[n]`, row-major: PyTorch's order.
    pub shape: Vec<usize>,
    /// The elements as stored. Rows are whole: a row never shares a quantised block with the next.
    pub data: Cow<'a, [u8]>,
}

/// A tensor that outlives its source: a range of a shared memory map, or its own bytes.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: StoredBytes,
}

#[derive(Debug, Clone)]
enum StoredBytes {
    Mapped(Arc<Mmap>, Range<usize>),
    Owned(Arc<[u8]>),
}

impl StoredTensor {
    /// The tensor `view`, without copying if it borrows from `map`.
    pub fn new(view: TensorView<'_>, map: Option<&Arc<Mmap>>) -> Self {
        let bytes = match (&view.data, map) {
            (Cow::Borrowed(data), Some(map)) if map.as_ptr_range().contains(&data.as_ptr()) => {
                let start = data.as_ptr() as usize - map.as_ptr() as usize;
                StoredBytes::Mapped(map.clone(), start..start + data.len())
            }
            _ => StoredBytes::Owned(view.data.as_ref().into()),
        };
        Self { dtype: view.dtype, shape: view.shape, bytes }
    }

    /// The tensor.
    pub fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, shape: self.shape.clone(), data: Cow::Borrowed(self.bytes()) }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The elements as stored.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            StoredBytes::Mapped(map, range) => &map[range.clone()],
            StoredBytes::Owned(bytes) => bytes,
        }
    }

    /// `[rows, columns]` or `[n]`.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Bytes that are not in a memory map.
    pub fn owned_bytes(&self) -> usize {
        match &self.bytes {
            StoredBytes::Mapped(..) => 0,
            StoredBytes::Owned(bytes) => bytes.len(),
        }
    }
}

impl TensorView<'_> {
    /// The tensor rounded to `format`; `None` if it is not of floats, its rows are not whole blocks, or there is no
    /// rounding to the format.
    pub fn quantize(&self, format: &'static dyn QuantFormat) -> Option<TensorView<'static>> {
        let (quantize, n_columns) = (format.quantizer()?, self.n_columns());
        if matches!(self.dtype, DType::Quant(_)) || !n_columns.is_multiple_of(GROUP) {
            return None;
        }
        let dtype = DType::Quant(format);
        let mut data = vec![0; dtype.size_of(self.n_elements())?];
        data.par_chunks_mut(n_columns / GROUP * format.block_bytes())
            .zip(self.data.par_chunks(self.row_bytes()))
            .for_each_init(
                || vec![0.0; n_columns],
                |values, (blocks, row)| {
                    self.dtype.decode(row, values);
                    let groups = values.as_chunks::<GROUP>().0;
                    for (values, block) in groups.iter().zip(blocks.chunks_exact_mut(format.block_bytes())) {
                        quantize(values, block);
                    }
                },
            );
        Some(TensorView { dtype, shape: self.shape.clone(), data: Cow::Owned(data) })
    }

    /// Elements in all.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements of one row: the last dimension.
    pub fn n_columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.n_columns() / self.dtype.block_size() * self.dtype.block_bytes()
    }

    /// Rows `rows` of a two-dimensional tensor, or elements `rows` of an unquantised one-dimensional one,
    /// without copying.
    ///
    /// # Panics
    /// If `rows` is out of range or cuts a quantised block.
    pub fn rows(&self, rows: std::ops::Range<usize>) -> TensorView<'_> {
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        let bytes = if self.shape.len() == 1 { self.dtype.block_bytes() } else { self.row_bytes() };
        assert!(self.shape.len() > 1 || self.dtype.block_size() == 1, "a quantised row cannot be cut");
        TensorView { dtype: self.dtype, shape, data: Cow::Borrowed(&self.data[rows.start * bytes..rows.end * bytes]) }
    }

    /// All elements in single precision; borrowed if they are stored so and aligned.
    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        if self.dtype == DType::F32
            && let Ok(values) = bytemuck::try_cast_slice(&self.data)
        {
            return Cow::Borrowed(values);
        }
        let mut out = vec![0.0; self.n_elements()];
        self.read_f32_into(&mut out);
        Cow::Owned(out)
    }

    /// Converts all elements to single precision on all threads. `out`: `[n_elements]`.
    ///
    /// # Panics
    /// If `out` is of another length.
    pub fn read_f32_into(&self, out: &mut [f32]) {
        self.convert_into(out, |chunk, out| self.decode_chunk(chunk, out));
    }

    /// Converts all elements to bfloat16 (round to nearest even) on all threads. `out`: `[n_elements]`.
    ///
    /// # Panics
    /// If `out` is of another length.
    pub fn write_bf16_into(&self, out: &mut [bf16]) {
        self.convert_into(out, |chunk, out| match self.dtype {
            DType::BF16 => copy_le(chunk, out, bf16::from_le_bytes),
            _ => {
                let mut values = [0.0; CHUNK];
                let values = &mut values[..out.len()];
                self.decode_chunk(chunk, values);
                out.iter_mut().zip(values).for_each(|(out, value)| *out = bf16::from_f32(*value));
            }
        });
    }

    /// Converts all elements to half precision (round to nearest even) on all threads. `out`: `[n_elements]`.
    ///
    /// # Panics
    /// If `out` is of another length.
    pub fn write_f16_into(&self, out: &mut [f16]) {
        self.convert_into(out, |chunk, out| match self.dtype {
            DType::F16 => copy_le(chunk, out, f16::from_le_bytes),
            _ => {
                let mut values = [0.0; CHUNK];
                let values = &mut values[..out.len()];
                self.decode_chunk(chunk, values);
                half::slice::HalfFloatSliceExt::convert_from_f32_slice(out, values);
            }
        });
    }

    /// Runs `convert` on pieces of at most [`CHUNK`] elements and their bytes, on all threads.
    fn convert_into<T: Send>(&self, out: &mut [T], convert: impl Fn(&[u8], &mut [T]) + Sync) {
        assert_eq!(out.len(), self.n_elements(), "output length of a tensor of shape {:?}", self.shape);
        let chunk_bytes = CHUNK / self.dtype.block_size() * self.dtype.block_bytes();
        self.data
            .par_chunks(chunk_bytes)
            .zip_eq(out.par_chunks_mut(CHUNK))
            .for_each(|(chunk, out)| convert(chunk, out));
    }

    fn decode_chunk(&self, chunk: &[u8], out: &mut [f32]) {
        self.dtype.decode(chunk, out);
    }
}

impl DType {
    /// Converts `chunk` to single precision on this thread. `out`: as many elements as `chunk` holds, at most
    /// [`CHUNK`] for half precision.
    pub(crate) fn decode(self, chunk: &[u8], out: &mut [f32]) {
        match self {
            DType::F32 => copy_le(chunk, out, f32::from_le_bytes),
            DType::BF16 => copy_le(chunk, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
            DType::F16 => {
                let mut halves = [f16::ZERO; CHUNK];
                let halves = &mut halves[..out.len()];
                copy_le(chunk, halves, f16::from_le_bytes);
                half::slice::HalfFloatSliceExt::convert_to_f32_slice(halves, out);
            }
            DType::Quant(format) => format.dequantize(chunk, out),
        }
    }
}

/// Reads little-endian numbers of `N` bytes; `bytes` need not be aligned.
fn copy_le<T, const N: usize>(bytes: &[u8], out: &mut [T], read: impl Fn([u8; N]) -> T) {
    for (bytes, out) in bytes.as_chunks::<N>().0.iter().zip(out) {
        *out = read(*bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Enough for several chunks and a partial one.
    const N: usize = 2 * CHUNK + 96;

    fn numbers() -> Vec<f32> {
        (0..N).map(|i| (i as f32 - 9000.0) / 256.0).collect()
    }

    fn view(dtype: DType, data: Vec<u8>) -> TensorView<'static> {
        TensorView { dtype, shape: vec![N / 32, 32], data: Cow::Owned(data) }
    }

    #[test]
    fn float_types_convert_to_each_other() {
        let values = numbers();
        let f32s = view(DType::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect());
        let f16s = view(DType::F16, values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect());
        let bf16s = view(DType::BF16, values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect());
        let as_f16: Vec<f32> = values.iter().map(|v| f16::from_f32(*v).to_f32()).collect();
        let as_bf16: Vec<f32> = values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
        assert_eq!(*f32s.to_f32(), values);
        assert_eq!(*f16s.to_f32(), as_f16);
        assert_eq!(*bf16s.to_f32(), as_bf16);

        let mut halves = vec![f16::ZERO; N];
        f32s.write_f16_into(&mut halves);
        assert!(halves.iter().zip(&as_f16).all(|(h, v)| h.to_f32() == *v));
        f16s.write_f16_into(&mut halves);
        assert!(halves.iter().zip(&as_f16).all(|(h, v)| h.to_f32() == *v));

        let mut brains = vec![bf16::ZERO; N];
        f32s.write_bf16_into(&mut brains);
        assert!(brains.iter().zip(&as_bf16).all(|(h, v)| h.to_f32() == *v));
        bf16s.write_bf16_into(&mut brains);
        assert!(brains.iter().zip(&as_bf16).all(|(h, v)| h.to_f32() == *v));
    }

    #[test]
    fn quantised_chunks_meet_at_block_edges() {
        let format = crate::quant::by_ggml_type(8).expect("Q8_0");
        let mut data = Vec::new();
        for block in 0..N / 32 {
            data.extend(f16::from_f32((block % 7) as f32).to_le_bytes());
            data.extend((0..32u8).map(|i| i.wrapping_sub(16)));
        }
        let values = view(DType::Quant(format), data);
        let out = values.to_f32();
        for (i, value) in out.iter().enumerate() {
            assert_eq!(*value, ((i / 32) % 7) as f32 * ((i % 32) as f32 - 16.0), "element {i}");
        }
        let rows = values.rows(3..5);
        assert_eq!(rows.shape, [2, 32]);
        assert_eq!(*rows.to_f32(), out[96..160]);
    }

    #[test]
    fn misaligned_single_precision_is_copied() {
        let bytes: Vec<u8> = [0u8].into_iter().chain([1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes())).collect();
        let view = TensorView { dtype: DType::F32, shape: vec![2], data: Cow::Borrowed(&bytes[1..]) };
        assert_eq!(*view.to_f32(), [1.5, -2.0]);
    }

    #[test]
    fn sizes_refuse_partial_blocks_and_overflow() {
        let q8 = DType::Quant(crate::quant::by_ggml_type(8).expect("Q8_0"));
        assert_eq!(q8.size_of(64), Some(68));
        assert_eq!(q8.size_of(33), None);
        assert_eq!(DType::F32.size_of(usize::MAX), None);
    }
}
