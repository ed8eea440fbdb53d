//! Owns synthesised datasets: seeded text with the length statistics of the real files, cached on disk.
//!
//! They stand in where the real files cannot be had. Reports call them synthetic: the text is grammatical and varied,
//! but it is not what people wrote.

mod chinese;
mod english;
mod phrases;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use rand::{SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use crate::lengths::Lengths;
use crate::{Error, Result};

/// Goes into file names: files of another generator are not taken from the cache.
const VERSION: u32 = 1;

/// Rows drawn before limits that none has passed are taken for impossible.
const MIN_DRAWS: usize = 4096;
/// Rows drawn for each that is wanted before limits that few pass are taken for too narrow.
const MAX_DRAWS_PER_ROW: usize = 64;

/// A dataset that can be synthesised.
pub struct Kind {
    name: &'static str,
    extension: &'static str,
    /// Rows of the smallest file.
    min_rows: usize,
    /// Draws the prompt of one row.
    prompt: fn(&mut StdRng) -> String,
    /// The row of this number around its prompt.
    row: fn(usize, &str) -> Value,
    /// Text before the first row, between rows, after the last.
    frame: [&'static str; 3],
}

/// HC3-Chinese `open_qa.jsonl`: 3,293 rows.
pub const OPENQA: Kind = Kind {
    name: "openqa",
    extension: "jsonl",
    min_rows: 3293,
    prompt: |rng| {
        let n_tokens = QUESTION_TOKENS.sample(rng);
        chinese::question(rng, n_tokens)
    },
    row: |id, question| json!({"id": id.to_string(), "question": question, "human_answers": [], "chatgpt_answers": []}),
    frame: ["", "\n", "\n"],
};

/// `LongAlpaca-12k.json`, of which as many rows are made as a run needs.
pub const LONGALPACA: Kind = Kind {
    name: "longalpaca",
    extension: "json",
    min_rows: 64,
    prompt: |rng| {
        let n_tokens = INSTRUCTION_TOKENS.sample(rng);
        english::instruction(rng, n_tokens)
    },
    row: |_, instruction| json!({"instruction": instruction, "output": ""}),
    frame: ["[\n", ",\n", "\n]\n"],
};

/// Which rows a file is to have.
pub struct Filter<'a> {
    /// Says the same in file names: files of another filter are not taken from the cache.
    pub tag: String,
    /// Whether a row of this prompt is one of them.
    pub keeps: &'a dyn Fn(&str) -> Result<bool>,
}

/// Question length in tokens. No histogram of the real file is published: fitted to its known mean of about 22.
const QUESTION_TOKENS: Lengths = Lengths::LogNormal { median: 18.0, sigma: 0.6, min: 4, max: 100 };

/// Instruction length in tokens: three quarters long documents, one quarter short instructions, fitted to the real
/// file's size and to the share of rows that a published 16k-token subset keeps.
const INSTRUCTION_TOKENS: Lengths =
    Lengths::Mixture { share: 0.75, first: (13_000.0, 0.45), second: (60.0, 0.7), min: (3_000, 8), max: 32_000 };

/// Path of a file of `kind` with at least `n_rows` rows, made if the user's cache has none.
///
/// # Errors
/// If the cache folder cannot be written; the error names the path.
pub fn cached_file(kind: &Kind, n_rows: usize, seed: u64) -> Result<PathBuf> {
    cached_file_in(&cache_folder()?, kind, n_rows, seed)
}

fn cached_file_in(folder: &Path, kind: &Kind, n_rows: usize, seed: u64) -> Result<PathBuf> {
    let n_rows = size(kind, n_rows);
    let path = folder.join(format!("{}-v{VERSION}-seed{seed}-{n_rows}.{}", kind.name, kind.extension));
    if !path.is_file() {
        let prompts = (0..n_rows).map(|row| (kind.prompt)(&mut row_rng(seed, row)));
        write_file(kind, &path, prompts)?;
    }
    Ok(path)
}

/// The same with rows that `filter` keeps alone, drawn until there are enough.
///
/// # Errors
/// As [`cached_file`], what the filter says, and [`Error::FewPrompts`] if it keeps too few of very many rows.
pub fn filtered_file(kind: &Kind, n_rows: usize, seed: u64, filter: &Filter<'_>) -> Result<PathBuf> {
    filtered_file_in(&cache_folder()?, kind, n_rows, seed, filter)
}

fn filtered_file_in(folder: &Path, kind: &Kind, n_rows: usize, seed: u64, filter: &Filter<'_>) -> Result<PathBuf> {
    let name = format!("{}-v{VERSION}-seed{seed}-{n_rows}-{}.{}", kind.name, filter.tag, kind.extension);
    let path = folder.join(name);
    if path.is_file() {
        return Ok(path);
    }
    let mut prompts: Vec<String> = Vec::with_capacity(n_rows);
    let mut n_drawn = 0;
    while prompts.len() < n_rows {
        let n_most = if prompts.is_empty() { MIN_DRAWS } else { (n_rows * MAX_DRAWS_PER_ROW).max(MIN_DRAWS) };
        if n_drawn >= n_most {
            return Err(Error::FewPrompts { n_found: prompts.len(), n_drawn, n_wanted: n_rows, dataset: kind.name });
        }
        let prompt = (kind.prompt)(&mut row_rng(seed, n_drawn));
        n_drawn += 1;
        if (filter.keeps)(&prompt)? {
            prompts.push(prompt);
        }
    }
    write_file(kind, &path, prompts.into_iter())?;
    Ok(path)
}

/// Few sizes, so that runs share files. Row i is the same in all of them.
fn size(kind: &Kind, n_rows: usize) -> usize {
    if n_rows <= kind.min_rows { kind.min_rows } else { n_rows.next_power_of_two() }
}

fn write_file(kind: &Kind, path: &Path, prompts: impl Iterator<Item = String>) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    // Written aside and renamed: a run that is cut off, or one at the same time, leaves no half file.
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    let written = File::create(&partial).and_then(|file| {
        let mut writer = BufWriter::new(file);
        write_rows(kind, &mut writer, prompts)?;
        writer.flush()?;
        fs::rename(&partial, path)
    });
    written.map_err(Error::io(&partial))
}

