//! [`Gguf`]: a memory-mapped GGUF file, or all parts of a split one; versions 2 and 3, little endian.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. The header is checked in full when the
//! file is opened; nothing of it is trusted before, and nothing is allocated that the file's own bytes do not back.

mod metadata;
mod reader;
mod source;
mod split;
#[cfg(test)]
pub(crate) mod writer;

use std::{
    borrow::Cow,
    collections::HashMap,
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::Mmap;
use metadata::{Value, ValueType};
pub use source::GgufSource;
#[cfg(test)]
pub(crate) use source::tensor_name;
pub(crate) use split::PartName;

use super::{DType, TensorView};
use crate::{Error, quant};

/// A GGUF file, or all parts of a split one: metadata and tensors by name.
#[derive(Debug)]
pub struct Gguf {
    /// The first part.
    path: PathBuf,
    /// One per part.
    maps: Vec<Arc<Mmap>>,
    /// The first part's.
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorInfo>,
}

/// Where a tensor lies and what it is.
#[derive(Debug, Clone)]
struct TensorInfo {
    /// PyTorch's order; GGUF stores the reverse.
    shape: Vec<usize>,
    ggml_type: u32,
    /// Index of the part that holds it.
    part: usize,
    /// First byte in that file.
    start: usize,
}

impl Gguf {
    /// Maps the file at `path` and checks its header; of a split file, all parts, whichever `path` is.
    ///
    /// # Errors
    /// [`Error::Model`] if the file or another part cannot be opened, is truncated or contradicts itself.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = Self::open_one(path)?;
        match file.integer("split.count")? {
            Some(count) if count > 1 => split::join(file, count),
            _ => Ok(file),
        }
    }

    /// Maps the file at `path` alone.
    fn open_one(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|e| Error::model(path, format!("cannot open the file: {e}")))?;
        // SAFETY: the map is only read. Changing the file under a running server is undefined for every
        // memory-mapped model format; all text taken from the map is checked again when it is used.
        let mmap = unsafe { Mmap::map(&file) }.map_err(|e| Error::model(path, format!("cannot map the file: {e}")))?;
        let header = reader::read_header(&mmap).map_err(|message| Error::model(path, message))?;
        let maps = vec![Arc::new(mmap)];
        Ok(Self { path: path.to_owned(), maps, metadata: header.metadata, tensors: header.tensors })
    }

    /// The mapped file that holds tensor `name`, shared.
    pub fn map(&self, name: &str) -> Option<&Arc<Mmap>> {
        self.tensors.get(name).map(|info| &self.maps[info.part])
    }

    /// The first part, which holds the metadata.
    fn first(&self) -> &[u8] {
        &self.maps[0]
    }

    /// The file; of a split one, the first part.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the file has the metadata key `key`.
    pub fn contains(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    /// All metadata keys, in no order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// The text at `key`, if it is there.
    ///
    /// # Errors
    /// [`Error::Model`] if the value is no text.
    pub fn string(&self, key: &str) -> Result<Option<&str>, Error> {
        self.scalar(key, "a string", |value| match value {
            Value::String(range) => std::str::from_utf8(&self.first()[range.clone()]).ok(),
            _ => None,
        })
    }

    /// The non-negative integer at `key`, if it is there.
    ///
    /// # Errors
    /// [`Error::Model`] if the value is something else.
    pub fn integer(&self, key: &str) -> Result<Option<usize>, Error> {
        self.scalar(key, "a non-negative integer", |value| match *value {
            Value::Uint(n) => usize::try_from(n).ok(),
            Value::Int(n) => usize::try_from(n).ok(),
            _ => None,
        })
    }

    /// The number at `key`, if it is there.
    ///
    /// # Errors
    /// [`Error::Model`] if the value is no number.
    pub fn float(&self, key: &str) -> Result<Option<f64>, Error> {
        self.scalar(key, "a number", |value| match *value {
            Value::Float(x) => Some(x),
            Value::Uint(n) => Some(n as f64),
            Value::Int(n) => Some(n as f64),
            _ => None,
        })
    }

    /// The truth value at `key`, if it is there.
    ///
    /// # Errors
    /// [`Error::Model`] if the value is something else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.scalar(key, "a bool", |value| match *value {
            Value::Bool(b) => Some(b),
            _ => None,
        })
    }

    /// The array of strings at `key`, if it is there.
    ///
    /// # Errors
    /// [`Error::Model`] if the value is something else.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&str>>, Error> {
        self.scalar(key, "an array of strings", |value| match value {
            Value::Array { element: ValueType::String, len, bytes } => {
                metadata::strings(&self.first()[bytes.clone()], *len)
            }
            _ => None,
        })
    }

    /// The array of integers at `key`, if it is there.
    ///
    /// # Errors
    /// [`Error::Model`] if the value is something else.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i64>>, Error> {
        self.scalar(key, "an array of integers", |value| match value {
            Value::Array { element, bytes, .. } => metadata::integers(*element, &self.first()[bytes.clone()]),
            _ => None,
        })
    }

    /// The array of numbers at `key`, if it is there, in single precision.
    ///
    /// # Errors
    /// [`Error::Model`] if the value is something else.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, Error> {
        self.scalar(key, "an array of numbers", |value| match value {
            Value::Array { element, bytes, .. } => metadata::floats(*element, &self.first()[bytes.clone()]),
            _ => None,
        })
    }

    fn scalar<'a, T>(
        &'a self,
        key: &str,
        what: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.error(format!("metadata key '{key}' must be {what}, not {value:?}"))),
        }
    }

    /// An [`Error::Model`] about this file.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::model(&self.path, message)
    }

    /// Shape of tensor `name` in PyTorch's order, if it is there.
    pub fn tensor_shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|info| info.shape.as_slice())
    }

    /// The tensor `name` as it is stored, its shape in PyTorch's order.
    ///
    /// # Errors
    /// [`Error::Model`] if it is missing or of a type that Ember does not read.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, Error> {
        let info = self.tensors.get(name).ok_or_else(|| self.error(format!("tensor '{name}' is missing")))?;
        let dtype = dtype(info.ggml_type).ok_or_else(|| {
            let supported: Vec<_> =
                ["F32", "F16", "BF16"].into_iter().chain(quant::FORMATS.iter().map(|f| f.name())).collect();
            self.error(format!(
                "tensor '{name}' has type {}, which is not supported; supported types are {}",
                type_name(info.ggml_type),
                supported.join(", ")
            ))
        })?;
        let data = info
            .shape
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(d))
            .and_then(|n| dtype.size_of(n))
            .and_then(|size| self.maps[info.part].get(info.start..info.start.checked_add(size)?))
            .ok_or_else(|| self.error(format!("tensor '{name}' runs past the end of the file")))?;
        Ok(TensorView { dtype, shape: info.shape.clone(), data: Cow::Borrowed(data) })
    }
}

