//! The tuned executor for NVIDIA GPUs: own stream, NVRTC kernels, cuBLASLt and CUDA graphs on Burn's CUDA memory.
//!
//! - [`CudaExecutor`] runs steps: one upload, one graph (decode) or eager launches (prompt chunks), sampled tokens back.
//! - `setup` prepares it: `load` (weights), `ops` (kernels by model dimensions), `gemm` (cuBLASLt, timed once),
//!   `packed_weights` and `stream_gemm` (12-bit weights on Hopper and their products), `plan` (memory), `graph` (one per
//!   batch bucket).
//! - `prompt_contexts`: the KV cache has 12 bits a number; prompts read it unpacked, decoding sequences as it is.
//! - `experts` are mixtures of experts, routed on the device.
//! - `forward` is the model: which kernel reads and writes which of `buffers`.
//! - `inputs` packs a step; `sampling` turns logits into tokens.
//! - `device`, `memory`, `compile`, `kernel`, `libraries`, `status` wrap the driver, Burn's allocator and NVRTC.
//!
//! Everything goes to one stream, in order. Burn's own stream is used for nothing but allocation.

mod attention_work;
mod buckets;
mod buffers;
mod compile;
mod device;
mod executor;
mod experts;
mod experts_selftest;
mod forward;
mod gemm;
mod graph;
mod inputs;
mod kernel;
mod libraries;
mod load;
mod logit_edits;
mod long_attention;
mod memory;
mod ops;
mod packed_kv_selftest;
mod packed_weights;
mod packed_weights_selftest;
mod plan;
mod product;
mod prompt_contexts;
mod sampling;
mod selftest;
mod setup;
mod side_stream;
mod status;
mod stream_gemm;
mod tensor_map;

pub use executor::CudaExecutor;
pub use selftest::{Extent, Rates, SelfTestReport, self_test, self_test_parts};

/// Whether a CUDA device and the libraries that this executor needs are there.
pub fn is_available() -> bool {
    device::Gpu::open(0).is_ok()
}
