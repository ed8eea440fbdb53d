//! [`Arena`]: memory for weights, in huge pages where the system has them.
//!
//! A decode step streams through all weights. With pages of 4 KiB, hardware prefetchers stop at every page and address
//! translation misses its caches; with huge pages two cores read a quarter faster.

use std::{io, sync::Arc};

use memmap2::{MmapMut, MmapOptions};

/// Bytes taken from the system at once. What is never written costs nothing.
const CHUNK_BYTES: usize = 256 << 20;
/// Alignment of every piece: a cache line.
const ALIGNMENT: usize = 64;

/// Hands out pieces of large anonymous maps.
#[derive(Default)]
pub struct Arena {
    chunk: Option<Arc<Chunk>>,
    used: usize,
}

struct Chunk {
    /// The map's first byte.
    ptr: *mut u8,
    map: MmapMut,
}

// SAFETY: the bytes of a piece are written by the one call that hands it out, and only read after that.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

/// Bytes that are filled once and then only read.
pub struct Piece {
    chunk: Arc<Chunk>,
    start: usize,
    len: usize,
}

impl Arena {
    /// `len` zeroed bytes, filled by `fill`.
    ///
    /// # Errors
    /// If the system has no memory left.
    pub fn piece(&mut self, len: usize, fill: impl FnOnce(&mut [u8])) -> io::Result<Piece> {
        let start = self.used.next_multiple_of(ALIGNMENT);
        let (chunk, start) = match &self.chunk {
            Some(chunk) if start + len <= chunk.map.len() => (chunk.clone(), start),
            _ => {
                let mut map = MmapOptions::new().len(CHUNK_BYTES.max(len)).map_anon()?;
                // Only advice: kernels without huge pages refuse it.
                #[cfg(target_os = "linux")]
                let _ = map.advise(memmap2::Advice::HugePage);
                (Arc::new(Chunk { ptr: map.as_mut_ptr(), map }), 0)
            }
        };
        self.used = start + len;
        self.chunk = Some(chunk.clone());
        // SAFETY: this part of the chunk is handed out now and never again, and read only after it is filled.
        fill(unsafe { std::slice::from_raw_parts_mut(chunk.ptr.add(start), len) });
        Ok(Piece { chunk, start, len })
    }
}

impl Piece {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: within the map, which lives as long as the chunk; filled before the piece was made.
        unsafe { std::slice::from_raw_parts(self.chunk.ptr.add(self.start), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_and_apart() {
        let mut arena = Arena::default();
        let sizes = [3, 64, 100, CHUNK_BYTES, 1];
        let pieces: Vec<Piece> = sizes
            .iter()
            .enumerate()
            .map(|(i, &len)| arena.piece(len, |bytes| bytes[..len.min(100)].fill(i as u8 + 1)).expect("memory"))
            .collect();
        for (i, (piece, &len)) in pieces.iter().zip(&sizes).enumerate() {
            assert_eq!(piece.bytes().len(), len);
            assert!(piece.bytes()[..len.min(100)].iter().all(|b| *b == i as u8 + 1));
            assert_eq!(piece.bytes().as_ptr() as usize % ALIGNMENT, 0);
        }
    }
}
