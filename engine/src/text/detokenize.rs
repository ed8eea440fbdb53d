//! [`Detokenizer`]: turns one sequence's tokens to text as they come.

use std::sync::Arc;

use super::{Tokenizer, token_table::TokenTable};

/// Incremental decoding of one sequence. Text once given out never changes: bytes of a character that is not
/// whole yet are held back.
///
/// The pieces of a sequence, [`Detokenizer::finish`] included, join to [`Tokenizer::decode`] of its tokens,
/// except that a SentencePiece leading space is kept, since output continues a prompt.
#[derive(Debug)]
pub struct Detokenizer {
    table: Arc<TokenTable>,
    skip_special_tokens: bool,
    /// The bytes of an unfinished character, at most three.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// A decoder for one sequence of `tokenizer`'s tokens.
    pub fn new(tokenizer: &Tokenizer, skip_special_tokens: bool) -> Self {
        Self { table: tokenizer.table().clone(), skip_special_tokens, pending: Vec::new() }
    }

    /// Appends to `out` the text that token `id` completes.
    pub fn push(&mut self, id: u32, out: &mut String) {
        if self.skip_special_tokens && self.table.is_special(id) {
            return;
        }
        let bytes = self.table.bytes(id);
        if self.pending.is_empty() {
            self.pending.extend_from_slice(push_lossy(bytes, out));
        } else {
            let mut joined = std::mem::take(&mut self.pending);
            joined.extend_from_slice(bytes);
            self.pending.extend_from_slice(push_lossy(&joined, out));
        }
    }

    /// Appends what was held back: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            self.pending.clear();
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Appends `bytes` to `out`, each invalid sequence as U+FFFD, and returns an unfinished character at the end.
fn push_lossy<'a>(bytes: &'a [u8], out: &mut String) -> &'a [u8] {
    let mut rest = bytes;
    loop {
        match std::str::from_utf8(rest) {
            Ok(text) => {
                out.push_str(text);
                return &[];
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                out.push_str(&String::from_utf8_lossy(valid));
                let Some(n_invalid) = error.error_len() else {
                    return after;
                };
                out.push(char::REPLACEMENT_CHARACTER);
                rest = &after[n_invalid..];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(tokenizer: &Tokenizer, ids: &[u32], skip: bool) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(tokenizer, skip);
        let mut pieces: Vec<String> = ids
            .iter()
            .map(|&id| {
                let mut piece = String::new();
                detokenizer.push(id, &mut piece);
                piece
            })
            .collect();
        let mut last = String::new();
        detokenizer.finish(&mut last);
        pieces.push(last);
        pieces
    }

    #[test]
    fn characters_come_whole() {
        let tokenizer = Tokenizer::byte_level(300).expect("valid");
        let ids: Vec<u32> = tokenizer.encode("é🙂", false).expect("encodable");
        assert_eq!(ids.len(), 6);
        assert_eq!(pieces(&tokenizer, &ids, true), ["", "é", "", "", "", "🙂", ""]);
        // Cut short, then broken.
        assert_eq!(pieces(&tokenizer, &ids[..3], true), ["", "é", "", "\u{fffd}"]);
        assert_eq!(pieces(&tokenizer, &[ids[2], ids[0], ids[1]], true), ["", "\u{fffd}", "é", ""]);
        // An id outside the vocabulary is no text.
        assert_eq!(pieces(&tokenizer, &[u32::MAX, 70_000], true), ["", "", ""]);
    }

    proptest! {
        #[test]
        fn pieces_join_to_the_whole(ids in prop::collection::vec(0u32..300, 0..64), skip in any::<bool>()) {
            let tokenizer = Tokenizer::byte_level(280).expect("valid");
            prop_assert_eq!(pieces(&tokenizer, &ids, skip).concat(), tokenizer.decode(&ids, skip).expect("decodable"));
        }
    }
}
