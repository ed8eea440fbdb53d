//! Rules of the source tree that no compiler checks. Runs as a step of `cargo xtask ci` and as a test.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

const WARN_LINES: usize = 600;
const MAX_LINES: usize = 700;
/// Names that say nothing of what a file owns.
const VAGUE_NAMES: &[&str] = &["util", "utils", "helper", "helpers", "misc"];
/// Split, so that this file does not find itself.
const UNFINISHED: &[&str] = &[concat!("todo", "!("), concat!("unimplemented", "!("), concat!("#[", "ignore")];
/// A backticked word that starts with one of these names a path of the repository.
const TOP_LEVEL: &[&str] =
    &["bench/", "common/", "docs/", "engine/", "server/", "xtask/", ".ci/", ".cargo/", ".github/"];

#[derive(Default)]
struct Findings {
    errors: Vec<String>,
    warnings: Vec<String>,
}

/// Checks the tree under `root`; prints warnings, fails on errors.
pub fn check(root: &Path) -> Result<()> {
    let mut files = Vec::new();
    walk(root, &mut files)?;
    let mut findings = Findings::default();
    let mut n_sources = 0;
    for path in &files {
        let relative = path.strip_prefix(root).unwrap_or(path);
        let is_doc = relative == Path::new("README.md") || relative.starts_with("docs");
        match path.extension().and_then(|it| it.to_str()) {
            Some("rs") => {
                n_sources += 1;
                check_source(relative, &read(path)?, &mut findings);
            }
            // The log tells of the past, so its paths may be gone.
            Some("md") if is_doc && relative != Path::new("docs/log.md") => {
                check_doc(root, relative, &read(path)?, &mut findings);
            }
            _ => {}
        }
    }
    for warning in &findings.warnings {
        eprintln!("warning: {warning}");
    }
    if !findings.errors.is_empty() {
        bail!("{}", findings.errors.join("\n"));
    }
    println!("{n_sources} source files are tidy");
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// All files below `dir`, without hidden folders and build output.
fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        if name.to_string_lossy().starts_with('.') || name == "target" || name == "bench-results" {
            continue;
        }
        match entry.file_type()? {
            it if it.is_dir() => walk(&path, files)?,
            it if it.is_file() => files.push(path),
            _ => {}
        }
    }
    files.sort();
    Ok(())
}

fn check_source(path: &Path, text: &str, findings: &mut Findings) {
    let shown = path.display();
    if !text.starts_with("//!") {
        findings.errors.push(format!("{shown}: the first line must be a `//!` line that says what the module owns"));
    }
    let n_lines = text.lines().count();
    if n_lines > MAX_LINES {
        findings.errors.push(format!("{shown}: {n_lines} lines, the limit is {MAX_LINES}: split it by noun"));
    } else if n_lines > WARN_LINES {
        findings.warnings.push(format!("{shown}: {n_lines} lines, past {WARN_LINES}"));
    }
    let is_vague = |it: &std::ffi::OsStr| VAGUE_NAMES.contains(&it.to_string_lossy().trim_end_matches(".rs"));
    if path.iter().any(is_vague) {
        findings.errors.push(format!("{shown}: name the module for the noun it owns"));
    }
    for (line_idx, line) in text.lines().enumerate() {
        for word in UNFINISHED {
            if line.contains(word) {
                findings.errors.push(format!("{shown}:{}: `{word}` may not be committed", line_idx + 1));
            }
        }
        if line.ends_with([' ', '\t']) {
            findings.errors.push(format!("{shown}:{}: trailing space", line_idx + 1));
        }
    }
}

fn check_doc(root: &Path, path: &Path, text: &str, findings: &mut Findings) {
    for (line_idx, line) in text.lines().enumerate() {
        for named in named_paths(line) {
            if !root.join(named).exists() {
                let shown = path.display();
                findings.errors.push(format!("{shown}:{}: `{named}` does not exist", line_idx + 1));
            }
        }
    }
}

/// The repository paths that a line names in backticks or as the target of a link. Patterns such as
/// `engine/src/models/NAME.rs` or `docs/*.md` name no single file and are left out.
fn named_paths(line: &str) -> Vec<&str> {
    let in_backticks = line.split('`').skip(1).step_by(2);
    let in_links = line.split("](").skip(1).filter_map(|it| it.split([')', '#']).next());
    let is_path = |it: &&str| {
        TOP_LEVEL.iter().any(|top| it.starts_with(top))
            && !it.contains(['*', '<', '{', '$', '…', ' '])
            && !it.contains("NAME")
    };
    in_backticks.chain(in_links).filter(is_path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_tree_is_tidy() {
        check(crate::project_root()).unwrap();
    }

    #[test]
    fn each_rule_finds_its_breach() {
        let errors = |path: &str, text: &str| {
            let mut findings = Findings::default();
            check_source(Path::new(path), text, &mut findings);
            findings.errors.len()
        };
        assert_eq!(errors("engine/src/sampler.rs", "//! Owns sampling.\nfn f() {}\n"), 0);
        assert_eq!(errors("engine/src/sampler.rs", "fn f() {}\n"), 1);
        assert_eq!(errors("engine/src/utils.rs", "//! Things.\n"), 1);
        assert_eq!(errors("engine/src/util/x.rs", "//! Things.\n"), 1);
        assert_eq!(errors("a.rs", &format!("//! A.\n{}\n", concat!("fn f() { todo", "!() }"))), 1);
        assert_eq!(errors("a.rs", "//! A.\nfn f() {} \n"), 1);
        assert_eq!(errors("a.rs", &"//! A.\n".repeat(MAX_LINES)), 0);
        assert_eq!(errors("a.rs", &"//! A.\n".repeat(MAX_LINES + 1)), 1);
    }

    #[test]
    fn paths_in_prose_are_found_and_patterns_are_not() {
        assert_eq!(
            named_paths("See `engine/src/lib.rs` and [docs](docs/serving.md#run)."),
            ["engine/src/lib.rs", "docs/serving.md"]
        );
        assert!(
            named_paths("`engine/src/models/NAME.rs`, `docs/*.md`, `server/{a,b}`, `x/y`, server/client").is_empty()
        );
    }
}
