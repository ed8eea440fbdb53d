//! Builds a SentencePiece tokenizer from GGUF metadata: `tokenizer.ggml.model` is `llama`.
//!
//! SentencePiece's BPE joins, again and again, the neighbours that make the piece of the highest score. `tokenizers` has
//! the same algorithm with a list of merges in place of scores, so each piece becomes the merges of all pairs of pieces
//! that spell it, best score first, as transformers' converter makes them. Its Unigram model looks for the likeliest cut
//! of the whole text instead, which llama.cpp does for vocabularies of the kind `t5`, never for `llama`.

use std::cmp::Reverse;

use tokenizers::{
    decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders, strip::Strip},
    models::bpe::{BPE, Merges, Vocab},
    normalizers::{Prepend, Replace, Sequence as Normalizers},
};

use crate::{Error, weights::gguf::Gguf};

/// Ordinary pieces, by the numbers of `tokenizer.ggml.token_type`: the only ones that are built from merges.
const TYPE_NORMAL: i64 = 1;
/// Longer pieces are not built, so that a hostile file cannot make loading slow. Real ones are below 100 bytes.
const MAX_PIECE_BYTES: usize = 1024;
/// SentencePiece's sign for a space.
const SPACE: &str = "▁";

/// The tokenizer of the vocabulary `tokens`, without special tokens.
///
/// As in llama.cpp and transformers' "legacy" mode, each stretch of text between special or user-defined tokens begins
/// with a space of its own, unless `tokenizer.ggml.add_space_prefix` is false.
///
/// # Errors
/// [`Error::Model`] naming the key that is missing or does not fit.
pub(super) fn build(gguf: &Gguf, tokens: &[&str], types: &[i64]) -> Result<tokenizers::Tokenizer, Error> {
    let scores = gguf.floats("tokenizer.ggml.scores")?;
    let scores = scores.ok_or_else(|| gguf.error("metadata key 'tokenizer.ggml.scores' is missing"))?;
    if scores.len() != tokens.len() {
        return Err(gguf.error(format!(
            "'tokenizer.ggml.scores' has {} entries for {} tokens",
            scores.len(),
            tokens.len()
        )));
    }
    // llama.cpp's default.
    let unknown = gguf.integer("tokenizer.ggml.unknown_token_id")?.unwrap_or(0);
    let unknown = tokens.get(unknown).ok_or_else(|| {
        gguf.error(format!(
            "'tokenizer.ggml.unknown_token_id' is {unknown}, but there are only {} tokens",
            tokens.len()
        ))
    })?;
    let vocab: Vocab = tokens.iter().zip(0..).map(|(token, id)| ((*token).to_owned(), id)).collect();
    let is_normal = |id: u32| types.get(id as usize).is_none_or(|&token_type| token_type == TYPE_NORMAL);
    let merges = merges(&vocab, &scores, is_normal);
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).unk_token((*unknown).to_owned()).fuse_unk(true);
    let fail = |e: tokenizers::Error| gguf.error(format!("'tokenizer.ggml.tokens': {e}"));
    let mut tokenizer = tokenizers::Tokenizer::new(bpe.byte_fallback(true).build().map_err(fail)?);

    let prefix = gguf.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let spaces = Replace::new(" ", SPACE).map_err(fail)?.into();
    let mut normalizers = vec![spaces];
    let mut decoders =
        vec![Replace::new(SPACE, " ").map_err(fail)?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        normalizers.insert(0, Prepend::new(SPACE.to_owned()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers))).map_err(fail)?;
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(tokenizer)
}

