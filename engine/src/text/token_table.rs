//! [`TokenTable`]: the bytes that each token stands for, so that decoding is a copy.

use serde_json::Value;

/// Bytes of every token and whether it is special. Built once per model.
#[derive(Debug)]
pub(crate) struct TokenTable {
    /// Bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// `[n_tokens + 1]`: where a token's bytes begin and its predecessor's end.
    starts: Vec<u32>,
    special: Vec<bool>,
    /// A decoded text loses one leading space (SentencePiece's dummy prefix).
    pub(super) strips_first_space: bool,
}

/// How tokens are written in a vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's: each byte is a printable character.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0xAB>` a byte.
    SentencePiece {
        /// See [`TokenTable::strips_first_space`].
        strips_first_space: bool,
    },
    /// BERT's: a word's first piece is spelled as it is, the next ones begin with `##`. Decoded, words are a space
    /// apart; the spaces that were around punctuation are not known.
    WordPiece,
}

impl Spelling {
    /// The spelling that tokenizer.json's `decoder` undoes, if Ember knows it.
    pub(super) fn of_decoder(decoder: &Value) -> Option<Self> {
        let steps: Vec<&Value> = match decoder.get("decoders").and_then(Value::as_array) {
            Some(steps) => steps.iter().collect(),
            None => vec![decoder],
        };
        let step = |kind: &str| steps.iter().find(|s| s.get("type").and_then(Value::as_str) == Some(kind));
        if step("ByteLevel").is_some() {
            return Some(Self::ByteLevel);
        }
        if let Some(metaspace) = step("Metaspace") {
            let never = metaspace.get("prepend_scheme").and_then(Value::as_str) == Some("never");
            return Some(Self::SentencePiece { strips_first_space: !never });
        }
        if step("WordPiece").is_some() {
            return Some(Self::WordPiece);
        }
        step("ByteFallback").map(|_| Self::SentencePiece { strips_first_space: step("Strip").is_some() })
    }

    /// Whether a decoded text loses its first space.
    fn strips_first_space(self) -> bool {
        matches!(self, Self::WordPiece | Self::SentencePiece { strips_first_space: true })
    }

    fn bytes_of(self, token: &str) -> Vec<u8> {
        match self {
            Self::WordPiece => match token.strip_prefix("##") {
                Some(rest) if !rest.is_empty() => rest.into(),
                _ => format!(" {token}").into_bytes(),
            },
            // As in `tokenizers`, a token with a character outside the alphabet is plain text.
            Self::ByteLevel => token.chars().map(byte_of_char).collect::<Option<_>>().unwrap_or_else(|| token.into()),
            Self::SentencePiece { .. } => match token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')) {
                Some(hex) if hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok() => {
                    u8::from_str_radix(hex, 16).into_iter().collect()
                }
                _ => token.replace('▁', " ").into_bytes(),
            },
        }
    }
}

impl TokenTable {
    /// A table of `tokens` (id, spelled token, whether special); ids without a token decode to nothing.
    pub(super) fn new(
        n_tokens: usize,
        tokens: impl IntoIterator<Item = (u32, String, bool)>,
        spelling: Spelling,
    ) -> Self {
        let mut all = vec![(Vec::new(), false); n_tokens];
        for (id, token, special) in tokens {
            if let Some(entry) = all.get_mut(id as usize) {
                *entry = (spelling.bytes_of(&token), special);
            }
        }
        let mut table = Self {
            bytes: Vec::new(),
            starts: vec![0],
            special: all.iter().map(|(_, special)| *special).collect(),
            strips_first_space: spelling.strips_first_space(),
        };
        for (bytes, _) in all {
            table.bytes.extend(bytes);
            table.starts.push(table.bytes.len() as u32);
        }
        table
    }

    /// Token ids are below this.
    pub(crate) fn len(&self) -> usize {
        self.special.len()
    }

    /// Bytes of token `id`; none if there is no such token.
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        match self.starts.get(id as usize..id as usize + 2) {
            Some(&[start, end]) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    /// Whether token `id` is special.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }
}

/// GPT-2's printable character of a byte (`bytes_to_unicode` in its encoder.py).
pub(super) fn char_of_byte(byte: u8) -> char {
    let shifted = match byte {
        0..=32 => 256 + u32::from(byte),
        127..=160 => 256 + 33 + u32::from(byte) - 127,
        173 => 256 + 33 + 34,
        _ => u32::from(byte),
    };
    char::from_u32(shifted).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// Inverse of [`char_of_byte`].
fn byte_of_char(c: char) -> Option<u8> {
    match c as u32 {
        n @ (33..=126 | 161..=172 | 174..=255) => Some(n as u8),
        n @ 256..=288 => Some((n - 256) as u8),
        n @ 289..=322 => Some((n - 289 + 127) as u8),
        323 => Some(173),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        let alphabet: std::collections::HashSet<char> = (0..=255).map(char_of_byte).collect();
        let theirs: std::collections::HashSet<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        assert_eq!(alphabet, theirs);
        for byte in 0..=255 {
            assert_eq!(byte_of_char(char_of_byte(byte)), Some(byte));
        }
        assert_eq!((char_of_byte(b' '), char_of_byte(b'\n')), ('Ġ', 'Ċ'));
        assert_eq!(byte_of_char('世'), None);
    }

    #[test]
    fn tokens_are_spelled_as_their_decoder_says() {
        let byte_level = Spelling::of_decoder(&serde_json::json!({"type": "ByteLevel"})).expect("known");
        assert_eq!(byte_level.bytes_of("Ġhé"), [b' ', b'h', 0xe9]);
        assert_eq!(byte_level.bytes_of("<|世|>"), "<|世|>".as_bytes());
        let llama2 = serde_json::json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let pieces = Spelling::of_decoder(&llama2).expect("known");
        assert_eq!(pieces, Spelling::SentencePiece { strips_first_space: true });
        assert_eq!(pieces.bytes_of("▁hé"), " hé".as_bytes());
        assert_eq!(pieces.bytes_of("<0xE9>"), [0xe9]);
        assert_eq!(pieces.bytes_of("<0x1>"), b"<0x1>");
        let word_pieces =
            Spelling::of_decoder(&serde_json::json!({"type": "WordPiece", "prefix": "##"})).expect("known");
        assert_eq!(
            [word_pieces.bytes_of("light"), word_pieces.bytes_of("##house")],
            [b" light".to_vec(), b"house".to_vec()]
        );
        assert_eq!(Spelling::of_decoder(&serde_json::json!({"type": "BPEDecoder"})), None);
    }
}
