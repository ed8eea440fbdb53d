//! [`Golden`]: a file of engine/tests/golden/ and the checkpoint that it was made from.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

pub const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

/// What xtask/reference/golden.py wrote.
#[derive(serde::Deserialize)]
#[allow(dead_code, reason = "each test reads its part")]
pub struct Golden {
    #[serde(default)]
    pub config: Value,
    /// Further files of the folder.
    #[serde(default)]
    pub files: BTreeMap<String, Value>,
    #[serde(default)]
    pub tensors: BTreeMap<String, Vec<usize>>,
    #[serde(default)]
    pub prompts: Vec<Prompt>,
    #[serde(default)]
    pub texts: Vec<Text>,
}

#[derive(serde::Deserialize)]
#[allow(dead_code, reason = "each test reads its part")]
pub struct Prompt {
    pub ids: Vec<u32>,
    /// Log-probability of each token but the first.
    pub targets: Vec<f32>,
    /// The likeliest tokens after some positions.
    pub top: HashMap<usize, Vec<(u32, f32)>>,
}

#[derive(serde::Deserialize)]
#[allow(dead_code, reason = "each test reads its part")]
pub struct Text {
    pub ids: Vec<u32>,
    pub vector: Vec<f32>,
}

impl Golden {
    pub fn read(name: &str) -> Self {
        let text = std::fs::read_to_string(format!("{FOLDER}/{name}.json")).expect("a file");
        serde_json::from_str(&text).expect("what golden.py writes")
    }

    /// The checkpoint, as a Hugging Face folder.
    pub fn folder(&self) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, value: &Value| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("created");
            std::fs::write(path, value.to_string()).expect("written");
        };
        write("config.json", &self.config);
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        });
        write("tokenizer.json", &tokenizer);
        self.files.iter().for_each(|(name, value)| write(name, value));
        self.write_weights(&folder.path().join("model.safetensors"));
        folder
    }

    fn write_weights(&self, path: &Path) {
        let tensors: Vec<(&String, Dtype, &Vec<usize>, Vec<u8>)> = self
            .tensors
            .iter()
            .map(|(name, shape)| {
                let n = shape.iter().product();
                let is_scaled =
                    ["_scale", "_scale_inv"].iter().any(|end| self.tensors.contains_key(&format!("{name}{end}")));
                match is_scaled {
                    true => (name, Dtype::F8_E4M3, shape, fp8(name, n)),
                    false => {
                        let data = values(name, shape).iter().flat_map(|value| value.to_le_bytes()).collect();
                        (name, Dtype::F32, shape, data)
                    }
                }
            })
            .collect();
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, data)| (name, TensorView::new(*dtype, shape.to_vec(), data).expect("whole")));
        safetensors::serialize_to_file(views, None, path).expect("written");
    }
}

/// 64 bits for each of `n` elements of tensor `name`.
fn hashes(name: &str, n: usize) -> impl Iterator<Item = u64> {
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
    (0..n as u64).map(move |i| {
        let mut z = seed.wrapping_add(i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

fn values(name: &str, shape: &[usize]) -> Vec<f32> {
    let (middle, spread) = if name.ends_with("norm.weight") || name.ends_with("LayerNorm.weight") {
        (1.0, 0.4)
    } else if name.ends_with("bias") {
        (0.0, 0.5)
    } else if name.contains("embed") {
        (0.0, 1.0)
    } else if name.contains("weight_scale") {
        (0.004, 0.002)
    } else {
        (0.0, (2.5 / (shape[shape.len() - 1] as f64).sqrt()) as f32)
    };
    let value = |hash: u64| middle + spread * ((hash >> 40) as f32 / (1 << 23) as f32 - 1.0);
    hashes(name, shape.iter().product()).map(value).collect()
}

fn fp8(name: &str, n: usize) -> Vec<u8> {
    let byte = |hash: u64| (hash >> 56) as u8;
    hashes(name, n).map(byte).map(|byte| if byte & 0x7f == 0x7f { byte - 1 } else { byte }).collect()
}
