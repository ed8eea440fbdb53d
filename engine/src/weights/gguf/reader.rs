//! Reads and checks a GGUF header. Works on bytes alone; errors are messages without the file's name.

use std::{collections::HashMap, ops::Range};

use super::{
    TensorInfo, dtype,
    metadata::{Value, ValueType},
    type_name,
};

/// Arrays may be nested this deep. Known files do not nest at all.
const MAX_ARRAY_DEPTH: usize = 4;
/// Dimensions of a tensor (`GGML_MAX_DIMS`).
const MAX_DIMS: u32 = 4;
/// Smallest metadata entry: an empty key, a type and one byte.
const MIN_METADATA_BYTES: usize = 8 + 4 + 1;
/// Smallest tensor info: an empty name, no dimensions, a type and an offset.
const MIN_TENSOR_BYTES: usize = 8 + 4 + 4 + 8;

/// A checked header.
pub(super) struct Header {
    pub(super) metadata: HashMap<String, Value>,
    pub(super) tensors: HashMap<String, TensorInfo>,
}

/// Reads the header of `file`, the whole file's bytes.
pub(super) fn read_header(file: &[u8]) -> Result<Header, String> {
    let mut cursor = Cursor::new(file);
    if cursor.take(4).ok() != Some(b"GGUF") {
        return Err("not a GGUF file: it does not begin with 'GGUF'".into());
    }
    match cursor.u32()? {
        2 | 3 => {}
        version if matches!(version.swap_bytes(), 1..=3) => {
            return Err("big-endian GGUF files are not supported; convert the file to little endian".into());
        }
        version => {
            return Err(format!("GGUF version {version} is not supported; supported are 2 and 3"));
        }
    }
    let n_tensors = cursor.count("tensor count", MIN_TENSOR_BYTES)?;
    let n_metadata = cursor.count("metadata count", MIN_METADATA_BYTES)?;

    let mut metadata = HashMap::new();
    for i in 0..n_metadata {
        let key = cursor.name().map_err(|e| format!("key of metadata entry {i}: {e}"))?.to_owned();
        let value = read_value(&mut cursor).map_err(|e| format!("metadata key '{key}': {e}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("metadata key '{key}' is there twice"));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(&Value::Uint(n)) if n.is_power_of_two() && n <= 1 << 20 => n as usize,
        Some(other) => {
            return Err(format!("general.alignment must be a power of two up to 2^20, not {other:?}"));
        }
    };
    let tensors = read_tensor_infos(&mut cursor, n_tensors, alignment)?;
    Ok(Header { metadata, tensors })
}

fn read_value(cursor: &mut Cursor<'_>) -> Result<Value, String> {
    let value_type = cursor.value_type()?;
    Ok(match value_type {
        ValueType::U8 => Value::Uint(cursor.array().map(u8::from_le_bytes)?.into()),
        ValueType::U16 => Value::Uint(cursor.array().map(u16::from_le_bytes)?.into()),
        ValueType::U32 => Value::Uint(cursor.u32()?.into()),
        ValueType::U64 => Value::Uint(cursor.u64()?),
        ValueType::I8 => Value::Int(cursor.array().map(i8::from_le_bytes)?.into()),
        ValueType::I16 => Value::Int(cursor.array().map(i16::from_le_bytes)?.into()),
        ValueType::I32 => Value::Int(cursor.array().map(i32::from_le_bytes)?.into()),
        ValueType::I64 => Value::Int(cursor.array().map(i64::from_le_bytes)?),
        ValueType::F32 => Value::Float(cursor.array().map(f32::from_le_bytes)?.into()),
        ValueType::F64 => Value::Float(cursor.array().map(f64::from_le_bytes)?),
        ValueType::Bool => Value::Bool(cursor.array::<1>()? != [0]),
        ValueType::String => Value::String(cursor.string()?),
        ValueType::Array => {
            let (element, len, bytes) = skip_array(cursor, MAX_ARRAY_DEPTH)?;
            Value::Array { element, len, bytes }
        }
    })
}

/// Checks an array and steps over it: element type, length and the bytes of its elements.
fn skip_array(cursor: &mut Cursor<'_>, depth: usize) -> Result<(ValueType, usize, Range<usize>), String> {
    if depth == 0 {
        return Err(format!("arrays are nested more than {MAX_ARRAY_DEPTH} deep"));
    }
    let element = cursor.value_type()?;
    // An empty string is its 8-byte length; an empty array its type and length.
    let min_bytes = element.size().unwrap_or(if element == ValueType::String { 8 } else { 12 });
    let len = cursor.count("array length", min_bytes)?;
    let start = cursor.position();
    match element {
        ValueType::String => (0..len).try_for_each(|_| cursor.string().map(drop))?,
        ValueType::Array => (0..len).try_for_each(|_| skip_array(cursor, depth - 1).map(drop))?,
        _ => cursor.take(len * min_bytes).map(drop)?,
    }
    Ok((element, len, start..cursor.position()))
}

fn read_tensor_infos(
    cursor: &mut Cursor<'_>,
    n_tensors: usize,
    alignment: usize,
) -> Result<HashMap<String, TensorInfo>, String> {
    let mut tensors = HashMap::new();
    for i in 0..n_tensors {
        let name = cursor.name().map_err(|e| format!("name of tensor {i}: {e}"))?.to_owned();
        let info = read_tensor_info(cursor).map_err(|e| format!("tensor '{name}': {e}"))?;
        if tensors.insert(name.clone(), info).is_some() {
            return Err(format!("tensor '{name}' is there twice"));
        }
    }
    // Offsets count from the end of the header, rounded up to the alignment.
    let data_start = cursor.position().next_multiple_of(alignment);
    for (name, info) in &mut tensors {
        place_tensor(info, data_start, alignment, cursor.file.len()).map_err(|e| format!("tensor '{name}': {e}"))?;
    }
    Ok(tensors)
}

/// A tensor info whose `start` still counts from the start of the tensor data.
fn read_tensor_info(cursor: &mut Cursor<'_>) -> Result<TensorInfo, String> {
    let n_dims = cursor.u32()?;
    if n_dims == 0 || n_dims > MAX_DIMS {
        return Err(format!("{n_dims} dimensions; supported are 1 to {MAX_DIMS}"));
    }
    let mut shape = (0..n_dims).map(|_| cursor.u64()).collect::<Result<Vec<_>, _>>()?;
    shape.reverse();
    let ggml_type = cursor.u32()?;
    let offset = cursor.u64()?;
    let shape = shape
        .iter()
        .map(|&d| usize::try_from(d).map_err(|_| format!("dimension {d} is too large")))
        .collect::<Result<_, _>>()?;
    let start = usize::try_from(offset).map_err(|_| format!("offset {offset} is too large"))?;
    Ok(TensorInfo { shape, ggml_type, part: 0, start })
}

/// Turns `info.start` into a position in the file and checks that the tensor fits.
fn place_tensor(info: &mut TensorInfo, data_start: usize, alignment: usize, file_len: usize) -> Result<(), String> {
    if !info.start.is_multiple_of(alignment) {
        return Err(format!("offset {} is no multiple of the alignment {alignment}", info.start));
    }
    let n_elements = info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let n_elements = n_elements.ok_or_else(|| format!("shape {:?} is too large", info.shape))?;
    let start = data_start.checked_add(info.start).filter(|&start| start <= file_len);
    let start = start.ok_or_else(|| format!("offset {} is past the end of the file", info.start))?;
    // The size of a type that Ember does not read is unknown; such a tensor cannot be got anyway.
    if let Some(dtype) = dtype(info.ggml_type) {
        let columns = info.shape.last().copied().unwrap_or(1);
        if !columns.is_multiple_of(dtype.block_size()) {
            return Err(format!(
                "rows of {columns} elements are not whole {} blocks of {}",
                type_name(info.ggml_type),
                dtype.block_size()
            ));
        }
        let end = dtype.size_of(n_elements).and_then(|size| start.checked_add(size));
        if end.is_none_or(|end| end > file_len) {
            return Err(format!(
                "shape {:?} at offset {} runs past the end of the file ({file_len} bytes); the file is truncated",
                info.shape, info.start
            ));
        }
    }
    info.start = start;
    Ok(())
}

/// A position in a file; every step is checked against the file's end.
pub(super) struct Cursor<'a> {
    file: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(file: &'a [u8]) -> Self {
        Self { file, position: 0 }
    }

    fn position(&self) -> usize {
        self.position
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let end = self.position.checked_add(n).filter(|&end| end <= self.file.len());
        let Some(end) = end else {
            return Err(format!(
                "the file ends at byte {}, but {n} more are needed at {}; it is truncated or broken",
                self.file.len(),
                self.position
            ));
        };
        let bytes = &self.file[self.position..end];
        self.position = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    fn value_type(&mut self) -> Result<ValueType, String> {
        let number = self.u32()?;
        ValueType::from_number(number).ok_or_else(|| format!("unknown value type {number}"))
    }

    /// A count of things of at least `min_bytes` each, which must fit in the rest of the file.
    fn count(&mut self, what: &str, min_bytes: usize) -> Result<usize, String> {
        let count = self.u64()?;
        let fits = (self.file.len() - self.position) / min_bytes;
        usize::try_from(count)
            .ok()
            .filter(|&n| n <= fits)
            .ok_or_else(|| format!("{what} is {count}, but the rest of the file holds at most {fits}"))
    }

    /// A string's bytes, checked to be UTF-8.
    pub(super) fn string(&mut self) -> Result<Range<usize>, String> {
        let len = self.count("string length", 1)?;
        let start = self.position;
        std::str::from_utf8(self.take(len)?).map_err(|e| format!("text is not UTF-8: {e}"))?;
        Ok(start..self.position)
    }

    fn name(&mut self) -> Result<&'a str, String> {
        let range = self.string()?;
        std::str::from_utf8(&self.file[range]).map_err(|e| e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::writer::GgufWriter, *};

    fn small_file() -> GgufWriter {
        let mut w = GgufWriter::default();
        w.string("general.architecture", "llama").u32("general.alignment", 64).bool("b", false);
        w.strings("tokens", &["a", "bc", "né"]).i32s("types", &[1, 2, 3]).nested("nested", &[&[1, 2], &[3]]);
        w.tensor("x.weight", &[2, 32], 2, vec![7; 36]).tensor("y.weight", &[3], 0, vec![0; 12]);
        w
    }

    fn error_of(bytes: &[u8]) -> String {
        read_header(bytes).err().unwrap_or_default()
    }

    #[test]
    fn the_small_file_is_valid() {
        let bytes = small_file().bytes();
        let header = read_header(&bytes).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(header.metadata.len(), 6);
        assert_eq!(header.tensors["x.weight"].shape, [2, 32]);
        assert!(header.tensors.values().all(|t| t.start.is_multiple_of(64)));
    }

    #[test]
    fn hostile_headers_are_named() {
        let check = |edit: &dyn Fn(&mut GgufWriter), expected: &str| {
            let mut w = small_file();
            edit(&mut w);
            let message = error_of(&w.bytes());
            assert!(message.contains(expected), "{message:?} should contain {expected:?}");
        };
        assert!(error_of(b"GGML....").contains("does not begin with 'GGUF'"));
        assert!(error_of(b"").contains("does not begin with 'GGUF'"));
        check(&|w| w.version = 1, "version 1 is not supported");
        check(&|w| w.version = 3u32.swap_bytes(), "big-endian");
        check(&|w| w.n_metadata = Some(u64::MAX), "metadata count is 18446744073709551615");
        check(&|w| w.n_tensors = Some(1 << 40), "tensor count is");
        check(&|w| _ = w.string("b", "again"), "'b' is there twice");
        check(&|w| _ = w.tensor("y.weight", &[1], 0, vec![0; 4]), "'y.weight' is there twice");
        check(&|w| _ = w.raw("huge", 8, &u64::MAX.to_le_bytes()), "'huge': string length is");
        check(&|w| _ = w.raw("bad", 8, &[2, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe]), "not UTF-8");
        check(&|w| _ = w.raw("odd", 77, &[0]), "unknown value type 77");
        let long = [4u32.to_le_bytes().as_slice(), &(1u64 << 61).to_le_bytes()].concat();
        check(&|w| _ = w.raw("long", 9, &long), "array length is");
        let deep = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat().repeat(10);
        check(&|w| _ = w.raw("deep", 9, &deep), "nested more than");
        check(&|w| _ = w.tensor("z", &[1 << 40, 1 << 40], 0, vec![]), "too large");
        check(&|w| _ = w.tensor("z", &[1 << 20, 32], 0, vec![]), "runs past the end");
        check(&|w| _ = w.tensor("z", &[31], 2, vec![0; 18]), "not whole Q4_0 blocks");
        check(&|w| _ = w.tensor("z", &[1, 1, 1, 1, 1], 0, vec![0; 4]), "5 dimensions");
        check(&|w| _ = w.tensor_at("z", &[1], 1 << 40), "past the end of the file");
        check(&|w| _ = w.tensor_at("z", &[1], 3), "no multiple of the alignment");
        check(&|w| w.replace("general.alignment", 4, &3u32.to_le_bytes()), "general.alignment must be a power of two");
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = small_file().bytes();
        for len in 0..bytes.len() {
            assert!(read_header(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn damaged_files_never_panic(
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = small_file().bytes();
            for (index, byte) in flips {
                let i = index.index(bytes.len());
                bytes[i] = byte;
            }
            let _ = read_header(&bytes);
            bytes.truncate(cut.index(bytes.len()));
            let _ = read_header(&bytes);
        }
    }
}
