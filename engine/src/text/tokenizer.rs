//! [`Tokenizer`]: text to token ids and back, on Hugging Face's `tokenizers`.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, OnceLock},
};

use serde_json::Value;
use tokenizers::{
    AddedToken,
    decoders::byte_level::ByteLevel,
    models::bpe::{BPE, Vocab},
};

use super::{
    gguf_tokenizer,
    token_table::{Spelling, TokenTable, char_of_byte},
};
use crate::{Error, weights::gguf::Gguf};

/// Names of special tokens in tokenizer_config.json that chat templates may use.
const SPECIAL_TOKEN_FIELDS: [&str; 6] = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"];

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    /// Special tokens in the text become their ids.
    parsing: tokenizers::Tokenizer,
    /// Special tokens in the text are plain text. A copy with all tables, so made when the first plain text comes: a
    /// chat server never needs it.
    plain: OnceLock<tokenizers::Tokenizer>,
    table: Arc<TokenTable>,
    /// Token put before every prompt, where `tokenizers`' own post-processor does not.
    prefix: Option<u32>,
    /// The same after every prompt.
    suffix: Option<u32>,
    /// How many tokens are put before and after every prompt.
    n_added: (usize, usize),
    special: SpecialTokens,
}

/// What a model says of its special tokens.
#[derive(Debug, Default)]
pub(super) struct SpecialTokens {
    pub(super) bos: Option<u32>,
    /// The primary one first.
    pub(super) eos: Vec<u32>,
    /// Whether prompts begin with `bos`; `None` leaves it to the post-processor.
    pub(super) add_bos: Option<bool>,
    /// Whether prompts end with the primary one of `eos`; the post-processor may put it there, too.
    pub(super) add_eos: bool,
    /// Variables of chat templates, such as `bos_token`.
    pub(super) texts: BTreeMap<String, String>,
}

