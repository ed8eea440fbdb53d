//! Owns the filling of sentence templates from word lists.

use rand::seq::IndexedRandom;
use rand::{Rng, RngExt};

/// Words by the letter that stands for them in a template: `{n}` takes one of the list of `n`.
pub(super) type Lexicon<'a> = &'a [(char, &'a [&'a str])];

/// Fills a template. `{#}` becomes a number, `{y}` a year; a letter the lexicon lacks is left as it is.
pub(super) fn fill(rng: &mut impl Rng, template: &str, lexicon: Lexicon<'_>) -> String {
    let mut text = String::with_capacity(template.len() * 2);
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        text.push_str(before);
        let (slot, after) = after.split_once('}').unwrap_or((after, ""));
        match slot {
            "#" => text.push_str(&rng.random_range(2..950).to_string()),
            "y" => text.push_str(&rng.random_range(1870..2025).to_string()),
            _ => text.push_str(word(rng, slot, lexicon)),
        }
        rest = after;
    }
    text.push_str(rest);
    text
}

fn word<'a>(rng: &mut impl Rng, slot: &'a str, lexicon: Lexicon<'a>) -> &'a str {
    let list = lexicon.iter().find(|(letter, _)| slot.starts_with(*letter)).map_or(&[][..], |(_, list)| list);
    list.choose(rng).copied().unwrap_or(slot)
}

/// One of the templates, filled.
pub(super) fn sentence(rng: &mut impl Rng, templates: &[&str], lexicon: Lexicon<'_>) -> String {
    let template = templates.choose(rng).copied().unwrap_or_default();
    fill(rng, template, lexicon)
}

/// Whether every slot of the templates has its list.
#[cfg(test)]
pub(super) fn check(templates: &[&str], lexicon: Lexicon<'_>) {
    for template in templates {
        for slot in template.split('{').skip(1).map(|part| part.split_once('}').unwrap().0) {
            let known = slot == "#"
                || slot == "y"
                || lexicon.iter().any(|(letter, list)| slot.starts_with(*letter) && !list.is_empty());
            assert!(known, "{{{slot}}} of {template:?}");
        }
    }
}
