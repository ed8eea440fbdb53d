//! Builds a tokenizer from GGUF metadata (`tokenizer.ggml.*`).

use tokenizers::{
    SplitDelimiterBehavior,
    models::bpe::{BPE, Vocab},
    normalizers::NFC,
    pre_tokenizers::{
        PreTokenizerWrapper,
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::{
    sentencepiece,
    tokenizer::{SpecialTokens, added_token},
    wordpiece,
};
use crate::{Error, weights::gguf::Gguf};

/// How text is cut before byte-pair encoding, by `tokenizer.ggml.pre`.
struct PreTokenizer {
    /// Values of `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    steps: &'static [Step],
    /// Words that are tokens as a whole are not built from merges.
    ignore_merges: bool,
    /// Text is composed first (Unicode NFC).
    nfc: bool,
    /// Whether prompts begin with BOS when the file does not say.
    add_bos: bool,
}

/// One pass over the pieces so far.
enum Step {
    /// Matches of this expression become pieces of their own.
    Regex(&'static str),
    /// Every digit becomes a piece of its own.
    Digits,
    /// GPT-2's expression, built into `tokenizers`.
    Gpt2,
}

/// The rows agree with the models' own tokenizer.json; `default` with llama.cpp's fallback.
const PRE_TOKENIZERS: &[PreTokenizer] = &[
    PreTokenizer {
        names: &["default"],
        steps: &[
            Step::Regex(r"[\p{P}\$\+<=>\^~\|]+"),
            Step::Gpt2,
            Step::Regex(r"\p{N}+"),
            Step::Regex(r"[0-9][0-9][0-9]"),
        ],
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    },
    PreTokenizer { names: &["gpt-2"], steps: &[Step::Gpt2], ignore_merges: false, nfc: false, add_bos: false },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3"],
        steps: &[Step::Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )],
        ignore_merges: true,
        nfc: false,
        add_bos: true,
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen"],
        steps: &[Step::Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )],
        ignore_merges: false,
        nfc: true,
        add_bos: false,
    },
    PreTokenizer {
        names: &["smollm"],
        steps: &[Step::Digits, Step::Gpt2],
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    },
];

/// Control tokens that end a turn, beside those that the file names (as llama.cpp finds them).
const END_OF_TURN: [&str; 7] =
    ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>"];

/// Token types of `tokenizer.ggml.token_type` (llama.cpp's `llama_token_type`).
const TYPE_UNKNOWN: i64 = 2;
const TYPE_CONTROL: i64 = 3;
const TYPE_USER_DEFINED: i64 = 4;

/// The tokenizer and special tokens of `gguf`.
///
/// # Errors
/// [`Error::Model`] naming the key that is missing or not supported.
pub(super) fn build(gguf: &Gguf) -> Result<(tokenizers::Tokenizer, SpecialTokens), Error> {
    let model = gguf.string("tokenizer.ggml.model")?;
    let model =
        model.ok_or_else(|| gguf.error("metadata key 'tokenizer.ggml.model' is missing: no tokenizer inside"))?;
    let mut tokens = required_list(gguf, "tokenizer.ggml.tokens")?;
    let types = token_types(gguf, tokens.len())?;
    let spellings;
    // Whether prompts begin with BOS, and end with EOS, when the file does not say; `None` where the tokenizer itself
    // knows.
    let (mut tokenizer, adds) = match model {
        "gpt2" => {
            let pre = pre_tokenizer(gguf)?;
            (byte_level(gguf, &tokens, pre)?, Some((pre.add_bos, false)))
        }
        "llama" => (sentencepiece::build(gguf, &tokens, &types)?, Some((true, false))),
        "bert" => {
            spellings = wordpiece::spellings(&tokens, &types);
            tokens = spellings.iter().map(String::as_str).collect();
            (wordpiece::build(gguf, &tokens)?, None)
        }
        _ => {
            return Err(gguf.error(format!(
                "tokenizer model '{model}' is not supported; supported are 'gpt2' (byte-level BPE), 'llama' \
                 (SentencePiece) and 'bert' (WordPiece)"
            )));
        }
    };
    let control = add_tokens(gguf, &mut tokenizer, (&tokens, &types))?;
    Ok((tokenizer, special_tokens(gguf, &tokens, &control, adds)?))
}