/// All pairs of ordinary pieces that spell an ordinary piece, best score first, then in the order of the left and the
/// right parts' ids.
fn merges(vocab: &Vocab, scores: &[f32], is_normal: impl Fn(u32) -> bool) -> Merges {
    let id_of = |piece: &str| vocab.get(piece).copied().filter(|&id| is_normal(id));
    let mut merges: Vec<(u32, u32, u32, &str, usize)> = Vec::new();
    for (piece, &id) in vocab.iter().filter(|(piece, id)| piece.len() <= MAX_PIECE_BYTES && is_normal(**id)) {
        for (cut, _) in piece.char_indices().skip(1) {
            if let (Some(left), Some(right)) = (id_of(&piece[..cut]), id_of(&piece[cut..])) {
                merges.push((id, left, right, piece, cut));
            }
        }
    }
    let score = |id: u32| scores[id as usize];
    merges.sort_unstable_by(|a, b| {
        score(b.0)
            .total_cmp(&score(a.0))
            .then_with(|| (a.0, a.1, a.2, Reverse(a.4)).cmp(&(b.0, b.1, b.2, Reverse(b.4))))
    });
    merges.into_iter().map(|(.., piece, cut)| (piece[..cut].to_owned(), piece[cut..].to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::{text::Tokenizer, weights::gguf::writer::GgufWriter};

    /// What testdata/sentencepiece_cases.py wrote.
    #[derive(Deserialize)]
    struct Golden {
        tokens: Vec<String>,
        scores: Vec<f32>,
        types: Vec<i32>,
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        text: String,
        ids: Vec<u32>,
        decoded: String,
    }

    fn golden() -> Golden {
        serde_json::from_str(include_str!("testdata/sentencepiece.json")).expect("valid")
    }

    fn file(golden: &Golden) -> GgufWriter {
        let mut w = GgufWriter::default();
        let tokens: Vec<&str> = golden.tokens.iter().map(String::as_str).collect();
        w.string("tokenizer.ggml.model", "llama").strings("tokenizer.ggml.tokens", &tokens);
        w.f32s("tokenizer.ggml.scores", &golden.scores).i32s("tokenizer.ggml.token_type", &golden.types);
        w.u32("tokenizer.ggml.bos_token_id", 1).u32("tokenizer.ggml.eos_token_id", 2);
        w.u32("tokenizer.ggml.unknown_token_id", 0);
        w
    }

    fn open(w: &GgufWriter) -> Result<Tokenizer, Error> {
        Tokenizer::from_gguf(&Gguf::open(w.file().path()).expect("a valid header"))
    }

    #[test]
    fn ids_are_those_of_sentencepiece() {
        let golden = golden();
        let tokenizer = open(&file(&golden)).expect("valid");
        assert!(golden.cases.len() > 60);
        for Case { text, ids, decoded } in &golden.cases {
            assert_eq!(&tokenizer.encode(text, false).expect("encodable"), ids, "{text:?}");
            assert_eq!(&tokenizer.decode(ids, true).expect("decodable"), decoded, "{text:?}");
        }
        assert_eq!(tokenizer.vocab_size(), golden.tokens.len());
        assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_ids()), (Some(1), &[2][..]));
    }

    #[test]
    fn special_tokens_and_the_leading_space_follow_the_file() {
        let golden = golden();
        let id = |piece: &str| golden.tokens.iter().position(|token| token == piece).expect("a piece") as u32;
        let tokenizer = open(&file(&golden)).expect("valid");
        // BOS is added unless the file says no; each stretch of text has a space of its own.
        assert_eq!(tokenizer.encode("the", true).expect("encodable"), [1, id("▁the")]);
        assert_eq!(tokenizer.encode_with_special("<s>the</s>the").expect("encodable"), [1, id("▁the"), 2, id("▁the")]);
        assert_eq!(tokenizer.decode(&[1, id("▁the"), 2], true).expect("decodable"), "the");
        let mut bare = file(&golden);
        bare.bool("tokenizer.ggml.add_space_prefix", false).bool("tokenizer.ggml.add_bos_token", false);
        let bare = open(&bare).expect("valid");
        assert_eq!(bare.encode(" the", true).expect("encodable"), [id("▁the")]);
        assert_eq!(bare.decode(&[id("▁the")], true).expect("decodable"), " the");
        assert_ne!(bare.encode("the", true).expect("encodable"), [id("▁the")]);
    }

    #[test]
    fn what_no_piece_spells_is_unknown() {
        let golden = Golden {
            tokens: ["<unk>", "a", "b", "ab"].map(String::from).to_vec(),
            scores: vec![0.0, -2.0, -3.0, -1.0],
            types: vec![2, 1, 1, 1],
            cases: Vec::new(),
        };
        let mut w = file(&golden);
        w.replace("tokenizer.ggml.eos_token_id", 4, &3u32.to_le_bytes());
        w.bool("tokenizer.ggml.add_space_prefix", false).bool("tokenizer.ggml.add_bos_token", false);
        assert_eq!(open(&w).expect("valid").encode("abzzba", false).expect("encodable"), [3, 0, 2, 1]);
    }

    #[test]
    fn unusable_metadata_are_named() {
        let check = |edit: &dyn Fn(&mut GgufWriter), expected: &str| {
            let mut w = file(&golden());
            edit(&mut w);
            let message = open(&w).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains(expected), "{message:?} lacks {expected:?}");
        };
        let text = |s: &str| [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat();
        check(
            &|w| w.replace("tokenizer.ggml.scores", 8, &text("x")),
            "'tokenizer.ggml.scores' must be an array of numbers",
        );
        let one_score = [6u32.to_le_bytes().as_slice(), &1u64.to_le_bytes(), &[0; 4]].concat();
        check(&|w| w.replace("tokenizer.ggml.scores", 9, &one_score), "'tokenizer.ggml.scores' has 1 entries for 440");
        check(
            &|w| w.replace("tokenizer.ggml.unknown_token_id", 4, &999u32.to_le_bytes()),
            "'tokenizer.ggml.unknown_token_id' is 999",
        );
        let mut without = GgufWriter::default();
        without.string("tokenizer.ggml.model", "llama").strings("tokenizer.ggml.tokens", &["a"]);
        let message = open(&without).unwrap_err().to_string();
        assert!(message.contains("'tokenizer.ggml.scores' is missing"), "{message}");
    }
}
