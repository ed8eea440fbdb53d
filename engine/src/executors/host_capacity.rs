//! What an executor that computes in main memory can hold.

use super::{Capacity, MixedSteps};
use crate::{EngineConfig, Error, decoder::DecoderSpec, step::PAGE_SIZE};

/// Most sequences in a step unless the operator says otherwise.
const DEFAULT_MAX_NUM_SEQS: usize = 128;
/// Tokens per step: long enough for efficient matrix products, short enough to keep decoding smooth and a step's buffers
/// small.
const DEFAULT_MAX_NUM_BATCHED_TOKENS: usize = 256;
/// KV cache bytes unless the operator says otherwise: this at most, and a quarter of free memory.
const DEFAULT_KV_CACHE_BYTES: usize = 4 << 30;

/// Limits of an executor whose KV cache has pages of `page_bytes` bytes, all layers together, in main memory.
///
/// # Errors
/// [`Error::Config`] for limits that leave no room for one sequence.
pub(super) fn plan(spec: &DecoderSpec, config: &EngineConfig, page_bytes: usize) -> Result<Capacity, Error> {
    let max_num_seqs = config.max_num_seqs.unwrap_or(DEFAULT_MAX_NUM_SEQS);
    let asked_len = config.max_model_len.unwrap_or(spec.max_position);
    for (option, value) in [
        ("--max-num-seqs", Some(max_num_seqs)),
        ("--max-model-len", Some(asked_len)),
        ("--max-num-batched-tokens", config.max_num_batched_tokens),
    ] {
        if value == Some(0) {
            return Err(Error::config(option, "must be at least 1"));
        }
    }
    if asked_len > spec.max_position {
        return Err(Error::config(
            "--max-model-len",
            format!("{asked_len} is more than the model's {} positions; lower it", spec.max_position),
        ));
    }
    let useful = max_num_seqs.saturating_mul(asked_len.div_ceil(PAGE_SIZE)).saturating_mul(page_bytes);
    let kv_bytes = config.kv_cache_memory_bytes.unwrap_or_else(|| {
        let quarter = free_memory().map_or(usize::MAX, |free| free / 4);
        DEFAULT_KV_CACHE_BYTES.min(quarter).max(page_bytes * 64).min(useful)
    });
    let n_pages = kv_bytes / page_bytes;
    let max_model_len = match config.max_model_len {
        Some(len) if len > n_pages * PAGE_SIZE => {
            return Err(Error::config(
                "--max-model-len",
                format!(
                    "{len} tokens need {} bytes of KV cache, but there are {kv_bytes}; lower it or raise \
                     --kv-cache-memory-bytes",
                    len.div_ceil(PAGE_SIZE) * page_bytes
                ),
            ));
        }
        Some(len) => len,
        None => asked_len.min(n_pages * PAGE_SIZE),
    };
    if max_model_len < 2 {
        return Err(Error::config(
            "--kv-cache-memory-bytes",
            format!("{kv_bytes} bytes hold no page of KV cache ({page_bytes} bytes); raise it"),
        ));
    }
    Ok(Capacity {
        n_pages,
        max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens.unwrap_or(DEFAULT_MAX_NUM_BATCHED_TOKENS),
        max_model_len,
        max_in_flight: 1,
        mixed_steps: MixedSteps::Timed,
        max_logprobs: spec.vocab_size,
    })
}

/// Bytes of memory that can be had without swapping, if the system tells.
fn free_memory() -> Option<usize> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let in_group = |file: &str| std::fs::read_to_string(file).ok()?.trim().parse::<usize>().ok();
    let limit = in_group("/sys/fs/cgroup/memory.max").unwrap_or(usize::MAX);
    Some((kib * 1024).min(limit))
}
