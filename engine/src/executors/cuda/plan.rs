//! How the device's memory is shared between weights, step buffers and KV pages.

use crate::{Error, step::PAGE_SIZE};

/// What is known when the pages are counted; bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct MemoryInputs {
    /// Of the device.
    pub(super) total: usize,
    /// In use after loading and running the largest step, other programs' included.
    pub(super) used: usize,
    /// To be used later by what is not measured yet: the CUDA graphs.
    pub(super) reserved: usize,
    /// Of a page in all layers, keys and values.
    pub(super) page: usize,
    /// `--gpu-memory-utilization`.
    pub(super) utilization: f32,
    /// `--kv-cache-memory-bytes`.
    pub(super) kv_bytes: Option<usize>,
}

/// KV pages that fit.
///
/// # Errors
/// [`Error::Device`] saying how much is missing for `min_tokens` tokens, and which flag helps.
pub(super) fn n_pages(inputs: MemoryInputs, min_tokens: usize) -> Result<usize, Error> {
    let MemoryInputs { total, used, reserved, page, utilization, kv_bytes } = inputs;
    let free = total.saturating_sub(used + reserved);
    let allowed = (total as f64 * f64::from(utilization)) as usize;
    let budget = kv_bytes.unwrap_or(allowed.saturating_sub(used + reserved));
    let needed = min_tokens.div_ceil(PAGE_SIZE).max(1) * page;
    let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
    if budget > free {
        return Err(Error::Device(format!(
            "out of memory: --kv-cache-memory-bytes asks for {:.2} GiB, but only {:.2} GiB of {:.2} GiB are free; \
             {:.2} GiB are missing. Lower --kv-cache-memory-bytes",
            gib(budget),
            gib(free),
            gib(total),
            gib(budget - free)
        )));
    }
    if budget < needed {
        let helps = match kv_bytes {
            Some(_) => "Raise --kv-cache-memory-bytes",
            None => {
                "Raise --gpu-memory-utilization, lower --max-num-batched-tokens or --max-model-len, or end other programs on the device"
            }
        };
        return Err(Error::Device(format!(
            "out of memory: {:.2} GiB are left for the KV cache, {min_tokens} tokens need {:.2} GiB; {:.2} GiB are \
             missing ({:.2} GiB of {:.2} GiB are in use). {helps}",
            gib(budget),
            gib(needed),
            gib(needed - budget),
            gib(used),
            gib(total)
        )));
    }
    // Slots are `int` on the device.
    Ok((budget / page).min(i32::MAX as usize / PAGE_SIZE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs() -> MemoryInputs {
        MemoryInputs {
            total: 80_000_000_000,
            used: 18_000_000_000,
            reserved: 100_000_000,
            page: 16 * 131_072,
            utilization: 0.9,
            kv_bytes: None,
        }
    }

    #[test]
    fn utilization_is_obeyed() {
        let i = inputs();
        let n = n_pages(i, 8192).expect("fits");
        let used = i.used + i.reserved + n * i.page;
        assert!(used <= 72_000_000_000 && used + i.page > 72_000_000_000);
        assert!(n * PAGE_SIZE > 400_000);
    }

    #[test]
    fn kv_bytes_win_over_utilization() {
        let i = MemoryInputs { kv_bytes: Some(1 << 30), ..inputs() };
        assert_eq!(n_pages(i, 8192).expect("fits"), (1 << 30) / i.page);
        let greedy = MemoryInputs { kv_bytes: Some(63_000_000_000), ..inputs() };
        assert!(n_pages(greedy, 8192).expect_err("too much").to_string().contains("--kv-cache-memory-bytes"));
    }

    #[test]
    fn errors_say_what_is_missing_and_what_helps() {
        let full = MemoryInputs { used: 71_950_000_000, ..inputs() };
        let text = n_pages(full, 8192).expect_err("too little").to_string();
        assert!(text.contains("1.00 GiB are missing") && text.contains("--gpu-memory-utilization"), "{text}");
    }
}
