//! The products of [`avx512`] on AMX's 8-bit tiles: Intel servers since 2023 (Sapphire Rapids). All else is AVX-512's.
//!
//! A tile instruction multiplies bytes, so 16-bit activations are two planes: their high bytes, signed, and their low
//! bytes, unsigned. A tile of up to 16 rows of activations meets a tile of 16 rows of weights for the columns that share
//! a scale; both planes' sums leave the tiles, are joined to the sums that AVX-512 makes and scaled as there. So results
//! are the same to the bit, and a few rows, of which tiles would be nearly empty, take AVX-512's products.
//!
//! Rows of activations lie as `[n_cols / 32, width, 2, 32]` bytes, high plane first. Eight columns lie in the order in
//! which the packed nibbles come out of a vector: 0 4 1 5 2 6 3 7.

use std::arch::{asm, x86_64::*};

use super::{ActivationBlock, Kernels, Output, QuantizedRows, avx2, avx512, dispatch::by_codes};
use crate::{
    executors::cpu::packed::{PackedGroups, ROWS, block_bytes},
    quant::{GROUP, Scales},
};

pub static KERNELS: Kernels = Kernels { name: "amx-int8", max_width: 16, affine, quantize, ..avx512::KERNELS };

/// From this many rows on, tiles are faster.
const TILES_FROM: usize = 5;
/// Rows of activations, or of weights, of a tile.
const TILE: usize = 16;
/// Bytes of a tile's row, and of a row of activations of 32 columns with both planes.
const LINE: usize = 64;

/// Whether the machine has the tiles and the system lets this process use them.
pub fn is_usable() -> bool {
    const TILES_AND_INT8: u32 = 0b11 << 24;
    let has_tiles = __cpuid_count(7, 0).edx & TILES_AND_INT8 == TILES_AND_INT8;
    has_tiles && is_x86_feature_detected!("avx512vbmi") && ask_permission()
}

/// Tiles are 8 KiB of registers, which Linux gives to processes that ask (Documentation/arch/x86/xstate.rst).
#[cfg(target_os = "linux")]
fn ask_permission() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: asks for a permission; touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn ask_permission() -> bool {
    false
}

/// What `ldtilecfg` reads: shapes of the tiles.
#[repr(C, align(64))]
struct TileShapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row of each tile.
    row_bytes: [u16; 16],
    /// Rows of each tile.
    n_rows: [u8; 16],
}

/// The tiles of this thread, from [`Tiles::new`] until it is dropped: 0 and 1, and 2 and 3, are sums of the high and the
/// low plane, 4 and 5 the planes, 6 weights.
struct Tiles;

impl Tiles {
    /// For `width` rows of activations and products of `n_cols` columns.
    ///
    /// # Safety
    /// [`is_usable`].
    unsafe fn new(width: usize, n_cols: usize) -> Self {
        let mut shapes =
            TileShapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], n_rows: [0; 16] };
        let sums = [0, 1, 2, 3].map(|tile| (tile, width, LINE));
        let operands = [(4, width, n_cols), (5, width, n_cols), (6, n_cols / 4, LINE)];
        for (tile, n_rows, n_bytes) in sums.into_iter().chain(operands) {
            (shapes.n_rows[tile], shapes.row_bytes[tile]) = (n_rows as u8, n_bytes as u16);
        }
        // SAFETY: 64 bytes that describe tiles of at most 16 rows of 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, preserves_flags, readonly)) };
        Self
    }

    /// Multiplies both planes of `activations` with `weights`, whose rows are [`LINE`] bytes; the sums are pair `PAIR`.
    ///
    /// # Safety
    /// Both must be valid for the tiles' shapes.
    #[inline(always)]
    unsafe fn multiply<const PAIR: usize>(&self, activations: *const u8, weights: *const u8) {
        // SAFETY: the caller's promise; compilers do not use these registers.
        unsafe {
            asm!(
                "tileloadd tmm6, [{weights} + {line}*1]",
                "tileloadd tmm4, [{activations} + {line}*1]",
                "tilezero tmm{high}",
                "tdpbssd tmm{high}, tmm4, tmm6",
                "tileloadd tmm5, [{activations} + {line}*1 + 32]",
                "tilezero tmm{low}",
                "tdpbusd tmm{low}, tmm5, tmm6",
                weights = in(reg) weights,
                activations = in(reg) activations,
                line = in(reg) LINE,
                high = const 2 * PAIR,
                low = const 2 * PAIR + 1,
                options(nostack, preserves_flags, readonly),
            );
        }
    }

    /// Writes pair `PAIR` of sums.
    ///
    /// # Safety
    /// `sums` must be valid.
    #[inline(always)]
    unsafe fn store<const PAIR: usize>(&self, sums: *mut PlaneSums) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tilestored [{sums} + {line}*1], tmm{high}",
                "tilestored [{sums} + {line}*1 + 1024], tmm{low}",
                sums = in(reg) sums,
                line = in(reg) LINE,
                high = const 2 * PAIR,
                low = const 2 * PAIR + 1,
                options(nostack, preserves_flags),
            );
        }
    }
}

