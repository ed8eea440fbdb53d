//! GGUF metadata values: scalars decoded, strings and arrays as checked ranges of the file.

use std::ops::Range;

use super::reader::Cursor;

/// Type of a metadata value, by the numbers of GGUF's `gguf_metadata_value_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

/// A metadata value. Text and arrays stay in the file.
#[derive(Debug, Clone)]
pub(super) enum Value {
    Uint(u64),
    Int(i64),
    Float(f64),
    Bool(bool),
    /// Valid UTF-8 when the file was opened.
    String(Range<usize>),
    Array {
        element: ValueType,
        len: usize,
        bytes: Range<usize>,
    },
}

impl ValueType {
    pub(super) fn from_number(number: u32) -> Option<Self> {
        use ValueType::*;
        const ALL: [ValueType; 13] = [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64];
        ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// Bytes of a value of this type; `None` if that varies.
    pub(super) fn size(self) -> Option<usize> {
        use ValueType::*;
        match self {
            U8 | I8 | Bool => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            String | Array => None,
        }
    }
}

/// The `len` strings in `bytes`, the contents of an array.
pub(super) fn strings(bytes: &[u8], len: usize) -> Option<Vec<&str>> {
    let mut cursor = Cursor::new(bytes);
    let mut out = Vec::with_capacity(len.min(bytes.len() / 8));
    for _ in 0..len {
        let range = cursor.string().ok()?;
        out.push(std::str::from_utf8(&bytes[range]).ok()?);
    }
    Some(out)
}

/// The integers in `bytes`, the contents of an array of `element`.
pub(super) fn integers(element: ValueType, bytes: &[u8]) -> Option<Vec<i64>> {
    fn read<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> Option<i64>) -> Option<Vec<i64>> {
        bytes.as_chunks::<N>().0.iter().map(|b| f(*b)).collect()
    }
    match element {
        ValueType::U8 => read(bytes, |[b]| Some(b.into())),
        ValueType::I8 => read(bytes, |b| Some(i8::from_le_bytes(b).into())),
        ValueType::U16 => read(bytes, |b| Some(u16::from_le_bytes(b).into())),
        ValueType::I16 => read(bytes, |b| Some(i16::from_le_bytes(b).into())),
        ValueType::U32 => read(bytes, |b| Some(u32::from_le_bytes(b).into())),
        ValueType::I32 => read(bytes, |b| Some(i32::from_le_bytes(b).into())),
        ValueType::U64 => read(bytes, |b| u64::from_le_bytes(b).try_into().ok()),
        ValueType::I64 => read(bytes, |b| Some(i64::from_le_bytes(b))),
        ValueType::F32 | ValueType::F64 | ValueType::Bool | ValueType::String | ValueType::Array => None,
    }
}

/// The floating-point numbers in `bytes`, the contents of an array of `element`.
pub(super) fn floats(element: ValueType, bytes: &[u8]) -> Option<Vec<f32>> {
    match element {
        ValueType::F32 => Some(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
        ValueType::F64 => Some(bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect()),
        _ => None,
    }
}
