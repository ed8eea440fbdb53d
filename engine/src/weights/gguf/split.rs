//! Split GGUF files: one model in several files, as llama.cpp's `gguf-split` and `llama-quantize --keep-split` write.
//!
//! Part 2 of 3 is called `NAME-00002-of-00003.gguf`. Each part is a GGUF file of its own with `split.no` (from 0) and
//! `split.count`; the first has the model's metadata, and every tensor is in one of them.

use std::path::{Path, PathBuf};

use super::Gguf;
use crate::Error;

/// The name of a part.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PartName<'a> {
    stem: &'a str,
    /// From 1.
    number: usize,
    /// Parts in all.
    count: usize,
}

impl<'a> PartName<'a> {
    /// The name of `path` if it is that of a part.
    pub(crate) fn of(path: &'a Path) -> Option<Self> {
        let (rest, count) = path.file_name()?.to_str()?.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let read = |digits: &str| {
            let all_digits = digits.len() == 5 && digits.bytes().all(|byte| byte.is_ascii_digit());
            all_digits.then(|| digits.parse::<usize>().ok()).flatten()
        };
        let (number, count) = (read(number)?, read(count)?);
        (1..=count).contains(&number).then_some(Self { stem, number, count })
    }

    /// The file name of part `number` of the same model.
    pub(crate) fn sibling(&self, number: usize) -> String {
        format!("{}-{number:05}-of-{:05}.gguf", self.stem, self.count)
    }
}

/// All parts of the model of `given`, any part of one with `count` parts.
///
/// # Errors
/// [`Error::Model`] naming the part that is missing or does not belong to the others.
pub(super) fn join(given: Gguf, count: usize) -> Result<Gguf, Error> {
    let path = given.path.clone();
    let name = PartName::of(&path).filter(|name| name.count == count).ok_or_else(|| {
        given.error(format!(
            "'split.count' is {count}, but the file is not called NAME-00001-of-{count:05}.gguf, so the other parts \
             cannot be found; give all parts the names they had when they were made"
        ))
    })?;
    let mut whole = open_part(path.with_file_name(name.sibling(1)), 1, count)?;
    for number in 2..=count {
        append(&mut whole, open_part(path.with_file_name(name.sibling(number)), number, count)?)?;
    }
    if let Some(expected) = whole.integer("split.tensors.count")?
        && expected != whole.tensors.len()
    {
        return Err(whole.error(format!(
            "'split.tensors.count' is {expected}, but the {count} parts hold {} tensors; they are not of one model",
            whole.tensors.len()
        )));
    }
    Ok(whole)
}

fn open_part(path: PathBuf, number: usize, count: usize) -> Result<Gguf, Error> {
    if !path.exists() {
        return Err(Error::model(
            path,
            format!("the file is missing: it is part {number} of {count} of the model; put all parts into one folder"),
        ));
    }
    let part = Gguf::open_one(&path)?;
    for (key, expected) in [("split.no", number - 1), ("split.count", count)] {
        let found = part.integer(key)?;
        if found != Some(expected) {
            let found = found.map_or("missing".to_owned(), |found| format!("{found}"));
            return Err(part.error(format!(
                "'{key}' is {found}, but by the file's name it must be {expected}; the file is not this part"
            )));
        }
    }
    Ok(part)
}

