//! A GGUF file: metadata, tensors, tokenizer, chat template.

use std::{io::Write, sync::LazyLock};

use ember_engine::{LoadFormat, models::Model};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder for temporary files"));

/// The bytes are the file.
pub fn run(bytes: &[u8]) {
    // A file of its own: one that is still mapped must not change.
    let mut file = tempfile::Builder::new().suffix(".gguf").tempfile_in(FOLDER.path()).expect("a temporary file");
    file.write_all(bytes).expect("written");
    let Ok(model) = Model::open(file.path(), LoadFormat::Auto, 0) else {
        return;
    };
    for weight in model.spec.weights() {
        let tensor = model.weights.get(weight).expect("opening a model has checked its weights");
        let n_elements: usize = tensor.shape.iter().product();
        assert_eq!(tensor.to_f32().len(), n_elements, "{weight:?}");
    }
    let ids = model.tokenizer.encode("The quick brown fox: 123, été 你好 <s></s>\n", true).unwrap_or_default();
    let _ = model.tokenizer.decode(&ids, false);
}
