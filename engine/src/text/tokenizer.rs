//! [`Tokenizer`]: text to token ids and back, on Hugging Face's `tokenizers`.

use std::{collections::BTreeMap, path::Path, sync::Arc};

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
const SPECIAL_TOKEN_FIELDS: [&str; 6] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
];

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    /// Special tokens in the text become their ids.
    parsing: tokenizers::Tokenizer,
    /// Special tokens in the text are plain text.
    plain: tokenizers::Tokenizer,
    table: Arc<TokenTable>,
    /// Token put before every prompt, where `tokenizers`' own post-processor does not.
    prefix: Option<u32>,
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
        let model = BPE::builder()
            .vocab_and_merges(vocab, Vec::new())
            .build()
            .map_err(|e| fail(e.to_string()))?;
        let mut tokenizer = tokenizers::Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, false, false)));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        Self::new(tokenizer, SpecialTokens::default()).map_err(fail)
    }

    fn new(parsing: tokenizers::Tokenizer, special: SpecialTokens) -> Result<Self, String> {
        let decoder = serde_json::to_value(parsing.get_decoder()).map_err(|e| e.to_string())?;
        let spelling = Spelling::of_decoder(&decoder).ok_or_else(|| {
            format!(
                "decoder {} is not supported; supported are ByteLevel, Metaspace and ByteFallback",
                decoder.get("type").unwrap_or(&decoder)
            )
        })?;
        let added = parsing.get_added_tokens_decoder();
        let vocab = parsing.get_vocab(true);
        let n_tokens = vocab.values().max().map_or(0, |&id| id as usize + 1);
        let is_special = |id: u32| added.get(&id).is_some_and(|token| token.special);
        let table = TokenTable::new(
            n_tokens,
            vocab
                .into_iter()
                .map(|(token, id)| (id, token, is_special(id))),
            spelling,
        );
        let mut plain = parsing.clone();
        plain.set_encode_special_tokens(true);
        let mut tokenizer = Self {
            parsing,
            plain,
            table: Arc::new(table),
            prefix: None,
            special,
        };
        if tokenizer.special.add_bos == Some(true) {
            let begins_with = tokenizer
                .encode("a", true)
                .map_err(|e| e.to_string())?
                .first()
                .copied();
            tokenizer.prefix = tokenizer
                .special
                .bos
                .filter(|&bos| begins_with != Some(bos));
        }
        Ok(tokenizer)
    }

    /// Token ids of the plain text `text`: special tokens in it are not recognised. With
    /// `add_special_tokens`, the model's own (BOS) are added.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if the vocabulary cannot express the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        let mut ids = encode(&self.plain, text, add_special_tokens)?;
        if let (true, Some(prefix)) = (add_special_tokens, self.prefix) {
            ids.insert(0, prefix);
        }
        Ok(ids)
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
        let shown = ids
            .iter()
            .filter(|&&id| !(skip_special_tokens && self.table.is_special(id)));
        let bytes: Vec<u8> = shown
            .flat_map(|&id| self.table.bytes(id))
            .copied()
            .collect();
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

    pub(super) fn table(&self) -> &Arc<TokenTable> {
        &self.table
    }
}

fn encode(
    tokenizer: &tokenizers::Tokenizer,
    text: &str,
    add_special_tokens: bool,
) -> Result<Vec<u32>, Error> {
    let encoding = tokenizer.encode_fast(text, add_special_tokens);
    let encoding = encoding
        .map_err(|e| Error::invalid("prompt", format!("the prompt cannot be tokenized: {e}")))?;
    Ok(encoding.get_ids().to_vec())
}

/// Special tokens by tokenizer_config.json, else special_tokens_map.json.
fn special_tokens_of_folder(
    folder: &Path,
    tokenizer: &tokenizers::Tokenizer,
) -> Result<SpecialTokens, Error> {
    let files = ["tokenizer_config.json", "special_tokens_map.json"]
        .map(|name| read_json(&folder.join(name)));
    let [config, map] = files;
    let (config, map) = (config?.unwrap_or_default(), map?.unwrap_or_default());
    let mut special = SpecialTokens {
        add_bos: config["add_bos_token"].as_bool(),
        ..SpecialTokens::default()
    };
    for field in SPECIAL_TOKEN_FIELDS {
        // A token is a string or an object with its `content`.
        let text = [&config, &map]
            .into_iter()
            .find_map(|file| file[field].as_str().or(file[field]["content"].as_str()));
        if let Some(text) = text {
            special.texts.insert(field.to_owned(), text.to_owned());
        }
    }
    let id_of = |field: &str| {
        special
            .texts
            .get(field)
            .and_then(|text| tokenizer.token_to_id(text))
    };
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
    let text = std::fs::read(path)
        .map_err(|e| Error::model(path, format!("cannot read the file: {e}")))?;
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|e| Error::model(path, format!("not valid JSON: {e}")))
}

/// A token that is matched in the text as it is written.
pub(super) fn added_token(text: &str, special: bool) -> AddedToken {
    AddedToken::from(text, special).normalized(false)
}
