//! Reads config.json's `quantization_config`: which checkpoints with quantised weights can be read.

use serde_json::Value;

use super::HfConfig;
use crate::Error;

/// Rows and columns of a block of fp8 weights, of the fp8 checkpoints of DeepSeek and Qwen.
const DEFAULT_BLOCK: (usize, usize) = (128, 128);

/// Rows and columns that share a scale where a checkpoint's fp8 weights have one for each block.
///
/// # Errors
/// [`Error::Model`] if the weights are quantised in a way that is not read.
pub(super) fn fp8_block(config: &HfConfig) -> Result<(usize, usize), Error> {
    let Some(quantization) = config.get("quantization_config") else {
        return Ok(DEFAULT_BLOCK);
    };
    let text = |field: &str| quantization.get(field).and_then(Value::as_str);
    let method = text("quant_method").unwrap_or("unknown");
    let is_read = match method {
        "fp8" | "fbgemm_fp8" => true,
        // By its own name of the format of the files; the other formats hold packed integers.
        "compressed-tensors" => matches!(text("format"), Some("float-quantized" | "naive-quantized")),
        _ => false,
    };
    if !is_read {
        let format = text("format").map(|format| format!(", format {format}")).unwrap_or_default();
        return Err(config.error(format!(
            "'quantization_config' says that the weights are quantised ({method}{format}), which is not supported for \
             safetensors; supported are fp8 and compressed-tensors with fp8 weights. Use such a checkpoint, unquantised \
             weights or a GGUF file"
        )));
    }
    let Some(block) = quantization.get("weight_block_size").filter(|block| !block.is_null()) else {
        return Ok(DEFAULT_BLOCK);
    };
    let size = |i: usize| block.get(i).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
    size(0).zip(size(1)).ok_or_else(|| {
        config.error(format!("'quantization_config.weight_block_size' must be two positive integers, not {block}"))
    })
}
