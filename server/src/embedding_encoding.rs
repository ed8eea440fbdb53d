//! [`EmbeddingEncoding`]: how vectors are written.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use ember_common::openai::{EmbeddingFields, EmbeddingValue};
use half::{bf16, f16};

use crate::ApiError;

/// How vectors are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmbeddingEncoding {
    /// As numbers.
    Floats,
    /// As bytes in base64.
    Base64 {
        /// Of an element.
        dtype: EmbeddingDType,
        /// The most significant byte first.
        is_big_endian: bool,
    },
}

/// Element type of vectors as bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum EmbeddingDType {
    Float32,
    Float16,
    BFloat16,
}

impl EmbeddingEncoding {
    /// From a request's fields. Type and order of bytes say nothing where vectors are numbers, but must be right.
    ///
    /// # Errors
    /// Status 400 naming the field.
    pub fn of(fields: &EmbeddingFields) -> Result<Self, ApiError> {
        let dtype = match fields.embed_dtype.as_deref() {
            None | Some("float32") => EmbeddingDType::Float32,
            Some("float16") => EmbeddingDType::Float16,
            Some("bfloat16") => EmbeddingDType::BFloat16,
            Some(_) => {
                return Err(ApiError::invalid(
                    "embed_dtype",
                    "embed_dtype must be `float32`, `float16` or `bfloat16`.",
                ));
            }
        };
        let is_big_endian = match fields.endianness.as_deref() {
            None | Some("native") => cfg!(target_endian = "big"),
            Some("little") => false,
            Some("big") => true,
            Some(_) => return Err(ApiError::invalid("endianness", "endianness must be `native`, `little` or `big`.")),
        };
        match fields.encoding_format.as_deref() {
            None | Some("float") => Ok(Self::Floats),
            Some("base64") => Ok(Self::Base64 { dtype, is_big_endian }),
            Some(_) => Err(ApiError::invalid("encoding_format", "encoding_format must be `float` or `base64`.")),
        }
    }

    /// `vector` as it goes on the wire.
    pub fn value(self, vector: Vec<f32>) -> EmbeddingValue {
        let Self::Base64 { dtype, is_big_endian } = self else {
            return EmbeddingValue::Floats(vector);
        };
        let mut bytes = Vec::with_capacity(vector.len() * size_of::<f32>());
        for x in vector {
            let start = bytes.len();
            match dtype {
                EmbeddingDType::Float32 => bytes.extend(x.to_le_bytes()),
                EmbeddingDType::Float16 => bytes.extend(f16::from_f32(x).to_le_bytes()),
                EmbeddingDType::BFloat16 => bytes.extend(bf16::from_f32(x).to_le_bytes()),
            }
            if is_big_endian {
                bytes[start..].reverse();
            }
        }
        EmbeddingValue::Base64(BASE64_STANDARD.encode(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_the_type_and_the_order_that_were_asked_for() {
        let check = |dtype, is_big_endian, expected: &[u8]| {
            let value = EmbeddingEncoding::Base64 { dtype, is_big_endian }.value(vec![1.0, -0.5]);
            assert_eq!(value, EmbeddingValue::Base64(BASE64_STANDARD.encode(expected)));
        };
        check(EmbeddingDType::Float32, false, &[0, 0, 0x80, 0x3f, 0, 0, 0, 0xbf]);
        check(EmbeddingDType::Float32, true, &[0x3f, 0x80, 0, 0, 0xbf, 0, 0, 0]);
        check(EmbeddingDType::Float16, false, &[0, 0x3c, 0, 0xb8]);
        check(EmbeddingDType::Float16, true, &[0x3c, 0, 0xb8, 0]);
        check(EmbeddingDType::BFloat16, false, &[0x80, 0x3f, 0, 0xbf]);
    }
}
