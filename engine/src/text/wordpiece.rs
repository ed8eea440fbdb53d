//! Builds a WordPiece tokenizer, BERT's, from GGUF metadata: `tokenizer.ggml.model` is `bert`.
//!
//! GGUF files spell a word's first piece with `▁` in front and the next ones bare, where BERT's own vocabulary has them
//! bare and with `##`. Everything else is as in transformers' `BertTokenizer`: words of more than 100 characters are
//! unknown, which llama.cpp cuts into pieces.

use tokenizers::{
    decoders::wordpiece::WordPiece as Decoder,
    models::{bpe::Vocab, wordpiece::WordPiece},
    normalizers::BertNormalizer,
    pre_tokenizers::bert::BertPreTokenizer,
    processors::template::{SpecialToken, TemplateProcessing},
};

use crate::{Error, weights::gguf::Gguf};

/// Begins the pieces that begin words.
const WORD: &str = "▁";
/// Begins the pieces within words, in BERT's spelling.
const CONTINUATION: &str = "##";
/// Unknown and control tokens, by the numbers of `tokenizer.ggml.token_type`: spelled as they are.
const BARE_TYPES: [i64; 2] = [2, 3];

/// The vocabulary `tokens` in BERT's spelling. `types`: as in the file, or empty.
pub(super) fn spellings(tokens: &[&str], types: &[i64]) -> Vec<String> {
    let spelling = |(id, token): (usize, &&str)| {
        // Older converters left all of `[unused0]` and the like bare, not control tokens alone.
        let is_bracketed = token.len() > 2 && token.starts_with('[') && token.ends_with(']');
        let is_bare = is_bracketed || types.get(id).is_some_and(|token_type| BARE_TYPES.contains(token_type));
        match token.strip_prefix(WORD) {
            Some(word) => word.to_owned(),
            None if is_bare => (*token).to_owned(),
            None => format!("{CONTINUATION}{token}"),
        }
    };
    tokens.iter().enumerate().map(spelling).collect()
}

/// The tokenizer of the vocabulary `tokens`, in BERT's spelling; special tokens in texts are not looked for.
///
/// Texts are put between CLS and SEP, unless `tokenizer.ggml.add_bos_token` or `add_sep_token` is false. They are
/// lowercased and lose their accents if the vocabulary has no upper-case letters: GGUF has no key that says so.
///
/// # Errors
/// [`Error::Model`] naming the key that does not fit.
pub(super) fn build(gguf: &Gguf, tokens: &[&str]) -> Result<tokenizers::Tokenizer, Error> {
    // Default ids, and keys that stand in for others, as in llama.cpp and its converter.
    let unknown = special_id(gguf, &["unknown"], (100, tokens.len()))?;
    let cls = special_id(gguf, &["cls", "bos"], (101, tokens.len()))?;
    let sep = special_id(gguf, &["seperator", "eos"], (102, tokens.len()))?;
    let fail = |e: &dyn std::fmt::Display| gguf.error(format!("'tokenizer.ggml.tokens': {e}"));

    // Of equal pieces the first has the name.
    let vocab: Vocab = (0..tokens.len()).rev().map(|id| (tokens[id].to_owned(), id as u32)).collect();
    let is_cased = ('A'..='Z').any(|letter| vocab.contains_key(letter.encode_utf8(&mut [0; 4]) as &str));
    let model = WordPiece::builder().vocab(vocab).unk_token(tokens[unknown].to_owned());
    let model = model.continuing_subword_prefix(CONTINUATION.to_owned()).build().map_err(|e| fail(&e))?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_normalizer(Some(BertNormalizer::new(true, true, None, !is_cased))).map_err(|e| fail(&e))?;
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer.with_decoder(Some(Decoder::new(CONTINUATION.to_owned(), true)));

    let is_on = |key: &str| Ok::<_, Error>(gguf.bool(&format!("tokenizer.ggml.{key}"))?.unwrap_or(true));
    let mut template = vec!["$A"];
    if is_on("add_bos_token")? {
        template.insert(0, "CLS");
    }
    if is_on("add_sep_token")? {
        template.push("SEP");
    }
    let special = |name: &str, id: usize| SpecialToken::new(name.into(), vec![id as u32], vec![tokens[id].to_owned()]);
    let special = [special("CLS", cls), special("SEP", sep)].into_iter().collect::<Result<Vec<_>, _>>();
    let mut processor = TemplateProcessing::builder();
    processor.try_single(template).map_err(|e| fail(&e))?.special_tokens(special.map_err(|e| fail(&e))?);
    tokenizer.with_post_processor(Some(processor.build().map_err(|e| fail(&e))?));
    Ok(tokenizer)
}

/// The token that the first of `keys` in the file names, else `default`; of `n_tokens`.
fn special_id(gguf: &Gguf, keys: &[&str], (default, n_tokens): (usize, usize)) -> Result<usize, Error> {
    let keys: Vec<String> = keys.iter().map(|key| format!("tokenizer.ggml.{key}_token_id")).collect();
    let key = keys.iter().find(|key| gguf.contains(key)).unwrap_or(&keys[0]);
    match gguf.integer(key)?.unwrap_or(default) {
        id if id < n_tokens => Ok(id),
        id => Err(gguf.error(format!("'{key}' is {id}, but there are only {n_tokens} tokens"))),
    }
}