/// Sums of the high and of the low plane, a row for each row of activations.
type PlaneSums = [[__m512i; TILE]; 2];

impl Drop for Tiles {
    fn drop(&mut self) {
        // Threads that leave tiles in use are dearer to switch between.
        // SAFETY: there were tiles, so the machine has the instruction.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

/// Calls `$f::<W, $more...>` with room for eight or sixteen rows.
macro_rules! by_room {
    ($width:expr, $f:ident[$($more:expr),*]($($arg:expr),*)) => {
        if $width <= 8 { $f::<8 $(, { $more })*>($($arg),*) } else { $f::<16 $(, { $more })*>($($arg),*) }
    };
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn affine(groups: &PackedGroups<'_>, x: &ActivationBlock<'_>, out: Output) {
    if x.width < TILES_FROM {
        // SAFETY: the caller's promise.
        return unsafe { avx512::affine(groups, x, out) };
    }
    let n_bytes = groups.group_bytes();
    let n_groups = groups.bytes.len() / n_bytes;
    let n_cols = if groups.codes.scales == Scales::BySixteen { GROUP / 2 } else { GROUP };
    let room = if x.width <= TILE / 2 { TILE / 2 } else { TILE };
    let n_read = (groups.n_blocks() - 1) * x.width + room;
    assert!(x.scales.len() >= n_read && x.sums.len() >= n_read, "room for whole tiles");
    // SAFETY: a table is only had if the machine can run it.
    let tiles = unsafe { Tiles::new(x.width, n_cols) };
    // SAFETY: any bits are integers. Rows beyond `width` are never written.
    let mut scratch: Scratch = unsafe { std::mem::zeroed() };
    for first in (0..n_groups).step_by(2) {
        // A last group without a partner meets itself, and half of the results are dropped.
        let second = (first + 1).min(n_groups - 1);
        let pair = [groups.bytes[first * n_bytes..].as_ptr(), groups.bytes[second * n_bytes..].as_ptr()];
        let lanes: __mmask16 = if first == second { 0x00ff } else { 0xffff };
        let room = (&tiles, &mut scratch);
        // SAFETY: `Kernels::affine` checked the lengths; `out` is its caller's promise.
        unsafe {
            let out = Output { ptr: out.ptr.add(first * ROWS), ..out };
            by_codes!(by_room: groups.codes, x.width, product[](room, (groups, pair), x, (out, lanes)));
        }
    }
}

/// What passes from vectors to tiles and back. Tiles do not read what still waits to be written, so there is room for
/// several steps.
#[repr(C, align(64))]
struct Scratch {
    /// Blocks of weights, `[8, 16, 4]`.
    weights: [[__m512i; 8]; RING],
    sums: [PlaneSums; RING],
}

/// Steps that [`Scratch`] has room for.
const RING: usize = 4;
/// How many blocks ahead of their product weights are unpacked.
const UNPACK_AHEAD: usize = 2;

/// Adds to `$totals[m]` the scaled sums of rows `$m`, if they are below `$n_rows`.
macro_rules! add_rows {
    ($totals:ident, $n_rows:ident, ($sums:ident, $minima:expr), ($scales:ident, $x_scales:ident, $x_sums:ident),
        $($m:literal)*) => {
        $(if $m < $n_rows {
            let (high, low) = ((&raw const (*$sums)[0][$m]).read(), (&raw const (*$sums)[1][$m]).read());
            let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low);
            let scale = _mm512_mul_ps($scales, _mm512_set1_ps(*$x_scales.add($m)));
            $totals[$m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, $totals[$m]);
            if let Some(minima) = $minima {
                $totals[$m] = _mm512_fmadd_ps(minima, _mm512_set1_ps(*$x_sums.add($m)), $totals[$m]);
            }
        })*
    };
}

/// The product of a pair of groups with room for `W` rows of activations.
///
/// A step is a part of a block with a scale of its own. Each turn multiplies a step, stores the sums of the step before
/// and adds the ones of the step before that, so that nothing waits for a tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn product<const W: usize, const NIBBLES: bool, const SCALES: u8>(
    (tiles, scratch): (&Tiles, &mut Scratch),
    (groups, firsts): (&PackedGroups<'_>, [*const u8; 2]),
    x: &ActivationBlock<'_>,
    (out, lanes): (Output, __mmask16),
) {
    let (codes, n_blocks, width) = (groups.codes, groups.n_blocks(), x.width);
    let n_parts = if SCALES == Scales::BySixteen as u8 { 2 } else { 1 };
    let (n_steps, n_bytes) = (n_blocks * n_parts, block_bytes(codes));
    let ahead = UNPACK_AHEAD * n_parts;
    let mut totals = [_mm512_setzero_ps(); W];
    let mut turn = 0usize;
    // SAFETY: blocks are as in `avx512::product`; `affine` checked that scales and sums reach `W` rows beyond the last
    // block's first; a step reads the planes of `width` rows and writes scratch.
    unsafe {
        macro_rules! turn {
            ($pair:literal, $other:literal) => {
                let step = turn.wrapping_sub(ahead);
                if step < n_steps {
                    let (b, part) = (step / n_parts, step % n_parts);
                    let activations = x.codes.as_ptr().cast::<u8>().add(b * width * LINE + part * GROUP / 2);
                    tiles.multiply::<$pair>(activations, (&raw const scratch.weights[b % RING][4 * part]).cast());
                }
                let step = step.wrapping_sub(1);
                if step < n_steps {
                    tiles.store::<$other>(&raw mut scratch.sums[step % RING]);
                }
                if turn % n_parts == 0 && turn < n_steps {
                    unpack::<NIBBLES>(firsts, turn / n_parts * n_bytes, &mut scratch.weights[turn / n_parts % RING]);
                }
                let step = step.wrapping_sub(1);
                if step < n_steps {
                    let (b, part) = (step / n_parts, step % n_parts);
                    let [first, second] = firsts;
                    let places = [
                        avx2::scales_of(codes, first, n_blocks, b),
                        avx2::scales_of(codes, second, n_blocks, b),
                    ];
                    let (scales, minima) = avx512::load_scales::<SCALES>(places);
                    let scales = scales[part];
                    let minima = avx2::has_minimum(SCALES).then_some(minima);
                    let sums = &raw const scratch.sums[step % RING];
                    let (x_scales, x_sums) = (x.scales.as_ptr().add(b * width), x.sums.as_ptr().add(b * width));
                    add_rows!(totals, W, (sums, minima), (scales, x_scales, x_sums),
                        0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
                }
                turn += 1;
            };
        }
        while turn < n_steps + ahead + 2 {
            turn!(0, 1);
            turn!(1, 0);
        }
    }
    for (m, &total) in totals.iter().enumerate().take(width) {
        // SAFETY: the caller's promise: `width` rows of as many elements as `lanes`.
        unsafe {
            let at = out.ptr.add(m * out.stride);
            let before = if out.accumulate { _mm512_maskz_loadu_ps(lanes, at) } else { _mm512_setzero_ps() };
            _mm512_mask_storeu_ps(at, lanes, if out.accumulate { _mm512_add_ps(before, total) } else { total });
        }
    }
}

/// Writes a block of two groups as a tile of weights: eight rows of four columns of each of 16 weight rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn unpack<const NIBBLES: bool>(firsts: [*const u8; 2], offset: usize, tile: &mut [__m512i; 8]) {
    let [first, second] = firsts;
    let (first, second) = (first.wrapping_add(offset), second.wrapping_add(offset));
    for block in [first, second] {
        avx2::prefetch(block, if NIBBLES { 160 } else { 288 });
    }
    for i in 0..4 {
        // SAFETY: a block has four or eight vectors of codes.
        let [a, b] = unsafe {
            if NIBBLES {
                let words = avx512::load_both([first.wrapping_add(32 * i), second.wrapping_add(32 * i)]);
                [words, _mm512_srli_epi16::<4>(words)]
            } else {
                [64 * i, 64 * i + 32].map(|at| avx512::load_both([first.wrapping_add(at), second.wrapping_add(at)]))
            }
        };
        if NIBBLES {
            let mask = _mm512_set1_epi8(15);
            (tile[2 * i], tile[2 * i + 1]) = (_mm512_and_si512(a, mask), _mm512_and_si512(b, mask));
        } else {
            /// Bits of the first where the third is set, else of the second.
            const CHOOSE: i32 = 0xe4;
            // Columns 0 2 1 3 and 4 6 5 7.
            let low = _mm512_set1_epi16(0xff);
            tile[2 * i] = _mm512_ternarylogic_epi32::<CHOOSE>(a, _mm512_slli_epi16::<8>(b), low);
            tile[2 * i + 1] = _mm512_ternarylogic_epi32::<CHOOSE>(_mm512_srli_epi16::<8>(a), b, low);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn quantize(x: &[f32], (width, row): (usize, usize), block: QuantizedRows) {
    if width < TILES_FROM {
        // SAFETY: the caller's promise.
        return unsafe { avx512::quantize(x, (width, row), block) };
    }
    // SAFETY: as above.
    unsafe {
        let order = _mm512_loadu_si512(PLANES.as_ptr().cast());
        for (g, values) in x.as_chunks::<GROUP>().0.iter().enumerate() {
            let words = avx512::round(values, block.scales.add(g * width + row), block.sums.add(g * width + row));
            let line = block.codes.cast::<u8>().add((g * width + row) * LINE);
            _mm512_storeu_si512(line.cast(), _mm512_permutexvar_epi8(order, words));
        }
    }
}

/// Where each byte of the two planes comes from in 32 words.
const PLANES: [u8; LINE] = {
    let mut order = [0; LINE];
    let mut i = 0;
    while i < LINE {
        let column = i % 32 / 8 * 8 + [0, 4, 1, 5, 2, 6, 3, 7][i % 8];
        order[i] = (2 * column + (i < 32) as usize) as u8;
        i += 1;
    }
    order
};