fn required_list<'a>(gguf: &'a Gguf, key: &str) -> Result<Vec<&'a str>, Error> {
    gguf.strings(key)?.ok_or_else(|| gguf.error(format!("metadata key '{key}' is missing")))
}

/// The type of each token; empty if the file does not say.
fn token_types(gguf: &Gguf, n_tokens: usize) -> Result<Vec<i64>, Error> {
    let types = gguf.integers("tokenizer.ggml.token_type")?.unwrap_or_default();
    if !types.is_empty() && types.len() != n_tokens {
        return Err(
            gguf.error(format!("'tokenizer.ggml.token_type' has {} entries for {n_tokens} tokens", types.len()))
        );
    }
    Ok(types)
}

/// A byte-level BPE tokenizer, without special tokens.
fn byte_level(gguf: &Gguf, tokens: &[&str], pre: &PreTokenizer) -> Result<tokenizers::Tokenizer, Error> {
    let vocab: Vocab = tokens.iter().zip(0..).map(|(token, id)| ((*token).to_owned(), id)).collect();
    let merges = required_list(gguf, "tokenizer.ggml.merges")?.into_iter().map(|merge| {
        // The first space may be a character of the left part's own; a merge has at least one character a side.
        let cut = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(i, _)| i);
        let parts = cut.map(|i| (merge[..i].to_owned(), merge[i + 1..].to_owned())).ok_or_else(|| {
            gguf.error(format!("'tokenizer.ggml.merges': '{merge}' is not two parts with a space between"))
        })?;
        // `tokenizers` would panic on a result longer than any token.
        if !vocab.contains_key(&format!("{}{}", parts.0, parts.1)) {
            return Err(gguf.error(format!(
                "vocabulary and merges do not fit together: 'tokenizer.ggml.merges' has '{merge}', whose result is no \
                 token"
            )));
        }
        Ok(parts)
    });
    let merges = merges.collect::<Result<_, _>>()?;
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(pre.ignore_merges);
    let bpe = bpe.build().map_err(|e| gguf.error(format!("vocabulary and merges do not fit together: {e}")))?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(steps(pre).map_err(|e| gguf.error(format!("pre-tokenizer: {e}")))?));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    if pre.nfc {
        tokenizer.with_normalizer(Some(NFC)).map_err(|e| gguf.error(format!("normalizer: {e}")))?;
    }
    Ok(tokenizer)
}

fn pre_tokenizer(gguf: &Gguf) -> Result<&'static PreTokenizer, Error> {
    // Files made before the key existed are cut as llama.cpp cuts them.
    let name = gguf.string("tokenizer.ggml.pre")?.unwrap_or("default");
    PRE_TOKENIZERS.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
        let supported: Vec<_> = PRE_TOKENIZERS.iter().flat_map(|pre| pre.names).copied().collect();
        gguf.error(format!("pre-tokenizer '{name}' is not supported; supported are {}", supported.join(", ")))
    })
}

