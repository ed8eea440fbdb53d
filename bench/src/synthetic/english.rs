//! Owns the words and sentences of synthetic English documents with a question about them.

use rand::{Rng, RngExt};

use super::phrases::{Lexicon, sentence};

/// Tokens per word (a word with the punctuation that follows it) of such text in present tokenizers.
const TOKENS_PER_WORD: f64 = 1.3;

const LEXICON: Lexicon<'static> = &[
    (
        'm',
        &[
            "Margaret Ellison",
            "Tomas Rivera",
            "Ingrid Solberg",
            "Hiroshi Tanaka",
            "Amara Okafor",
            "Daniel Whitcombe",
            "Leila Haddad",
            "Piotr Nowak",
            "Chen Wei",
            "Sofia Marchetti",
            "George Abernathy",
            "Priya Raman",
            "Olivier Laurent",
            "Nadia Petrova",
            "Samuel Okoro",
            "Elena Vasquez",
            "Johan Lindqvist",
            "Fatima Zahra",
            "Robert Callahan",
            "Mei Lin",
            "Victor Almeida",
            "Anna Kowalska",
            "Isaac Feldman",
            "Ruth Adeyemi",
            "Carlos Mendoza",
            "Yuki Nakamura",
            "Helena Brandt",
            "Marcus Doyle",
            "Zara Malik",
            "Theodore Grant",
            "Clara Jensen",
            "Omar Farouk",
        ],
    ),
    (
        'l',
        &[
            "Lisbon",
            "Trieste",
            "Nagasaki",
            "Bergen",
            "Valparaiso",
            "Antwerp",
            "Montreal",
            "Aleppo",
            "Odessa",
            "Glasgow",
            "Samarkand",
            "Hamburg",
            "Cartagena",
            "Kyoto",
            "Edinburgh",
            "Marseille",
            "Mombasa",
            "Riga",
            "Salonica",
            "Quito",
            "Boston",
            "Calcutta",
            "Rotterdam",
            "Dakar",
            "Sydney",
            "Chicago",
            "Vienna",
            "Lahore",
            "Porto",
            "Tallinn",
        ],
    ),
    (
        'n',
        &[
            "archive",
            "harbour",
            "committee",
            "railway",
            "manuscript",
            "reservoir",
            "observatory",
            "algorithm",
            "network",
            "laboratory",
            "sensor",
            "bridge",
            "treaty",
            "election",
            "harvest",
            "factory",
            "museum",
            "expedition",
            "hospital",
            "library",
            "market",
            "orchestra",
            "satellite",
            "telescope",
            "turbine",
            "vaccine",
            "warehouse",
            "workshop",
            "glacier",
            "forest",
            "canal",
            "engine",
            "theorem",
            "dataset",
            "protocol",
            "enzyme",
            "membrane",
            "crystal",
            "orbit",
            "sediment",
            "language",
            "dialect",
            "novel",
            "portrait",
            "cathedral",
            "courtroom",
            "contract",
            "tariff",
            "currency",
            "ledger",
            "insurance policy",
            "union",
            "school",
            "curriculum",
            "textbook",
            "newspaper",
            "broadcast",
            "telegram",
            "lighthouse",
            "shipyard",
            "vineyard",
            "monastery",
            "parliament",
            "garden",
            "river",
            "valley",
            "power station",
            "processor",
            "compiler",
            "memory controller",
            "neural network",
            "language model",
            "training corpus",
            "benchmark",
            "regression",
            "gradient",
            "attention layer",
            "tokenizer",
            "scheduler",
            "cache",
            "index",
        ],
    ),
    (
        's',
        &[
            "results",
            "letters",
            "measurements",
            "witnesses",
            "engineers",
            "farmers",
            "merchants",
            "historians",
            "students",
            "patients",
            "experiments",
            "estimates",
            "records",
            "samples",
            "reports",
            "villages",
            "workers",
            "settlers",
            "readers",
            "researchers",
            "ships",
            "instruments",
            "observations",
            "arguments",
            "budgets",
            "maps",
            "photographs",
            "regulations",
            "deliveries",
            "species",
            "proteins",
            "signals",
            "errors",
            "predictions",
            "parameters",
            "queries",
            "documents",
            "requests",
            "responses",
            "critics",
        ],
    ),
    (
        'a',
        &[
            "careful",
            "early",
            "unexpected",
            "modest",
            "remote",
            "ambitious",
            "fragile",
            "costly",
            "reliable",
            "controversial",
            "narrow",
            "gradual",
            "temporary",
            "precise",
            "incomplete",
            "ancient",
            "modern",
            "popular",
            "quiet",
            "rapid",
            "severe",
            "steady",
            "unusual",
            "vast",
            "wealthy",
            "abandoned",
            "brilliant",
            "cautious",
            "detailed",
            "efficient",
            "familiar",
            "generous",
            "hidden",
            "local",
            "official",
            "practical",
            "rural",
            "scarce",
            "technical",
            "urban",
            "sparse",
            "dense",
            "robust",
            "noisy",
            "empirical",
        ],
    ),
    (
        'v',
        &[
            "described",
            "measured",
            "rejected",
            "financed",
            "repaired",
            "translated",
            "catalogued",
            "predicted",
            "inspected",
            "expanded",
            "abandoned",
            "defended",
            "compared",
            "photographed",
            "rebuilt",
            "questioned",
            "published",
            "recorded",
            "approved",
            "revised",
            "tested",
            "surveyed",
            "transformed",
            "inherited",
            "designed",
            "evaluated",
            "reproduced",
            "optimised",
            "simulated",
            "annotated",
            "criticised",
            "celebrated",
            "purchased",
            "restored",
            "studied",
            "overlooked",
            "documented",
            "challenged",
            "improved",
            "replaced",
        ],
    ),
    (
        'd',
        &[
            "slowly",
            "in secret",
            "without delay",
            "with great care",
            "for the first time",
            "against all advice",
            "by hand",
            "in public",
            "at considerable expense",
            "over several winters",
            "with little success",
            "beyond any doubt",
            "almost by accident",
            "under difficult conditions",
            "as the law required",
            "in three stages",
            "on a small scale",
            "with new equipment",
            "before the war",
            "after the flood",
        ],
    ),
    (
        'c',
        &[
            "However",
            "In the meantime",
            "Even so",
            "For this reason",
            "By contrast",
            "As a consequence",
            "Several years later",
            "In practice",
            "According to one account",
            "Despite these doubts",
            "On closer inspection",
            "At the same time",
            "In addition",
            "To everyone's surprise",
            "More importantly",
            "As the table below shows",
            "From that point on",
            "In the second series of trials",
        ],
    ),
];

