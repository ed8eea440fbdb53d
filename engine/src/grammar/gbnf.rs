//! GBNF, the notation of llama.cpp's grammars, to Lark's.

use std::fmt::Write;

/// Whether `text` looks like GBNF: Lark's rules are `name: ...`, GBNF's `name ::= ...`.
pub fn is_gbnf(text: &str) -> bool {
    text.lines().any(|line| {
        let line = line.trim_start();
        !line.starts_with('#') && line.split_once("::=").is_some_and(|(name, _)| is_name(name.trim_end()))
    })
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

/// The same grammar in Lark's notation; the rule `root` becomes `start`.
///
/// # Errors
/// What is not GBNF, with its line.
pub fn to_lark(text: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = text;
    let mut has_root = false;
    // Inside parentheses a rule goes on over line ends.
    let mut depth = 0_usize;
    while let Some(c) = rest.chars().next() {
        let line = || text[..text.len() - rest.len()].matches('\n').count() + 1;
        let n_bytes = match c {
            '#' => rest.find('\n').unwrap_or(rest.len()),
            '"' | '[' => {
                let close = if c == '[' { ']' } else { c };
                let n = quoted_len(rest, close).ok_or_else(|| format!("line {}: `{c}` is not closed", line()))?;
                let literal = &rest[..n];
                // Lark has no character classes outside of regular expressions.
                let _ = if c == '"' { write!(out, "{literal}") } else { write!(out, "/{}/", class(literal)) };
                n
            }
            '.' => {
                out.push_str("/(?s:.)/");
                1
            }
            c if c.is_ascii_alphanumeric() || c == '_' || c == '-' => {
                let n = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '-')).unwrap_or(rest.len());
                let after = rest[n..].trim_start();
                if after.starts_with("::=") {
                    has_root |= &rest[..n] == "root";
                    let _ = write!(out, "{}:", rule_name(&rest[..n]));
                    rest.len() - after.len() + 3
                } else if out.ends_with(['{', ',']) || rest[..n].chars().all(|c| c.is_ascii_digit()) {
                    out.push_str(&rest[..n]);
                    n
                } else {
                    out.push_str(&rule_name(&rest[..n]));
                    n
                }
            }
            '\n' if depth > 0 || continues(rest) => {
                out.push(' ');
                1
            }
            '(' | ')' | '|' | '*' | '+' | '?' | '{' | '}' | ',' | ' ' | '\t' | '\r' | '\n' => {
                depth = match c {
                    '(' => depth + 1,
                    ')' => depth.checked_sub(1).ok_or_else(|| format!("line {}: `)` opens nowhere", line()))?,
                    _ => depth,
                };
                out.push(c);
                1
            }
            c => return Err(format!("line {}: unexpected `{c}`", line())),
        };
        rest = &rest[n_bytes..];
    }
    if has_root { Ok(out) } else { Err("there is no rule `root`".into()) }
}

/// Whether the next line that is not empty goes on with the rule before it.
fn continues(rest: &str) -> bool {
    rest.trim_start().starts_with('|')
}

/// Bytes of the literal at the start of `text`, its closing `close` included.
fn quoted_len(text: &str, close: char) -> Option<usize> {
    let mut is_escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if c == '\n' {
            return None;
        }
        if c == close && !is_escaped {
            return Some(at + c.len_utf8());
        }
        is_escaped = c == '\\' && !is_escaped;
    }
    None
}

/// A character class as a regular expression has it.
fn class(literal: &str) -> String {
    // In GBNF only `]` and `\` need an escape; in a regular expression `[` and `&` and `~` can mean more, `/` ends it.
    let mut out = String::from("[");
    let mut is_escaped = false;
    for c in literal[1..literal.len() - 1].chars() {
        if !is_escaped && matches!(c, '[' | '&' | '~' | '/') {
            out.push('\\');
        }
        out.push(c);
        is_escaped = c == '\\' && !is_escaped;
    }
    out + "]"
}

/// Lark's rules are lower case, without hyphens.
fn rule_name(name: &str) -> String {
    if name == "root" { "start".into() } else { format!("r_{}", name.replace('-', "_").to_ascii_lowercase()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notations_are_told_apart() {
        assert!(is_gbnf("# a\nroot ::= \"x\""));
        assert!(!is_gbnf("start: \"a ::= b\""));
        assert!(!is_gbnf("start: x\nx: /::=/"));
    }

    #[test]
    fn rules_literals_and_classes_are_translated() {
        let gbnf = "root ::= the-item (\",\" the-item){0,3} # list\nthe-item ::= [a-z/\\]]+\n  | \"\\n\" .";
        let lark = to_lark(gbnf).unwrap();
        assert_eq!(lark, "start: r_the_item (\",\" r_the_item){0,3} \nr_the_item: /[a-z\\/\\]]/+   | \"\\n\" /(?s:.)/");
    }

    #[test]
    fn what_is_not_gbnf_is_named_with_its_line() {
        for (text, message) in [
            ("a ::= \"x\"", "no rule `root`"),
            ("root ::= \"x", "line 1: `\"` is not closed"),
            ("root ::= a\na ::= [x", "line 2: `[` is not closed"),
            ("root ::= a)", "line 1: `)` opens nowhere"),
            ("root ::= <a>", "line 1: unexpected `<`"),
        ] {
            let error = to_lark(text).unwrap_err();
            assert!(error.contains(message), "{text}: {error}");
        }
    }
}
