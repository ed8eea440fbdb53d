//! [`SideStream`]: decode attention, which waits for memory, beside prefill attention, which waits for arithmetic, in
//! the steps that have both.

use std::sync::Arc;

use cudarc::driver::{CudaStream, sys};

use super::{
    device::{Event, Gpu},
    status::Check,
};
use crate::Error;

/// bf16 FLOP that prefill attention does in a nanosecond on one multiprocessor, and bytes that decode attention reads
/// in one, alone and with the others (docs/log.md).
const FLOP_PER_NS: f64 = 4_400.0;
const BYTES_PER_NS: f64 = 70.0;
const MAX_BYTES_PER_NS: f64 = 2_950.0;

/// A second stream that branches off the executor's and comes back to it.
pub(super) struct SideStream {
    stream: Arc<CudaStream>,
    forked: Event,
    done: Event,
}

impl SideStream {
    pub(super) fn new(gpu: &Gpu) -> Result<Self, Error> {
        gpu.bind()?;
        let stream = gpu.context.new_stream().check("cuStreamCreate")?;
        Ok(Self { stream, forked: Event::new(false)?, done: Event::new(false)? })
    }

    /// The stream, for work that follows all that `gpu`'s stream has been given so far.
    pub(super) fn fork(&self, gpu: &Gpu) -> Result<sys::CUstream, Error> {
        self.forked.record(gpu.cu_stream())?;
        self.forked.hold(self.stream.cu_stream())?;
        Ok(self.stream.cu_stream())
    }

    /// What `gpu`'s stream is given from now on follows what this stream has been given.
    pub(super) fn join(&self, gpu: &Gpu) -> Result<(), Error> {
        self.done.record(self.stream.cu_stream())?;
        self.done.hold(gpu.cu_stream())
    }
}

/// Of `n_sms` multiprocessors those for decode attention that reads `bytes` of a layer's cache, so that it ends when
/// prefill attention of `flop` does on the others.
pub(super) fn decode_share(n_sms: usize, bytes: f64, flop: f64) -> usize {
    let time = |n: &usize| {
        let decode = bytes / (*n as f64 * BYTES_PER_NS).min(MAX_BYTES_PER_NS);
        decode.max(flop / ((n_sms - n) as f64 * FLOP_PER_NS))
    };
    let least = |a: &usize, b: &usize| time(a).total_cmp(&time(b));
    (n_sms / 16..=n_sms - n_sms / 16).min_by(least).unwrap_or(n_sms / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_parts_end_together_and_memory_is_busy_with_a_third() {
        assert_eq!(decode_share(132, 1e6, 100e9), 8, "at least a sixteenth");
        let balanced = decode_share(132, 600e6, 200e9);
        let times = [600e6 / (balanced as f64 * BYTES_PER_NS), 200e9 / ((132 - balanced) as f64 * FLOP_PER_NS)];
        assert!((times[0] / times[1] - 1.0).abs() < 0.1, "{balanced} {times:?}");
        assert_eq!(decode_share(132, 2400e6, 1e9), 43);
    }
}