impl Tokenizer {
    /// The tokenizer of a Hugging Face folder: tokenizer.json, with tokenizer_config.json's special tokens.
    ///
    /// # Errors
    /// [`Error::Model`] if tokenizer.json is missing, broken or of a kind that Ember does not decode.
    pub fn from_folder(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(Error::model(
                path,
                "the file is missing; download it, or make it from the model's own tokenizer with transformers: \
                 AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)",
            ));
        }
        let mut tokenizer = tokenizers::Tokenizer::from_file(&path)
            .map_err(|e| Error::model(&path, format!("not a valid tokenizer: {e}")))?;
        let limits = tokenizer.with_padding(None).with_truncation(None);
        limits.map_err(|e| Error::model(&path, format!("cannot turn off truncation: {e}")))?;
        let special = special_tokens_of_folder(folder, &tokenizer)?;
        Self::new(tokenizer, special).map_err(|message| Error::model(path, message))
    }

    /// The tokenizer in a GGUF file's metadata.
    ///
    /// # Errors
    /// [`Error::Model`] naming a key that is missing, broken or not supported.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, Error> {
        let (tokenizer, special) = gguf_tokenizer::build(gguf)?;
        Self::new(tokenizer, special).map_err(|message| gguf.error(message))
    }

    /// A stand-in for a model without a tokenizer: ids 0 to 255 are bytes, every other id of the
    /// `vocab_size` decodes to a word of its own.
    ///
    /// # Errors
    /// [`Error::Config`] if the vocabulary cannot hold 256 bytes.
    pub fn byte_level(vocab_size: usize) -> Result<Self, Error> {
        let fail = |message: String| Error::config("--load-format", message);
        if vocab_size < 256 {
            return Err(fail(format!(
                "the model has no tokenizer, and its vocabulary of {vocab_size} is too small for bytes"
            )));
        }
        let bytes = (0..=255u8).map(|byte| (char_of_byte(byte).to_string(), u32::from(byte)));
        let words = (256..vocab_size as u32).map(|id| (format!("{}w{id}", char_of_byte(b' ')), id));
        let vocab: Vocab = bytes.chain(words).collect();
        let model = BPE::builder().vocab_and_merges(vocab, Vec::new()).build().map_err(|e| fail(e.to_string()))?;
        let mut tokenizer = tokenizers::Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, false, false)));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        Self::new(tokenizer, SpecialTokens::default()).map_err(fail)
    }

    fn new(parsing: tokenizers::Tokenizer, special: SpecialTokens) -> Result<Self, String> {
        let decoder = serde_json::to_value(parsing.get_decoder()).map_err(|e| e.to_string())?;
        let spelling = Spelling::of_decoder(&decoder).ok_or_else(|| {
            format!(
                "decoder {} is not supported; supported are ByteLevel, Metaspace, ByteFallback and WordPiece",
                decoder.get("type").unwrap_or(&decoder)
            )
        })?;
        let added = parsing.get_added_tokens_decoder();
        let vocab = parsing.get_vocab(true);
        let n_tokens = vocab.values().max().map_or(0, |&id| id as usize + 1);
        let is_special = |id: u32| added.get(&id).is_some_and(|token| token.special);
        let table =
            TokenTable::new(n_tokens, vocab.into_iter().map(|(token, id)| (id, token, is_special(id))), spelling);
        // A vocabulary that cannot express this text says so when it is used.
        let encode = |add_special_tokens| encode(&parsing, "a", add_special_tokens).unwrap_or_default();
        let (bare, whole) = (encode(false), encode(true));
        let before = whole.windows(bare.len().max(1)).position(|ids| ids == bare).unwrap_or(0);
        let mut n_added = (before, whole.len().saturating_sub(before + bare.len()));
        let eos = special.eos.first().copied();
        let prefix = special.bos.filter(|bos| special.add_bos == Some(true) && whole.first() != Some(bos));
        let suffix = eos.filter(|eos| special.add_eos && whole.last() != Some(eos));
        n_added.0 += usize::from(prefix.is_some());
        n_added.1 += usize::from(suffix.is_some());
        Ok(Self { parsing, plain: OnceLock::new(), table: Arc::new(table), prefix, suffix, n_added, special })
    }

    /// Token ids of the plain text `text`: special tokens in it are not recognised. With
    /// `add_special_tokens`, the model's own (BOS) are added.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if the vocabulary cannot express the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        let plain = self.plain.get_or_init(|| {
            let mut plain = self.parsing.clone();
            plain.set_encode_special_tokens(true);
            plain
        });
        let mut ids = encode(plain, text, add_special_tokens)?;
        if add_special_tokens {
            ids.extend(self.suffix);
            if let Some(prefix) = self.prefix {
                ids.insert(0, prefix);
            }
        }
        Ok(ids)
    }

    /// How many tokens [`Tokenizer::encode`] puts before and after a text with `add_special_tokens`.
    pub fn n_added(&self) -> (usize, usize) {
        self.n_added
    }

    /// Token ids of a text in which special tokens stand for themselves, such as a rendered chat template.
    /// None are added.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if the vocabulary cannot express the text.
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, Error> {
        encode(&self.parsing, text, false)
    }

    /// The text of `ids`; ids without a token are left out, invalid UTF-8 becomes U+FFFD.
    ///
    /// # Errors
    /// None now; the signature allows for decoders that can fail.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, Error> {
        let shown = ids.iter().filter(|&&id| !(skip_special_tokens && self.table.is_special(id)));
        let bytes: Vec<u8> = shown.flat_map(|&id| self.table.bytes(id)).copied().collect();
        let bytes = match bytes.strip_prefix(b" ") {
            Some(rest) if self.table.strips_first_space => rest,
            _ => &bytes,
        };
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    /// The bytes that token `id` adds to a text; none if there is no such token.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.table.bytes(id).to_vec()
    }

    /// Token `id` as it is spelled in the vocabulary, such as `Ġthe`.
    pub fn token_piece(&self, id: u32) -> Option<String> {
        self.parsing.id_to_token(id)
    }

    /// The id of a token as it is spelled in the vocabulary.
    pub fn token_id(&self, piece: &str) -> Option<u32> {
        self.parsing.token_to_id(piece)
    }

    /// Whether token `id` is special, and so left out by `skip_special_tokens`.
    pub fn is_special(&self, id: u32) -> bool {
        self.table.is_special(id)
    }

    /// Token ids are below this; a model's own `vocab_size` may be padded beyond it.
    pub fn vocab_size(&self) -> usize {
        self.table.len()
    }

    /// Tokens that end a sequence, the primary one first.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.special.eos
    }

    /// The token that begins a sequence.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.special.bos
    }

    /// Special tokens by their names in chat templates, such as `bos_token`.
    pub(super) fn special_token_texts(&self) -> &BTreeMap<String, String> {
        &self.special.texts
    }

    pub(crate) fn table(&self) -> &Arc<TokenTable> {
        &self.table
    }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
    let encoding = tokenizer.encode_fast(text, add_special_tokens);
    let encoding = encoding.map_err(|e| Error::invalid("prompt", format!("the prompt cannot be tokenized: {e}")))?;
    Ok(encoding.get_ids().to_vec())
}

