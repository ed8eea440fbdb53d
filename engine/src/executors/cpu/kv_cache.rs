//! [`KvCache`]: keys and values of one layer, in half precision or as 8-bit integers.

use super::{
    disjoint::Disjoint,
    kernels::{Kernels, TILE_COLS},
};
use crate::{decoder::DecoderSpec, quant::GROUP, step::PAGE_SIZE};

// A page's tokens are the columns of a tile.
const _: () = assert!(PAGE_SIZE == TILE_COLS);

/// Alignment of what belongs to a page and head: a cache line.
const ALIGNMENT: usize = 64;

/// Element type of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvType {
    /// Half precision.
    F16,
    /// 8-bit integers with a single-precision scale for each token, head and 32 dimensions.
    Q8_0,
}

impl KvType {
    /// The type's name in logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "float16",
            Self::Q8_0 => "q8_0",
        }
    }

    fn element_bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::Q8_0 => 1,
        }
    }
}

/// Sizes of a cache.
#[derive(Debug, Clone, Copy)]
pub struct KvLayout {
    kv_type: KvType,
    n_kv_heads: usize,
    head_dim: usize,
    /// `head_dim`, rounded up to whole tiles.
    value_stride: usize,
}

/// Keys and values of one layer. A page and head has, one after the other: keys `[head_dim, PAGE_SIZE]`; of 8-bit keys
/// the scales `[n_groups, PAGE_SIZE]`; values `[PAGE_SIZE, value_stride]`; of 8-bit values the scales
/// `[n_groups, PAGE_SIZE]`.
pub struct KvCache {
    layout: KvLayout,
    /// `[n_pages, n_kv_heads, block_bytes / 4]`; words, so that every part is aligned.
    words: Vec<u32>,
}

/// A page's keys and values of one head.
#[derive(Clone, Copy)]
pub enum KvPage<'a> {
    /// Half precision.
    F16 {
        /// `[head_dim, PAGE_SIZE]`.
        keys: &'a [u16],
        /// `[PAGE_SIZE, value_stride]`.
        values: &'a [u16],
    },
    /// 8-bit integers.
    Q8_0 {
        /// `[head_dim, PAGE_SIZE]`.
        keys: &'a [i8],
        /// `[n_groups, PAGE_SIZE]`.
        key_scales: &'a [[f32; PAGE_SIZE]],
        /// `[PAGE_SIZE, value_stride]`.
        values: &'a [i8],
        /// `[n_groups, PAGE_SIZE]`.
        value_scales: &'a [[f32; PAGE_SIZE]],
    },
}

impl KvLayout {
    /// The layout for the heads of `spec`.
    pub fn new(spec: &DecoderSpec, kv_type: KvType) -> Self {
        let value_stride = spec.head_dim.next_multiple_of(TILE_COLS);
        Self { kv_type, n_kv_heads: spec.n_kv_heads, head_dim: spec.head_dim, value_stride }
    }

    /// Elements from one token's values to the next one's.
    pub fn value_stride(self) -> usize {
        self.value_stride
    }

    /// Bytes of a page of one layer.
    pub fn page_bytes(self) -> usize {
        self.n_kv_heads * self.block_bytes()
    }

    /// Where keys' scales, values, values' scales and the next block start.
    fn offsets(self) -> [usize; 4] {
        let size = self.kv_type.element_bytes();
        let scale_bytes = match self.kv_type {
            KvType::F16 => 0,
            KvType::Q8_0 => self.head_dim.div_ceil(GROUP) * PAGE_SIZE * size_of::<f32>(),
        };
        let key_scales = self.head_dim * PAGE_SIZE * size;
        let values = key_scales + scale_bytes;
        let value_scales = values + self.value_stride * PAGE_SIZE * size;
        [key_scales, values, value_scales, (value_scales + scale_bytes).next_multiple_of(ALIGNMENT)]
    }

    /// Bytes of a page and head.
    fn block_bytes(self) -> usize {
        self.offsets()[3]
    }
}

impl KvCache {
    /// A cache of `n_pages` pages. The system gives zeroed memory when a page is first written, so pages that no
    /// sequence ever used cost none.
    pub fn new(layout: KvLayout, n_pages: usize) -> Self {
        Self { layout, words: vec![0; n_pages * layout.page_bytes() / size_of::<u32>()] }
    }

    /// Keys and values of a page and head.
    pub fn page(&self, page: u32, head: usize) -> KvPage<'_> {
        let n_bytes = self.layout.block_bytes();
        let [key_scales, values, value_scales, _] = self.layout.offsets();
        let first = (page as usize * self.layout.n_kv_heads + head) * n_bytes;
        let block = &bytemuck::cast_slice::<u32, u8>(&self.words)[first..first + n_bytes];
        let values_end = values + self.layout.value_stride * PAGE_SIZE * self.layout.kv_type.element_bytes();
        match self.layout.kv_type {
            KvType::F16 => KvPage::F16 {
                keys: bytemuck::cast_slice(&block[..key_scales]),
                values: bytemuck::cast_slice(&block[values..values_end]),
            },
            KvType::Q8_0 => KvPage::Q8_0 {
                keys: bytemuck::cast_slice(&block[..key_scales]),
                key_scales: bytemuck::cast_slice(&block[key_scales..values]),
                values: bytemuck::cast_slice(&block[values..value_scales]),
                value_scales: bytemuck::cast_slice(&block[value_scales..][..values - key_scales]),
            },
        }
    }

    /// For writing different slots from several threads.
    pub fn writer(&mut self) -> KvWriter<'_> {
        KvWriter { layout: self.layout, bytes: Disjoint::new(bytemuck::cast_slice_mut(&mut self.words)) }
    }
}