/// The element type of GGUF's type number `ggml_type`, if Ember reads it.
fn dtype(ggml_type: u32) -> Option<DType> {
    match ggml_type {
        0 => Some(DType::F32),
        1 => Some(DType::F16),
        30 => Some(DType::BF16),
        _ => quant::by_ggml_type(ggml_type).map(DType::Quant),
    }
}

/// The name of GGUF's type number `ggml_type` (`enum ggml_type` in ggml.h).
fn type_name(ggml_type: u32) -> String {
    let name = match ggml_type {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        8 => "Q8_0",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        30 => "BF16",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        other => return format!("number {other} (unknown)"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::{writer::GgufWriter, *};

    #[test]
    fn reads_back_what_was_written() {
        let mut w = GgufWriter::default();
        w.string("general.architecture", "llama").u32("llama.block_count", 3).f32("x.eps", 1e-5).bool("x.flag", true);
        w.strings("x.tokens", &["a", "", "é"]).i32s("x.types", &[1, -2]);
        w.tensor("t", &[2, 3], 0, [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|v| v.to_le_bytes()).collect());
        w.tensor("later", &[32], 16, vec![0; 18]);
        let file = w.file();
        let gguf = Gguf::open(file.path()).expect("valid");
        assert_eq!(gguf.string("general.architecture").unwrap(), Some("llama"));
        assert_eq!(gguf.integer("llama.block_count").unwrap(), Some(3));
        assert_eq!(gguf.float("x.eps").unwrap(), Some(f64::from(1e-5f32)));
        assert_eq!(gguf.bool("x.flag").unwrap(), Some(true));
        assert_eq!(gguf.strings("x.tokens").unwrap(), Some(vec!["a", "", "é"]));
        assert_eq!(gguf.integers("x.types").unwrap(), Some(vec![1, -2]));
        assert_eq!(gguf.integer("absent").unwrap(), None);
        let t = gguf.tensor("t").expect("there");
        assert_eq!((t.shape.as_slice(), &*t.to_f32()), (&[2, 3][..], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0][..]));
    }

    #[test]
    fn errors_name_the_file_and_the_cause() {
        let mut w = GgufWriter::default();
        w.string("s", "text").tensor("later", &[256], 16, vec![0; 66]);
        let file = w.file();
        let gguf = Gguf::open(file.path()).expect("valid");
        let message = |e: Error| e.to_string();
        let e = message(gguf.tensor("later").unwrap_err());
        assert!(e.contains("'later' has type IQ2_XXS") && e.contains("F32, F16, BF16, IQ4_NL"), "{e}");
        assert!(e.contains(&*file.path().to_string_lossy()), "{e}");
        assert!(message(gguf.tensor("nope").unwrap_err()).contains("'nope' is missing"));
        let e = message(gguf.integer("s").unwrap_err());
        assert!(e.contains("'s' must be a non-negative integer"), "{e}");
        assert!(message(Gguf::open(Path::new("/nonexistent.gguf")).unwrap_err()).contains("cannot open"));
    }
}
