//! The fuzz targets: everything that reads bytes which others made. One file each, one row in [`TARGETS`].
//!
//! `cargo xtask fuzz` runs them under libFuzzer, guided by the coverage of this workspace's crates. `cargo test` replays
//! the committed inputs (the folder `corpus`) and mutations of them for a second each.

#![warn(missing_docs)]

mod bodies;
mod chat_template;
mod gguf;
mod safetensors;
mod sse;

/// One reader of foreign bytes.
pub struct Target {
    /// Its name, which is also that of its folder of inputs.
    pub name: &'static str,
    /// Reads any bytes. Must not panic, and must end soon.
    pub run: fn(&[u8]),
}

/// All targets, sorted by name.
pub const TARGETS: &[Target] = &[
    Target { name: "bodies", run: bodies::run },
    Target { name: "chat_template", run: chat_template::run },
    Target { name: "gguf", run: gguf::run },
    Target { name: "safetensors", run: safetensors::run },
    Target { name: "sse", run: sse::run },
];

#[cfg(test)]
mod tests {
    use std::{
        path::Path,
        time::{Duration, Instant},
    };

    use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    const TIME: Duration = Duration::from_secs(1);

    /// A change such as a bug or an attacker would make.
    fn mutate(bytes: &mut Vec<u8>, other: &[u8], rng: &mut impl Rng) {
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..=bytes.len());
            let end = rng.random_range(at..=bytes.len().min(at + 16));
            match rng.random_range(0..6) {
                0 => drop(bytes.splice(at..end, [])),
                1 => drop(bytes.splice(at..at, bytes[at..end].to_vec())),
                2 => bytes.truncate(at),
                3 => bytes[at..end].fill(*[0, 1, 0x7f, 0xff, b'"'].get(rng.random_range(0..5)).unwrap_or(&0)),
                4 => bytes[at..end].iter_mut().for_each(|byte| *byte = rng.random()),
                _ => {
                    let from = rng.random_range(0..=other.len());
                    let piece = &other[from..other.len().min(from + 32)];
                    bytes.splice(at..at, piece.iter().copied());
                }
            }
        }
    }

    #[test]
    fn committed_inputs_and_their_mutations_pass() {
        for Target { name, run } in TARGETS {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
            let mut files: Vec<_> =
                std::fs::read_dir(&folder).expect("a corpus").map(|entry| entry.expect("an entry").path()).collect();
            files.sort();
            let seeds: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).expect("an input")).collect();
            assert!(!seeds.is_empty(), "{name}: no inputs in {}", folder.display());
            seeds.iter().for_each(|seed| run(seed));
            let mut rng = StdRng::seed_from_u64(1);
            let end = Instant::now() + TIME;
            while Instant::now() < end {
                let mut bytes = seeds[rng.random_range(0..seeds.len())].clone();
                mutate(&mut bytes, &seeds[rng.random_range(0..seeds.len())], &mut rng);
                run(&bytes);
            }
        }
    }

    #[test]
    fn the_table_is_sorted() {
        assert!(TARGETS.windows(2).all(|pair| pair[0].name < pair[1].name));
    }
}