/// Writes to a cache.
pub struct KvWriter<'a> {
    layout: KvLayout,
    bytes: Disjoint<'a, u8>,
}

impl KvWriter<'_> {
    /// Writes key and value, `[head_dim]` each, of `head` at `slot` (`page * PAGE_SIZE + offset`).
    ///
    /// # Safety
    /// Nobody else may use this slot and head meanwhile.
    pub unsafe fn write(&self, kernels: &Kernels, (slot, head): (u32, usize), key: &[f32], value: &[f32]) {
        let (page, token) = (slot as usize / PAGE_SIZE, slot as usize % PAGE_SIZE);
        let [key_scales, values, value_scales, n_bytes] = self.layout.offsets();
        let block = self.bytes.ptr_at((page * self.layout.n_kv_heads + head) * n_bytes);
        let stride = self.layout.value_stride;
        // SAFETY: the slot's own elements, by the caller's promise, each within its block and aligned.
        unsafe {
            match self.layout.kv_type {
                KvType::F16 => {
                    let (keys, values) = (block.cast::<u16>(), block.add(values).cast::<u16>());
                    let mut halves = [0u16; GROUP];
                    for (g, key) in key.chunks(GROUP).enumerate() {
                        kernels.to_f16(key, &mut halves[..key.len()]);
                        for (i, &half) in halves[..key.len()].iter().enumerate() {
                            *keys.add((g * GROUP + i) * PAGE_SIZE + token) = half;
                        }
                    }
                    let own = std::slice::from_raw_parts_mut(values.add(token * stride), value.len());
                    kernels.to_f16(value, own);
                }
                KvType::Q8_0 => {
                    let (keys, values) = (block.cast::<i8>(), block.add(values).cast::<i8>());
                    let key_scales = block.add(key_scales).cast::<f32>();
                    let value_scales = block.add(value_scales).cast::<f32>();
                    for (g, (key, value)) in key.chunks(GROUP).zip(value.chunks(GROUP)).enumerate() {
                        *key_scales.add(g * PAGE_SIZE + token) = round(key, |i, code| {
                            *keys.add((g * GROUP + i) * PAGE_SIZE + token) = code;
                        });
                        *value_scales.add(g * PAGE_SIZE + token) = round(value, |i, code| {
                            *values.add(token * stride + g * GROUP + i) = code;
                        });
                    }
                }
            }
        }
    }
}

/// Rounds `values` to integers of -127 to 127, which `put` takes by place; returns their scale.
fn round(values: &[f32], mut put: impl FnMut(usize, i8)) -> f32 {
    let scale = values.iter().fold(0f32, |max, v| max.max(v.abs())) / 127.0;
    let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
    for (i, value) in values.iter().enumerate() {
        put(i, (value * inverse).round_ties_even() as i8);
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executors::cpu::tests::llama;

    fn spec(head_dim: usize) -> DecoderSpec {
        DecoderSpec { n_heads: 2, n_kv_heads: 2, head_dim, ..llama() }
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else_changes() {
        for kv_type in [KvType::F16, KvType::Q8_0] {
            for head_dim in [64, 40, 8] {
                let mut cache = KvCache::new(KvLayout::new(&spec(head_dim), kv_type), 3);
                let value_of = |slot: u32, head: usize, d: usize| (slot as f32 + 1.0) * (d as f32 - 3.5 + head as f32);
                for slot in [17u32, 16, 31, 47] {
                    for head in 0..2 {
                        let key: Vec<f32> = (0..head_dim).map(|d| value_of(slot, head, d)).collect();
                        let value: Vec<f32> = key.iter().map(|v| -v).collect();
                        // SAFETY: one thread.
                        unsafe { cache.writer().write(Kernels::best(), (slot, head), &key, &value) };
                    }
                }
                for (slot, head) in [(16, 0), (17, 1), (31, 0), (47, 1)] {
                    let (page, token) = (slot / 16, slot as usize % 16);
                    for d in 0..head_dim {
                        let stride = head_dim.next_multiple_of(16);
                        let (key_at, value_at) = (d * 16 + token, token * stride + d);
                        let (key, value) = match cache.page(page, head) {
                            KvPage::F16 { keys, values } => (
                                half::f16::from_bits(keys[key_at]).to_f32(),
                                half::f16::from_bits(values[value_at]).to_f32(),
                            ),
                            KvPage::Q8_0 { keys, key_scales, values, value_scales } => (
                                f32::from(keys[key_at]) * key_scales[d / 32][token],
                                f32::from(values[value_at]) * value_scales[d / 32][token],
                            ),
                        };
                        let want = value_of(slot, head, d);
                        let largest = value_of(slot, head, (d / 32 * 32 + 31).min(head_dim - 1)).abs();
                        let allowed = if kv_type == KvType::F16 { want.abs() / 2048.0 } else { largest / 250.0 };
                        assert!((key - want).abs() <= allowed, "{kv_type:?}, {head_dim}: {key}, not {want}");
                        assert!((value + want).abs() <= allowed, "{kv_type:?}, {head_dim}: {value}, not -{want}");
                    }
                }
                let untouched = cache.page(0, 0);
                let zero = match untouched {
                    KvPage::F16 { keys, values } => keys.iter().chain(values).all(|&v| v == 0),
                    KvPage::Q8_0 { keys, values, .. } => keys.iter().chain(values).all(|&v| v == 0),
                };
                assert!(zero, "{kv_type:?}, {head_dim}");
            }
        }
    }
}