/// Special tokens by tokenizer_config.json, else special_tokens_map.json.
fn special_tokens_of_folder(folder: &Path, tokenizer: &tokenizers::Tokenizer) -> Result<SpecialTokens, Error> {
    let files = ["tokenizer_config.json", "special_tokens_map.json"].map(|name| read_json(&folder.join(name)));
    let [config, map] = files;
    let (config, map) = (config?.unwrap_or_default(), map?.unwrap_or_default());
    let mut special = SpecialTokens { add_bos: config["add_bos_token"].as_bool(), ..SpecialTokens::default() };
    for field in SPECIAL_TOKEN_FIELDS {
        // A token is a string or an object with its `content`.
        let text =
            [&config, &map].into_iter().find_map(|file| file[field].as_str().or(file[field]["content"].as_str()));
        if let Some(text) = text {
            special.texts.insert(field.to_owned(), text.to_owned());
        }
    }
    let id_of = |field: &str| special.texts.get(field).and_then(|text| tokenizer.token_to_id(text));
    let (bos, eos) = (id_of("bos_token"), id_of("eos_token"));
    special.bos = bos;
    special.eos.extend(eos);
    Ok(special)
}

/// The JSON file at `path`, if it is there.
pub(super) fn read_json(path: &Path) -> Result<Option<Value>, Error> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read(path).map_err(|e| Error::model(path, format!("cannot read the file: {e}")))?;
    serde_json::from_slice(&text).map(Some).map_err(|e| Error::model(path, format!("not valid JSON: {e}")))
}