fn write_rows(kind: &Kind, out: &mut dyn Write, prompts: impl Iterator<Item = String>) -> std::io::Result<()> {
    let [before, between, after] = kind.frame;
    for (row, prompt) in prompts.enumerate() {
        let row_json = (kind.row)(row, &prompt);
        write!(out, "{}{row_json}", if row == 0 { before } else { between })?;
    }
    out.write_all(after.as_bytes())
}

fn cache_folder() -> Result<PathBuf> {
    let folder = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
    let cache = cache.ok_or_else(|| {
        Error::flag(
            "--dataset-path",
            "not given, and neither XDG_CACHE_HOME nor HOME says where to cache synthetic data",
        )
    })?;
    Ok(cache.join("ember").join("datasets"))
}

fn row_rng(seed: u64, row: usize) -> StdRng {
    StdRng::seed_from_u64(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(row as u64))
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;
    use crate::dataset::{self, Prompt};

    fn texts(kind: &Kind, n_rows: usize) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = cached_file_in(folder.path(), kind, n_rows, 7).unwrap();
        assert_eq!(path, cached_file_in(folder.path(), kind, n_rows, 7).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no partial file is left");
        let prompts = dataset::find(kind.name).unwrap().parse(&fs::read_to_string(path).unwrap()).unwrap();
        let text = |prompt| match prompt {
            Prompt::Text(text) => text,
            other => panic!("{other:?} is not text"),
        };
        prompts.into_iter().map(text).collect()
    }

    #[test]
    fn questions_are_short_varied_chinese() {
        let texts = texts(&OPENQA, 10);
        assert_eq!(texts.len(), 3293);
        let distinct: HashSet<_> = texts.iter().collect();
        assert!(distinct.len() > 3250, "{}", distinct.len());
        let heads: HashSet<String> = texts.iter().map(|text| text.chars().take(6).collect()).collect();
        assert!(heads.len() > 1500, "{}", heads.len());
        let mean = texts.iter().map(|text| text.chars().count()).sum::<usize>() as f64 / texts.len() as f64;
        assert!((26.0..42.0).contains(&mean), "mean of {mean} characters is not about 22 tokens");
        let chinese = |text: &String| text.chars().filter(|c| ('\u{4e00}'..='\u{9fff}').contains(c)).count();
        // Real questions name products and terms in Latin letters too: most are nearly all Chinese, none is mostly not.
        let share = |text: &String| chinese(text) as f64 / text.chars().count() as f64;
        let n_mostly = texts.iter().filter(|text| share(text) > 0.6).count();
        assert!(n_mostly * 100 > texts.len() * 95, "{n_mostly} of {}", texts.len());
        let least = texts.iter().min_by(|a, b| share(a).total_cmp(&share(b))).unwrap();
        assert!(share(least) > 0.4, "{least}");
    }

    #[test]
    fn documents_are_long_varied_english() {
        let texts = texts(&LONGALPACA, 64);
        assert_eq!(texts.len(), 64);
        let heads: HashSet<String> = texts.iter().map(|text| text.chars().take(32).collect()).collect();
        assert_eq!(heads.len(), 64, "documents differ from the start");
        let n_words: Vec<usize> = texts.iter().map(|text| text.split_whitespace().count()).collect();
        let n_short = n_words.iter().filter(|&&n| n < 1000).count();
        assert!((6..=28).contains(&n_short), "{n_short} of 64 are short");
        let mean = n_words.iter().sum::<usize>() as f64 / 64.0;
        assert!((6_500.0..11_500.0).contains(&mean), "{mean} words");
        let longest = texts.iter().max_by_key(|text| text.len()).unwrap();
        let mut counts: HashMap<&str, usize> = HashMap::new();
        longest.split_whitespace().for_each(|word| *counts.entry(word).or_default() += 1);
        assert!(counts.len() > 700, "{} different words", counts.len());
    }

    #[test]
    fn rows_do_not_depend_on_the_size_of_the_file() {
        let rows = |n_rows: usize, seed: u64| {
            let mut out = Vec::new();
            let prompts = (0..n_rows).map(|row| (OPENQA.prompt)(&mut row_rng(seed, row)));
            write_rows(&OPENQA, &mut out, prompts).unwrap();
            out
        };
        assert!(rows(50, 1).starts_with(&rows(5, 1)));
        assert_ne!(rows(5, 1), rows(5, 2));
    }

    #[test]
    fn a_filter_is_asked_until_it_has_kept_enough() {
        let folder = tempfile::tempdir().unwrap();
        let n_asked = std::cell::Cell::new(0);
        let shorter_than = |n_chars: usize| {
            let n_asked = &n_asked;
            move |text: &str| {
                n_asked.set(n_asked.get() + 1);
                Ok(text.chars().count() < n_chars)
            }
        };
        let file = |tag: &str, keeps: &dyn Fn(&str) -> Result<bool>| {
            filtered_file_in(folder.path(), &OPENQA, 100, 3, &Filter { tag: tag.into(), keeps })
        };
        // About one question in twenty is as short.
        let path = file("short", &shorter_than(14)).unwrap();
        let prompts = dataset::find("openqa").unwrap().parse(&fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(prompts.len(), 100);
        let mut distinct: Vec<_> = prompts.iter().map(|prompt| format!("{prompt:?}")).collect();
        distinct.sort();
        distinct.dedup();
        assert!(distinct.len() > 90, "{} of 100 differ", distinct.len());
        assert!((400..6400).contains(&n_asked.get()), "{} drawn", n_asked.get());
        // From the cache the second time.
        n_asked.set(0);
        assert_eq!(file("short", &shorter_than(14)).unwrap(), path);
        assert_eq!(n_asked.get(), 0);
        let error = file("none", &shorter_than(1)).unwrap_err().to_string();
        assert_eq!(n_asked.get(), MIN_DRAWS);
        assert!(error.contains("none of 4096 synthetic rows") && error.contains("--max-prompt-length"), "{error}");
        let one_in_a_thousand = |_: &str| {
            n_asked.set(n_asked.get() + 1);
            Ok(n_asked.get().is_multiple_of(1000))
        };
        n_asked.set(0);
        let error = file("few", &one_in_a_thousand).unwrap_err().to_string();
        assert!(error.contains("only 6 of 6400 synthetic rows") && error.contains("--number"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
