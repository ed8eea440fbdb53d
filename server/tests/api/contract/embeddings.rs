//! Fields of `/v1/embeddings`.

use serde_json::json;

use super::Case;

/// Beside an input.
pub fn cases() -> Vec<Case> {
    vec![
        (json!({}), 200, "", ""),
        (json!({"input": ["a", "b"]}), 200, "", ""),
        (json!({"input": [65, 66]}), 200, "", ""),
        (json!({"input": [[65], [66]]}), 200, "", ""),
        (json!({"input": []}), 400, "at least one text", "input"),
        (json!({"input": null}), 400, "expected a string", "body.input"),
        (json!({"input": 5}), 400, "expected a string", "body.input"),
        (json!({"input": [999]}), 400, "Token id 999 is out of vocabulary", "input"),
        (json!({"input": vec!["a"; 2049]}), 400, "at most 2048", "input"),
        (json!({"model": "gpt"}), 404, "The model `gpt` does not exist", "model"),
        (json!({"encoding_format": "float"}), 200, "", ""),
        (json!({"encoding_format": "base64"}), 200, "", ""),
        (json!({"encoding_format": "bytes"}), 400, "`float` or `base64`", "encoding_format"),
        (json!({"encoding_format": 5}), 400, "validation error", "body.encoding_format"),
        (json!({"encoding_format": "base64", "embed_dtype": "float16", "endianness": "big"}), 200, "", ""),
        (json!({"embed_dtype": "bfloat16"}), 200, "", ""),
        (json!({"embed_dtype": "fp8_e4m3"}), 400, "`float32`, `float16` or `bfloat16`", "embed_dtype"),
        (json!({"endianness": "middle"}), 400, "`native`, `little` or `big`", "endianness"),
        (json!({"dimensions": 3}), 200, "", ""),
        (json!({"dimensions": 2}), 400, "have 3 dimensions and cannot be cut", "dimensions"),
        (json!({"dimensions": "x"}), 400, "validation error", "body.dimensions"),
        (json!({"truncate_prompt_tokens": 1}), 200, "", ""),
        (json!({"truncate_prompt_tokens": -1}), 200, "", ""),
        (json!({"truncate_prompt_tokens": 0}), 400, "must be -1 or between", "truncate_prompt_tokens"),
        (json!({"truncation_side": "up"}), 400, "`left` or `right`", "truncation_side"),
        (json!({"add_special_tokens": false}), 200, "", ""),
        (json!({"cache_salt": "a", "priority": 3, "request_id": "r"}), 200, "", ""),
        (json!({"cache_salt": "a@b"}), 400, "none of @", "cache_salt"),
        (json!({"priority": "x"}), 400, "validation error", "body.priority"),
        (json!({"messages": [{"role": "user", "content": "x"}]}), 400, "not supported", "messages"),
        (json!({"normalize": true}), 400, "not supported", "normalize"),
        (json!({"use_activation": false}), 400, "not supported", "use_activation"),
        (json!({"use_activation": true, "user": "u", "priority": 1}), 200, "", ""),
        (json!({"padding": true}), 400, "not supported", "padding"),
    ]
}

/// Of `/score`, beside a query and documents.
pub fn score() -> Vec<Case> {
    vec![
        (json!({}), 200, "", ""),
        (json!({"queries": ["a", "b"]}), 400, "one query or as many as documents (1), not 2", "queries"),
        (json!({"documents": []}), 400, "1 to 2048 documents", "documents"),
        (json!({"documents": 5}), 400, "expected a string or a list of strings", "body.documents"),
        (json!({"max_tokens_per_query": 1, "max_tokens_per_doc": 0}), 200, "", ""),
        (json!({"max_tokens_per_query": -1}), 400, "between 0 and max_model_len=64", "max_tokens_per_query"),
        (json!({"max_tokens_per_doc": 65}), 400, "between 0 and max_model_len=64", "max_tokens_per_doc"),
        (json!({"max_tokens_per_doc": "x"}), 400, "validation error", "body.max_tokens_per_doc"),
    ]
}