/// Adds the tensors of `part` to `whole`.
fn append(whole: &mut Gguf, part: Gguf) -> Result<(), Error> {
    let index = whole.maps.len();
    for (name, mut info) in part.tensors {
        info.part = index;
        if whole.tensors.contains_key(&name) {
            return Err(Error::model(&part.path, format!("tensor '{name}' is in an earlier part already")));
        }
        whole.tensors.insert(name, info);
    }
    whole.maps.extend(part.maps);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{super::writer::GgufWriter, *};

    /// Part `number` of `count` with one tensor `t{number}` of two elements.
    fn part(number: u32, count: u32) -> GgufWriter {
        let mut w = GgufWriter::default();
        if number == 1 {
            w.string("general.architecture", "llama");
        }
        w.raw("split.no", 2, &(number as u16 - 1).to_le_bytes()).raw("split.count", 2, &(count as u16).to_le_bytes());
        w.raw("split.tensors.count", 5, &count.to_le_bytes());
        let data = [number as f32, 0.5].iter().flat_map(|v| v.to_le_bytes()).collect();
        w.tensor(&format!("t{number}"), &[2], 0, data);
        w
    }

    /// A folder with these parts under their names.
    fn folder(parts: &[(&str, GgufWriter)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, writer) in parts {
            std::fs::write(folder.path().join(name), writer.bytes()).expect("written");
        }
        folder
    }

    const NAMES: [&str; 3] = ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"];

    fn three() -> [(&'static str, GgufWriter); 3] {
        [(NAMES[0], part(1, 3)), (NAMES[1], part(2, 3)), (NAMES[2], part(3, 3))]
    }

    #[test]
    fn any_part_opens_all() {
        let folder = folder(&three());
        for name in NAMES {
            let gguf = Gguf::open(&folder.path().join(name)).expect("whole");
            assert_eq!(gguf.string("general.architecture").expect("text"), Some("llama"));
            for number in 1..=3 {
                let name = format!("t{number}");
                let tensor = gguf.tensor(&name).expect("there");
                assert_eq!(*tensor.to_f32(), [number as f32, 0.5]);
                let map = gguf.map(&name).expect("there");
                assert!(map.as_ptr_range().contains(&tensor.data.as_ptr()), "{name} is in another part's map");
            }
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_named() {
        let check = |parts: &[(&str, GgufWriter)], expected: &[&str]| {
            let folder = folder(parts);
            let message = Gguf::open(&folder.path().join(parts[0].0)).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(expected.iter().all(|text| message.contains(text)), "{message:?} lacks {expected:?}");
        };
        let [one, two, three] = three();
        check(&[one.clone(), three.clone()], &[NAMES[1], "the file is missing: it is part 2 of 3"]);
        check(&[two.clone(), three.clone()], &[NAMES[0], "the file is missing: it is part 1 of 3"]);
        check(&[("m.gguf", part(1, 3))], &["m.gguf", "'split.count' is 3", "NAME-00001-of-00003.gguf"]);
        check(&[("m-00001-of-00004.gguf", part(1, 3))], &["'split.count' is 3", "not called"]);
        check(&[one.clone(), (NAMES[1], part(3, 3)), three.clone()], &[NAMES[1], "'split.no' is 2", "must be 1"]);
        check(&[one.clone(), (NAMES[1], part(2, 5)), three.clone()], &[NAMES[1], "'split.count' is 5"]);
        check(&[one.clone(), (NAMES[1], GgufWriter::default()), three.clone()], &[NAMES[1], "'split.no' is missing"]);
        let mut twice = part(2, 3);
        twice.tensor("t1", &[1], 0, vec![0; 4]);
        check(&[one.clone(), (NAMES[1], twice), three.clone()], &[NAMES[1], "'t1' is in an earlier part"]);
        let mut more = part(2, 3);
        more.tensor("more", &[1], 0, vec![0; 4]);
        check(&[one, (NAMES[1], more), three], &["'split.tensors.count' is 3", "hold 4 tensors"]);
    }

    #[test]
    fn only_names_of_parts_are_taken_for_such() {
        let of = |name: &'static str| PartName::of(Path::new(name)).map(|name| (name.stem, name.number, name.count));
        assert_eq!(of("dir/a-b-00002-of-00003.gguf"), Some(("a-b", 2, 3)));
        for name in ["a.gguf", "a-00000-of-00003.gguf", "a-00004-of-00003.gguf", "a-2-of-3.gguf", "a-00001-of-00003"] {
            assert_eq!(of(name), None, "{name}");
        }
    }
}
