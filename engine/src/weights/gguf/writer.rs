//! [`GgufWriter`]: writes small GGUF files for tests, wrong ones too.

use std::io::Write;

/// Builds a GGUF file in memory.
#[derive(Clone)]
pub(crate) struct GgufWriter {
    pub(crate) version: u32,
    /// In place of the true number of metadata entries.
    pub(crate) n_metadata: Option<u64>,
    /// In place of the true number of tensors.
    pub(crate) n_tensors: Option<u64>,
    alignment: usize,
    metadata: Vec<Vec<u8>>,
    infos: Vec<Vec<u8>>,
    data: Vec<u8>,
}

impl Default for GgufWriter {
    fn default() -> Self {
        Self {
            version: 3,
            n_metadata: None,
            n_tensors: None,
            alignment: 32,
            metadata: vec![],
            infos: vec![],
            data: vec![],
        }
    }
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

impl GgufWriter {
    /// A metadata entry of type number `value_type` and the bytes `value`.
    pub(crate) fn raw(&mut self, key: &str, value_type: u32, value: &[u8]) -> &mut Self {
        self.metadata.push([text(key).as_slice(), &value_type.to_le_bytes(), value].concat());
        self
    }

    /// The same in place of all entries so far of that key.
    pub(crate) fn replace(&mut self, key: &str, value_type: u32, value: &[u8]) {
        self.metadata.retain(|entry| !entry.starts_with(&text(key)));
        self.raw(key, value_type, value);
    }

    pub(crate) fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        if key == "general.alignment" {
            self.alignment = value as usize;
        }
        self.raw(key, 4, &value.to_le_bytes())
    }

    pub(crate) fn f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    pub(crate) fn bool(&mut self, key: &str, value: bool) -> &mut Self {
        self.raw(key, 7, &[value.into()])
    }

    pub(crate) fn string(&mut self, key: &str, value: &str) -> &mut Self {
        self.raw(key, 8, &text(value))
    }

    pub(crate) fn strings(&mut self, key: &str, values: &[&str]) -> &mut Self {
        let elements: Vec<u8> = values.iter().flat_map(|s| text(s)).collect();
        self.raw(key, 9, &[&8u32.to_le_bytes(), &(values.len() as u64).to_le_bytes()[..], &elements].concat())
    }

    pub(crate) fn i32s(&mut self, key: &str, values: &[i32]) -> &mut Self {
        self.raw(key, 9, &array_of_i32(values))
    }

    pub(crate) fn f32s(&mut self, key: &str, values: &[f32]) -> &mut Self {
        let elements: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.raw(key, 9, &[&6u32.to_le_bytes(), &(values.len() as u64).to_le_bytes()[..], &elements].concat())
    }

    /// An array of arrays.
    pub(crate) fn nested(&mut self, key: &str, values: &[&[i32]]) -> &mut Self {
        let elements: Vec<u8> = values.iter().flat_map(|v| array_of_i32(v)).collect();
        self.raw(key, 9, &[&9u32.to_le_bytes(), &(values.len() as u64).to_le_bytes()[..], &elements].concat())
    }

    /// A tensor of `shape` in PyTorch's order.
    pub(crate) fn tensor(&mut self, name: &str, shape: &[usize], ggml_type: u32, data: Vec<u8>) -> &mut Self {
        self.data.resize(self.data.len().next_multiple_of(self.alignment), 0);
        self.info(name, shape, ggml_type, self.data.len() as u64);
        self.data.extend(data);
        self
    }

    /// A tensor info of type F32 at `offset`, with no data of its own.
    pub(crate) fn tensor_at(&mut self, name: &str, shape: &[usize], offset: u64) -> &mut Self {
        self.info(name, shape, 0, offset);
        self
    }

    fn info(&mut self, name: &str, shape: &[usize], ggml_type: u32, offset: u64) {
        let dims: Vec<u8> = shape.iter().rev().flat_map(|d| (*d as u64).to_le_bytes()).collect();
        let n_dims = (shape.len() as u32).to_le_bytes();
        self.infos
            .push([text(name).as_slice(), &n_dims, &dims, &ggml_type.to_le_bytes(), &offset.to_le_bytes()].concat());
    }

    /// The file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let n_tensors = self.n_tensors.unwrap_or(self.infos.len() as u64);
        let n_metadata = self.n_metadata.unwrap_or(self.metadata.len() as u64);
        let counts = [n_tensors.to_le_bytes(), n_metadata.to_le_bytes()].concat();
        let mut out = [b"GGUF".as_slice(), &self.version.to_le_bytes(), &counts].concat();
        out.extend(self.metadata.concat());
        out.extend(self.infos.concat());
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(&self.data);
        out
    }

    /// The file, on disk.
    pub(crate) fn file(&self) -> tempfile::NamedTempFile {
        let mut file = tempfile::Builder::new().suffix(".gguf").tempfile().expect("a temporary file");
        file.write_all(&self.bytes()).expect("room on the disk");
        file
    }
}

fn array_of_i32(values: &[i32]) -> Vec<u8> {
    let elements: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    [&5u32.to_le_bytes(), &(values.len() as u64).to_le_bytes()[..], &elements].concat()
}
