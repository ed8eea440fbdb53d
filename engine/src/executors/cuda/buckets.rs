//! Batch sizes with a CUDA graph of their own; a batch runs in the smallest that holds it.

/// Batch sizes for up to `max_num_seqs` sequences: every size to 8, then steps of 8 to 256, of 16 to 512, of 32.
pub(super) fn buckets(max_num_seqs: usize) -> Vec<usize> {
    let mut sizes = Vec::new();
    let mut size = 0;
    while size < max_num_seqs {
        size += match size {
            0..8 => 1,
            8..256 => 8,
            256..512 => 16,
            _ => 32,
        };
        sizes.push(size);
    }
    sizes
}

/// The smallest bucket of at least `n` sequences, by index.
pub(super) fn bucket_for(buckets: &[usize], n: usize) -> Option<usize> {
    let at = buckets.partition_point(|&size| size < n);
    (at < buckets.len()).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_batch_has_the_smallest_bucket() {
        for max in [1, 5, 8, 9, 100, 256, 300, 1024] {
            let sizes = buckets(max);
            assert!(sizes.is_sorted() && *sizes.last().expect("some") >= max);
            for n in 1..=max {
                let size = sizes[bucket_for(&sizes, n).expect("a bucket")];
                assert!(size >= n && (n > 8 || size == n) && size - n < 32);
                assert!(sizes.iter().all(|&other| other < n || other >= size));
            }
        }
        assert_eq!(buckets(256).len(), 8 + 31);
        assert_eq!(bucket_for(&buckets(8), 9), None);
    }
}
