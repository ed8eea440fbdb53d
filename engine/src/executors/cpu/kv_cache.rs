//! [`KvCache`]: keys and values of one layer, in half precision.

use super::{disjoint::Disjoint, kernels::TILE_COLS};
use crate::{decoder::DecoderSpec, step::PAGE_SIZE};

// A page's tokens are the columns of a tile.
const _: () = assert!(PAGE_SIZE == TILE_COLS);

/// Sizes of a cache.
#[derive(Debug, Clone, Copy)]
pub struct KvLayout {
    n_kv_heads: usize,
    head_dim: usize,
    /// `head_dim`, rounded up to whole tiles.
    value_stride: usize,
}

/// Keys and values of one layer.
pub struct KvCache {
    layout: KvLayout,
    /// `[n_pages, n_kv_heads, head_dim, PAGE_SIZE]`.
    keys: Vec<u16>,
    /// `[n_pages, n_kv_heads, PAGE_SIZE, value_stride]`.
    values: Vec<u16>,
}

impl KvLayout {
    /// The layout for the heads of `spec`.
    pub fn new(spec: &DecoderSpec) -> Self {
        let value_stride = spec.head_dim.next_multiple_of(TILE_COLS);
        Self { n_kv_heads: spec.n_kv_heads, head_dim: spec.head_dim, value_stride }
    }

    /// Elements from one token's values to the next one's.
    pub fn value_stride(self) -> usize {
        self.value_stride
    }

    fn keys_at(self, page: usize, head: usize) -> usize {
        (page * self.n_kv_heads + head) * self.head_dim * PAGE_SIZE
    }

    fn values_at(self, page: usize, head: usize) -> usize {
        (page * self.n_kv_heads + head) * self.value_stride * PAGE_SIZE
    }
}

impl KvCache {
    /// A cache of `n_pages` pages. The system gives zeroed memory when a page is first written, so pages that no
    /// sequence ever used cost none.
    pub fn new(layout: KvLayout, n_pages: usize) -> Self {
        Self { layout, keys: vec![0; layout.keys_at(n_pages, 0)], values: vec![0; layout.values_at(n_pages, 0)] }
    }

    /// Keys of a page and head, `[head_dim, PAGE_SIZE]`.
    pub fn keys(&self, page: u32, head: usize) -> &[u16] {
        &self.keys[self.layout.keys_at(page as usize, head)..][..self.layout.head_dim * PAGE_SIZE]
    }

    /// Values of a page and head, `[PAGE_SIZE, value_stride]`.
    pub fn values(&self, page: u32, head: usize) -> &[u16] {
        &self.values[self.layout.values_at(page as usize, head)..][..self.layout.value_stride * PAGE_SIZE]
    }

    /// For writing different slots from several threads.
    pub fn writer(&mut self) -> KvWriter<'_> {
        KvWriter { layout: self.layout, keys: Disjoint::new(&mut self.keys), values: Disjoint::new(&mut self.values) }
    }
}

/// Writes to a cache.
pub struct KvWriter<'a> {
    layout: KvLayout,
    keys: Disjoint<'a, u16>,
    values: Disjoint<'a, u16>,
}

impl KvWriter<'_> {
    /// Writes key and value, `[head_dim]` each, of `head` at `slot` (`page * PAGE_SIZE + offset`).
    ///
    /// # Safety
    /// Nobody else may use this slot and head meanwhile.
    pub unsafe fn write(&self, slot: u32, head: usize, key: &[u16], value: &[u16]) {
        let (page, offset) = (slot as usize / PAGE_SIZE, slot as usize % PAGE_SIZE);
        let first = self.layout.keys_at(page, head) + offset;
        for (d, &key) in key.iter().enumerate() {
            // SAFETY: the slot's own elements, by the caller's promise.
            unsafe { *self.keys.ptr_at(first + d * PAGE_SIZE) = key };
        }
        let first = self.layout.values_at(page, head) + offset * self.layout.value_stride;
        // SAFETY: as above.
        unsafe { self.values.range(first..first + value.len()) }.copy_from_slice(value);
    }
}