const SENTENCES: &[&str] = &[
    "{m} {v} the {a} {n} in {l} {d}, and the {s} were sent to {l}.",
    "{c}, the {s} of {y} showed that the {n} had been {v} {d}.",
    "The {a} {n} near {l} was {v} by {m}, who had already {v} a similar {n} in {y}.",
    "{c}, {m} argued that {a} {s} could not explain why the {n} was so {a}.",
    "Of the {#} {s} collected in {l}, only {#} were considered {a} enough to be {v}.",
    "\"We never expected the {n} to be {a},\" wrote {m}, \"but the {s} left us no choice.\"",
    "{c}, each {n} was {v} twice: once in {l} and once, {d}, in {l}.",
    "When the {n} was finally {v} in {y}, {s} from {l} to {l} had to be {v} again.",
    "Between {y} and {y} the number of {s} rose from {#} to {#}, while the {n} remained {a}.",
    "It was {m} who first {v} the relation between the {n} and the {a} {n}.",
    "Critics of {m} pointed out that the {s} had been {v} {d}; the {n} itself was hardly mentioned.",
    "The {n}, although {a}, depended on {s} that nobody in {l} had {v}.",
    "{c}, a {a} {n} costs about {#} times as much as the {n} which {m} {v}.",
    "If the {s} are {a}, the {n} can be {v} {d}; otherwise the {n} must be {v} first.",
    "Both the {n} and the {n} were {v} {d}, yet the {s} in {l} stayed {a}.",
    "{m} and {m} {v} the {s} independently and reached {a} conclusions about the {n}.",
    "There is {a} evidence that the {n} of {l} was {v} long before {y}.",
    "What made the {n} {a} was not its size but the {a} way in which {s} were {v}.",
    "In a letter of {y}, {m} asked whether the {n} in {l} might be {v} {d}.",
    "{c}, the {a} {s} were {v}, and with them went the last {n} of its kind.",
];

