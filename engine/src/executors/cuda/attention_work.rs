//! [`AttentionWork`]: how Hopper's decode attention shares the pages of a step out among its blocks
//! (`kernels/decode_attention_sm90.cu`).

use super::ops::kv_tiles;
use crate::{decoder::DecoderSpec, step::PAGE_SIZE};

/// Units of a block, at least: about one for each of its warps.
const MIN_UNITS: usize = 8;
/// A block may begin this share of its units earlier or later, if a row begins there: a row in two blocks must be
/// joined through memory.
const SLACK: usize = 16;

/// What the sharing depends on beside the lengths of the contexts. A unit is one page of one tile of query heads.
#[derive(Debug, Clone, Copy)]
pub(super) struct AttentionWork {
    /// Blocks of the grid, at most: multiprocessors.
    pub(super) n_blocks: usize,
    /// Tiles of query heads.
    pub(super) n_tiles: usize,
    /// Tokens that attention sees; 0 for all.
    pub(super) window: usize,
}

impl AttentionWork {
    /// For `spec` on a device of `n_sms` multiprocessors.
    pub(super) fn new(spec: &DecoderSpec, n_sms: u32) -> Self {
        Self {
            n_blocks: n_sms as usize,
            n_tiles: kv_tiles(spec.n_heads, spec.n_kv_heads),
            window: spec.sliding_window.unwrap_or(0),
        }
    }

    /// Pages that a new token sees, at the end of a context of `len` tokens.
    fn n_pages(self, len: usize) -> usize {
        let unseen = if self.window > 0 { len.saturating_sub(self.window) } else { 0 };
        len.div_ceil(PAGE_SIZE) - unseen / PAGE_SIZE
    }

    /// Writes the first unit of each sequence and of each of `n_blocks` blocks, and the ends: `unit_starts[..=n]` of `n`
    /// contexts, `block_starts[..=n_blocks]`. A context of no tokens has no units.
    pub(super) fn fill(self, n_blocks: usize, contexts: &[i32], unit_starts: &mut [i32], block_starts: &mut [i32]) {
        let mut n_units = 0;
        for (start, &len) in unit_starts.iter_mut().zip(contexts) {
            *start = n_units as i32;
            n_units += self.n_pages(len as usize) * self.n_tiles;
        }
        unit_starts[contexts.len()] = n_units as i32;
        let n_used = n_blocks.min(n_units / MIN_UNITS).max(1);
        let slack = n_units / n_used / SLACK;
        let starts = &unit_starts[..=contexts.len()];
        for (block, start) in block_starts[..=n_blocks].iter_mut().enumerate() {
            *start = match block {
                0 => 0,
                _ if block >= n_used => n_units as i32,
                _ => self.near_row(starts, n_units * block / n_used, slack) as i32,
            };
        }
    }

    /// The beginning of a row at most `slack` units from `unit`, or else `unit`.
    fn near_row(self, unit_starts: &[i32], unit: usize, slack: usize) -> usize {
        let seq = unit_starts.partition_point(|&start| start as usize <= unit) - 1;
        let first = unit_starts[seq] as usize;
        let n_pages = (unit_starts[seq + 1] as usize - first) / self.n_tiles;
        let nearest = first + (unit - first + n_pages / 2) / n_pages * n_pages;
        if nearest.abs_diff(unit) <= slack { nearest } else { unit }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared_out(work: AttentionWork, contexts: &[i32]) -> (Vec<i32>, Vec<i32>) {
        let (mut units, mut blocks) = (vec![-1; contexts.len() + 1], vec![-1; work.n_blocks + 1]);
        work.fill(work.n_blocks, contexts, &mut units, &mut blocks);
        (units, blocks)
    }

    #[test]
    fn every_unit_is_in_one_block_and_blocks_are_alike() {
        let work = AttentionWork { n_blocks: 132, n_tiles: 8, window: 0 };
        for n in [1usize, 9, 16, 33, 128, 256] {
            for longest in [1usize, 40, 700, 20_000] {
                let contexts: Vec<i32> = (0..n).map(|i| 1 + (i * 7919 % longest) as i32).collect();
                let (units, blocks) = shared_out(work, &contexts);
                let n_units: i32 = contexts.iter().map(|len| (len + 15) / 16 * 8).sum();
                assert_eq!((units[0], units[n], blocks[0], blocks[132]), (0, n_units, 0, n_units));
                let sizes: Vec<i32> = blocks.windows(2).map(|pair| pair[1] - pair[0]).collect();
                let n_used = sizes.iter().take_while(|&&size| size > 0).count();
                assert!(sizes[n_used..].iter().all(|&size| size == 0), "only the last blocks have nothing to do");
                let (least, most) = (sizes[..n_used].iter().min(), sizes[..n_used].iter().max());
                let quota = n_units as usize / n_used;
                assert!(*least.expect("a block") as usize >= quota - quota / 8, "{n} {longest} {sizes:?}");
                assert!(*most.expect("a block") as usize <= quota + quota / 8 + 1, "{n} {longest} {sizes:?}");
            }
        }
    }

    #[test]
    fn blocks_begin_where_rows_do_if_that_is_near() {
        let work = AttentionWork { n_blocks: 4, n_tiles: 1, window: 0 };
        assert_eq!(shared_out(work, &[16 * 101, 16 * 99, 16 * 200]).1, [0, 101, 200, 300, 400]);
    }

    #[test]
    fn padding_and_unseen_pages_are_no_work() {
        let work = AttentionWork { n_blocks: 2, n_tiles: 2, window: 32 };
        // Of 100 tokens the last 32 are seen, tokens 68 to 99, on pages 4 to 6.
        let (units, blocks) = shared_out(work, &[100, 16, 0, 0]);
        assert_eq!(units, [0, 6, 8, 8, 8]);
        assert_eq!(blocks, [0, 8, 8]);
    }
}