fn steps(pre: &PreTokenizer) -> Result<PreTokenizerWrapper, tokenizers::Error> {
    let ends_with_gpt2 = matches!(pre.steps.last(), Some(Step::Gpt2));
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for (i, step) in pre.steps.iter().enumerate() {
        steps.push(match step {
            Step::Digits => Digits::new(true).into(),
            Step::Regex(regex) => isolate(regex)?,
            // `ByteLevel` also turns bytes to characters, which later steps must not see.
            Step::Gpt2 if i + 1 < pre.steps.len() => {
                isolate(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")?
            }
            Step::Gpt2 => ByteLevel::new(false, true, true).into(),
        });
    }
    if !ends_with_gpt2 {
        steps.push(ByteLevel::new(false, true, false).into());
    }
    Ok(Sequence::new(steps).into())
}

fn isolate(regex: &str) -> Result<PreTokenizerWrapper, tokenizers::Error> {
    Ok(Split::new(SplitPattern::Regex(regex.to_owned()), SplitDelimiterBehavior::Isolated, false)?.into())
}

/// Makes the tokens that are matched before byte-pair encoding; returns the ids of the control tokens.
fn add_tokens(
    gguf: &Gguf,
    tokenizer: &mut tokenizers::Tokenizer,
    (tokens, types): (&[&str], &[i64]),
) -> Result<Vec<u32>, Error> {
    let of_type = |wanted: &[i64]| {
        let ids = types.iter().enumerate().filter(|(_, token_type)| wanted.contains(token_type));
        ids.map(|(id, _)| id).filter(|&id| !tokens[id].is_empty()).collect::<Vec<usize>>()
    };
    let control = of_type(&[TYPE_UNKNOWN, TYPE_CONTROL]);
    let fail = |e: tokenizers::Error| gguf.error(format!("'tokenizer.ggml.token_type': {e}"));
    tokenizer.add_special_tokens(control.iter().map(|&id| added_token(tokens[id], true))).map_err(fail)?;
    let user_defined = of_type(&[TYPE_USER_DEFINED]);
    tokenizer.add_tokens(user_defined.iter().map(|&id| added_token(tokens[id], false))).map_err(fail)?;
    Ok(control.iter().map(|&id| id as u32).collect())
}

fn special_tokens(
    gguf: &Gguf,
    tokens: &[&str],
    control: &[u32],
    adds: Option<(bool, bool)>,
) -> Result<SpecialTokens, Error> {
    let id_at = |key: &str| -> Result<Option<u32>, Error> {
        match gguf.integer(key)? {
            Some(id) if id >= tokens.len() => {
                Err(gguf.error(format!("'{key}' is {id}, but there are only {} tokens", tokens.len())))
            }
            id => Ok(id.map(|id| id as u32)),
        }
    };
    let mut special = SpecialTokens { bos: id_at("tokenizer.ggml.bos_token_id")?, ..SpecialTokens::default() };
    if let Some((add_bos, add_eos)) = adds {
        special.add_bos = Some(gguf.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos));
        special.add_eos = gguf.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(add_eos);
    }
    for (field, key) in [
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("unk_token", "unknown"),
        ("pad_token", "padding"),
        ("sep_token", "seperator"),
        ("cls_token", "cls"),
    ] {
        if let Some(id) = id_at(&format!("tokenizer.ggml.{key}_token_id"))? {
            special.texts.insert(field.to_owned(), tokens[id as usize].to_owned());
        }
    }
    let named = ["eos", "eot", "eom"].map(|key| id_at(&format!("tokenizer.ggml.{key}_token_id")));
    let named = named.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().flatten();
    let found = control.iter().copied().filter(|&id| END_OF_TURN.contains(&tokens[id as usize]));
    for id in named.chain(found) {
        if !special.eos.contains(&id) {
            special.eos.push(id);
        }
    }
    Ok(special)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        text::{Tokenizer, token_table::char_of_byte},
        weights::gguf::writer::GgufWriter,
    };

    /// 256 bytes, a few digits that merge, `<s>` and a user-defined token.
    fn file(pre: &str) -> GgufWriter {
        let bytes: Vec<String> = (0..=255).map(|byte| char_of_byte(byte).to_string()).collect();
        let mut tokens: Vec<&str> = bytes.iter().map(String::as_str).collect();
        tokens.extend(["12", "123", "1234", "45", "<s>", "<|eot_id|>", "<mine>"]);
        let mut types = vec![1; tokens.len()];
        types[260..].copy_from_slice(&[3, 3, 4]);
        let mut w = GgufWriter::default();
        w.string("tokenizer.ggml.model", "gpt2").string("tokenizer.ggml.pre", pre);
        w.strings("tokenizer.ggml.tokens", &tokens).i32s("tokenizer.ggml.token_type", &types);
        w.strings("tokenizer.ggml.merges", &["1 2", "12 3", "123 4", "4 5"]);
        w.u32("tokenizer.ggml.bos_token_id", 260).u32("tokenizer.ggml.eos_token_id", 260);
        w
    }

    fn open(w: &GgufWriter) -> Result<Tokenizer, Error> {
        Tokenizer::from_gguf(&Gguf::open(w.file().path()).expect("a valid header"))
    }

    #[test]
    fn every_pre_tokenizer_cuts_numbers_in_its_way() {
        let cases = [
            ("default", vec!["123", "45"]),
            ("gpt-2", vec!["1234", "5"]),
            ("llama-bpe", vec!["123", "45"]),
            ("qwen2", vec!["1", "2", "3", "4", "5"]),
            ("smollm", vec!["1", "2", "3", "4", "5"]),
        ];
        assert_eq!(cases.len(), PRE_TOKENIZERS.len());
        for (pre, expected) in cases {
            let tokenizer = open(&file(pre)).expect("valid");
            let ids = tokenizer.encode("12345", false).expect("encodable");
            let pieces: Vec<_> = ids.iter().filter_map(|&id| tokenizer.token_piece(id)).collect();
            assert_eq!(pieces, expected, "{pre}");
            let text = "It's 12345 naïve\t\u{a0}words,\r\n\n  世界!? e\u{301}<s>";
            let ids = tokenizer.encode(text, false).expect("encodable");
            let expected = if pre == "qwen2" { text.replace("e\u{301}", "é") } else { text.to_owned() };
            assert_eq!(tokenizer.decode(&ids, false).expect("decodable"), expected, "{pre}");
        }
    }

    #[test]
    fn special_tokens_are_found() {
        let llama = open(&file("llama-bpe")).expect("valid");
        assert_eq!(llama.encode("A", true).expect("encodable"), [260, 65]);
        assert_eq!(llama.encode("A", false).expect("encodable"), [65]);
        assert_eq!(llama.encode_with_special("<s>A<mine>").expect("encodable"), [260, 65, 262]);
        // User-defined tokens are no special ones: plain text has them too, and they are shown.
        assert_eq!(llama.encode("<s>", false).expect("encodable").len(), 3);
        assert_eq!(llama.encode("<mine>", false).expect("encodable"), [262]);
        assert_eq!(llama.decode(&[260, 262], true).expect("decodable"), "<mine>");
        assert_eq!(llama.eos_token_ids(), [260, 261]);
        let mut without = file("llama-bpe");
        without.bool("tokenizer.ggml.add_bos_token", false);
        assert_eq!(open(&without).expect("valid").encode("A", true).expect("encodable"), [65]);
        assert_eq!(open(&file("qwen2")).expect("valid").encode("A", true).expect("encodable"), [65]);
    }

    #[test]
    fn unusable_metadata_are_named() {
        let check = |edit: &dyn Fn(&mut GgufWriter), expected: &str| {
            let mut w = file("smollm");
            edit(&mut w);
            let message = open(&w).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains(expected), "{message:?} lacks {expected:?}");
        };
        let text = |s: &str| [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat();
        check(&|w| w.replace("tokenizer.ggml.model", 8, &text("t5")), "'t5' is not supported; supported are 'gpt2'");
        check(
            &|w| w.replace("tokenizer.ggml.pre", 8, &text("odd")),
            "'odd' is not supported; supported are default, gpt-2",
        );
        check(
            &|w| w.replace("tokenizer.ggml.tokens", 8, &text("x")),
            "'tokenizer.ggml.tokens' must be an array of strings",
        );
        check(
            &|w| w.replace("tokenizer.ggml.bos_token_id", 4, &999u32.to_le_bytes()),
            "is 999, but there are only 263",
        );
        let one_type = [5u32.to_le_bytes().as_slice(), &1u64.to_le_bytes(), &[0; 4]].concat();
        check(&|w| w.replace("tokenizer.ggml.token_type", 9, &one_type), "has 1 entries for 263 tokens");
        let array = |s: &str| [&8u32.to_le_bytes()[..], &1u64.to_le_bytes(), &text(s)].concat();
        check(&|w| w.replace("tokenizer.ggml.merges", 9, &array("ab")), "'ab' is not two parts");
        check(&|w| w.replace("tokenizer.ggml.merges", 9, &array("a bcd")), "do not fit together");
        // Both parts are tokens, their result is longer than any.
        check(&|w| w.replace("tokenizer.ggml.merges", 9, &array("<|eot_id|> <|eot_id|>")), "do not fit together");
    }
}