const TITLES: &[&str] = &[
    "{m} and the {n} of {l}",
    "{y}: the year the {n} was {v}",
    "A {a} {n}: {s} from {l}",
    "{l}, {y}. Notes of {m}",
    "On {a} {s} and the {n}",
    "{a} {s}, {a} {n}: what {m} {v} in {l}",
    "{#} {s} of a {a} {n}",
    "How {m} {v} the {n} {d}",
    "The {n} that {m} {v}",
    "{s} and the {a} {n}, {l}, {y}",
];

const HEADINGS: &[&str] = &["The {a} {n}", "{s} from {l}", "{m}", "After {y}", "A {n} {v}", "{s} and {s}"];

const QUESTIONS: &[&str] = &[
    "What reasons does the text give for the {n} being {v} {d}?",
    "Summarise what {m} {v} in {l} and explain why it mattered to the {s}.",
    "Which of the {s} were considered {a}, and how did that change the {n}?",
    "Compare the {n} described in the first part with the {a} {n} of the last part.",
    "List the places where {s} were {v} and say what happened in each of them.",
    "What would have happened to the {n} if {m} had not {v} the {s}?",
];

const SHORT: &[&str] = &[
    "{m} finds a {a} {n} in {l}. Write a short story about it.",
    "{a} {s} of {l}: explain to a child what they are.",
    "{#} reasons to visit {l} and its {a} {n}: name them.",
    "{m} {v} the {n} {d}. Rewrite this sentence in a {a} tone.",
    "{s} are {v} in a {a} {n}. Describe how.",
    "{n} or {n}, {s} or {s}: name the differences.",
    "{a} {s} in {l}, {y}. Suggest a title for this article.",
    "{m} {v} the {a} {n} {d}. Translate into French.",
];

/// An instruction of about `n_tokens` tokens: a short task, or a document followed by a question about it.
pub(super) fn instruction(rng: &mut impl Rng, n_tokens: u32) -> String {
    let n_words = (f64::from(n_tokens) / TOKENS_PER_WORD) as usize;
    if n_words < 1000 {
        let mut text = capitalised(sentence(rng, SHORT, LEXICON));
        grow(rng, &mut text, n_words, |_, _| " ");
        return text;
    }
    let mut text = capitalised(sentence(rng, TITLES, LEXICON));
    text.push_str("\n\n");
    let question = sentence(rng, QUESTIONS, LEXICON);
    let mut left_in_paragraph = 5;
    grow(rng, &mut text, n_words.saturating_sub(words(&question) + 14), |rng, text| {
        left_in_paragraph -= 1;
        if left_in_paragraph > 0 {
            return " ";
        }
        left_in_paragraph = rng.random_range(3..9);
        if rng.random_bool(0.12) {
            text.push_str("\n\n## ");
            text.push_str(&capitalised(sentence(rng, HEADINGS, LEXICON)));
        }
        "\n\n"
    });
    text.push_str("\n\nNow the text ends. Answer this question from the text alone.\n");
    text.push_str(&question);
    text
}

/// Adds sentences until `text` has `n_words` words; `join` says, and may add, what stands between them.
fn grow<R: Rng>(
    rng: &mut R,
    text: &mut String,
    n_words: usize,
    mut join: impl FnMut(&mut R, &mut String) -> &'static str,
) {
    let mut n = words(text);
    while n + 9 < n_words {
        let next = capitalised(sentence(rng, SENTENCES, LEXICON));
        n += words(&next);
        let between = join(rng, text);
        if !text.ends_with('\n') {
            text.push_str(between);
        }
        text.push_str(&next);
    }
}

fn words(text: &str) -> usize {
    text.split_whitespace().count()
}

fn capitalised(text: String) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().collect::<String>() + chars.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::phrases::check;

    #[test]
    fn every_slot_has_words() {
        for templates in [SENTENCES, TITLES, HEADINGS, QUESTIONS, SHORT] {
            check(templates, LEXICON);
        }
    }
}
