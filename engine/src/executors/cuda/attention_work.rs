//! [`AttentionWork`]: how Hopper's decode attention shares the pages of a step out among its blocks
//! (`kernels/decode_attention_sm90.cu`).

use super::ops::kv_tiles;
use crate::{decoder::DecoderSpec, step::PAGE_SIZE};

/// What a row costs a block beside its pages, in pages: waits of the whole block, queries to rotate, results to join
/// (docs/log.md). Without it the block that gets a step's short contexts is the one that all wait for.
pub(super) const ROW_PAGES: usize = 48;
/// Units of a block, and those of its last row unless that ends with it, at least: about one for each of its warps.
const MIN_UNITS: usize = 8;

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
        let (mut n_units, mut n_rows) = (0, 0);
        for (start, &len) in unit_starts.iter_mut().zip(contexts) {
            *start = n_units as i32;
            n_units += self.n_pages(len as usize) * self.n_tiles;
            n_rows += if len > 0 { self.n_tiles } else { 0 };
        }
        unit_starts[contexts.len()] = n_units as i32;
        let starts = &unit_starts[..=contexts.len()];
        let n_used = n_blocks.min(n_units / MIN_UNITS).max(1);
        // The least cost of the dearest block: none is less than the mean, or than one row's part of its share of pages.
        let mut low =
            ((n_units + n_rows * ROW_PAGES) / n_used).max(n_units / n_used + ROW_PAGES).max(ROW_PAGES + MIN_UNITS);
        let mut high = low;
        while self.cut(starts, high, |_, _| ()) > n_used {
            (low, high) = (high + 1, high + high / 8 + 1);
        }
        while low < high {
            let middle = usize::midpoint(low, high);
            match self.cut(starts, middle, |_, _| ()) <= n_used {
                true => high = middle,
                false => low = middle + 1,
            }
        }
        block_starts[..=n_blocks].fill(n_units as i32);
        block_starts[0] = 0;
        self.cut(starts, high, |block, unit| block_starts[block] = unit as i32);
    }

    /// Fills one block after the other up to a cost of `most`, at least a row's own and [`MIN_UNITS`], and tells
    /// `begin` of each but the first the block and its first unit; how many blocks that takes.
    fn cut(self, unit_starts: &[i32], most: usize, mut begin: impl FnMut(usize, usize)) -> usize {
        let (mut n_blocks, mut left) = (1, most);
        for seq in unit_starts.windows(2) {
            let n_pages = (seq[1] - seq[0]) as usize / self.n_tiles;
            for tile in 0..self.n_tiles {
                let mut rest = n_pages;
                while rest > 0 {
                    if left < ROW_PAGES + rest.min(MIN_UNITS) {
                        begin(n_blocks, seq[0] as usize + (tile + 1) * n_pages - rest);
                        (n_blocks, left) = (n_blocks + 1, most);
                    }
                    let n = rest.min(left - ROW_PAGES);
                    left -= n + ROW_PAGES;
                    rest -= n;
                }
            }
        }
        n_blocks
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
                assert!(blocks.is_sorted(), "{n} {longest} {blocks:?}");
                let costs = costs(work, &units, &blocks);
                let n_used = costs.iter().take_while(|&&cost| cost > 0).count();
                assert!(costs[n_used..].iter().all(|&cost| cost == 0), "only the last blocks have nothing to do");
                let mean = costs.iter().sum::<usize>() / n_used;
                let most = *costs.iter().max().expect("a block");
                assert!(most <= mean + ROW_PAGES + MIN_UNITS, "{n} {longest} {mean} {costs:?}");
                let least = *costs[..n_used - 1].iter().min().unwrap_or(&most);
                assert!(least + ROW_PAGES + MIN_UNITS > most, "{n} {longest} {costs:?}");
            }
        }
    }

    /// What each block costs, in pages.
    fn costs(work: AttentionWork, units: &[i32], blocks: &[i32]) -> Vec<usize> {
        let mut row_starts: Vec<i32> = Vec::new();
        for seq in units.windows(2).filter(|seq| seq[0] < seq[1]) {
            let n_pages = (seq[1] - seq[0]) / work.n_tiles as i32;
            row_starts.extend((0..work.n_tiles as i32).map(|tile| seq[0] + tile * n_pages));
        }
        let cost = |block: &[i32]| {
            let n_inside = row_starts.iter().filter(|&&start| block[0] < start && start < block[1]).count();
            if block[0] == block[1] { 0 } else { (block[1] - block[0]) as usize + (n_inside + 1) * ROW_PAGES }
        };
        blocks.windows(2).map(cost).collect()
    }

    #[test]
    fn short_contexts_are_not_all_in_one_block() {
        let work = AttentionWork { n_blocks: 44, n_tiles: 8, window: 0 };
        let contexts: Vec<i32> = [12_000; 38].into_iter().chain([200; 12]).collect();
        let (units, blocks) = shared_out(work, &contexts);
        let costs = costs(work, &units, &blocks);
        let (least, most) = (costs.iter().min().expect("a block"), costs.iter().max().expect("a block"));
        assert!(most - least < most / 10, "{costs:?}");
    }

    #[test]
    fn blocks_begin_where_rows_do_if_that_is_near() {
        let work = AttentionWork { n_blocks: 4, n_tiles: 1, window: 0 };
        assert_eq!(shared_out(work, &[16 * 101, 16 * 99, 16 * 200]).1, [0, 101, 200, 301, 400]);
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