/// A token that is matched in the text as it is written.
pub(super) fn added_token(text: &str, special: bool) -> AddedToken {
    AddedToken::from(text, special).normalized(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::test_model::{smollm2_path, smollm2_tokenizer};

    #[test]
    fn smollm2_ids_are_those_of_llama_cpp() {
        #[derive(serde::Deserialize)]
        struct Case {
            text: String,
            plain: Vec<u32>,
            parsed: Vec<u32>,
        }
        // llama.cpp's `/tokenize` on the same file, with `parse_special` off and on.
        let cases: Vec<Case> = serde_json::from_str(include_str!("testdata/smollm2_tokens.json")).expect("valid");
        let tokenizer = smollm2_tokenizer();
        for Case { text, plain, parsed } in cases {
            assert_eq!(tokenizer.encode(&text, true).expect("encodable"), plain, "{text:?}");
            assert_eq!(tokenizer.encode_with_special(&text).expect("encodable"), parsed, "{text:?}");
            assert_eq!(tokenizer.decode(&plain, true).expect("decodable"), text);
            assert_eq!(tokenizer.decode(&parsed, false).expect("decodable"), text);
        }
        assert_eq!(tokenizer.vocab_size(), 49_152);
        assert_eq!(tokenizer.bos_token_id(), Some(1));
        assert_eq!(tokenizer.eos_token_ids(), [2, 0]);
        assert_eq!(tokenizer.token_piece(1).as_deref(), Some("<|im_start|>"));
        assert_eq!(tokenizer.token_id("<|im_end|>"), Some(2));
        assert_eq!(tokenizer.decode(&[1, 504, 2], true).expect("decodable"), "The");
        assert_eq!(tokenizer.token_bytes(216), b" ");
        assert_eq!(tokenizer.token_bytes(1 << 20), b"");
    }

    #[test]
    fn our_decoding_is_that_of_tokenizers() {
        let tokenizer = smollm2_tokenizer();
        let gguf = Gguf::open(&smollm2_path()).expect("valid");
        let (theirs, _) = gguf_tokenizer::build(&gguf).expect("valid");
        // Windows over the vocabulary: broken UTF-8, special tokens and all.
        for start in (0..49_152u32).step_by(97) {
            let ids: Vec<u32> = (0..40).map(|i| (start + i * 1_231) % 49_152).collect();
            for skip in [false, true] {
                let expected = theirs.decode(&ids, skip).expect("decodable");
                assert_eq!(tokenizer.decode(&ids, skip).expect("decodable"), expected, "from {start}");
            }
        }
    }

    /// A folder with tokenizer.json of `model` and the given tokenizer_config.json.
    fn folder(tokenizer: &tokenizers::Tokenizer, config: &Value) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        tokenizer.save(folder.path().join("tokenizer.json"), false).expect("written");
        std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).expect("written");
        folder
    }

    #[test]
    fn a_folder_says_its_special_tokens() {
        let mut inner = Tokenizer::byte_level(300).expect("valid").parsing;
        inner.add_special_tokens([added_token("<s>", true), added_token("</s>", true)]).expect("added");
        let config = serde_json::json!({"add_bos_token": true, "bos_token": "<s>", "eos_token": {"content": "</s>"}});
        let tokenizer = Tokenizer::from_folder(folder(&inner, &config).path()).expect("valid");
        assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_ids()), (Some(300), &[301][..]));
        assert_eq!(tokenizer.encode("A</s>", false).expect("encodable"), b"A</s>".map(u32::from));
        assert_eq!(tokenizer.encode("A", true).expect("encodable"), [300, 65]);
        assert_eq!(tokenizer.encode_with_special("A</s>").expect("encodable"), [65, 301]);
        assert_eq!(tokenizer.decode(&[300, 65, 301], false).expect("decodable"), "<s>A</s>");
        assert_eq!(tokenizer.decode(&[300, 65, 301], true).expect("decodable"), "A");
        assert_eq!(tokenizer.special_token_texts()["eos_token"], "</s>");
        assert!(tokenizer.is_special(301) && !tokenizer.is_special(65));
    }

    #[test]
    fn unusable_tokenizers_say_what_to_do() {
        let empty = tempfile::tempdir().expect("a folder");
        let message = Tokenizer::from_folder(empty.path()).unwrap_err().to_string();
        assert!(message.contains("tokenizer.json: the file is missing; download it"), "{message}");
        std::fs::write(empty.path().join("tokenizer.json"), "{}").expect("written");
        assert!(Tokenizer::from_folder(empty.path()).unwrap_err().to_string().contains("not a valid tokenizer"));

        let mut inner = Tokenizer::byte_level(256).expect("valid").parsing;
        inner.with_decoder(Some(tokenizers::decoders::ctc::CTC::default()));
        let ctc = folder(&inner, &serde_json::json!({}));
        let message = Tokenizer::from_folder(ctc.path()).unwrap_err().to_string();
        assert!(message.contains("decoder \"CTC\" is not supported"), "{message}");
        assert!(Tokenizer::byte_level(255).is_err());
    }

    #[test]
    fn the_stand_in_has_a_word_for_every_id() {
        let tokenizer = Tokenizer::byte_level(1000).expect("valid");
        assert_eq!(tokenizer.vocab_size(), 1000);
        assert_eq!(tokenizer.encode("né", true).expect("encodable"), "né".bytes().map(u32::from).collect::<Vec<_>>());
        assert_eq!(tokenizer.decode(&[110, 999, 300], true).expect("decodable"), "n w999 w300");
    }
}
