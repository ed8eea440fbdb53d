//! The `tojson` filter of chat templates: Python's `json.dumps`, not Jinja's HTML-safe one.

use minijinja::{ErrorKind, Value as JinjaValue, value::Kwargs};
use serde::Serialize;

/// `json.dumps(value, ensure_ascii=False, indent=...)` with Python's separators and no HTML escapes.
pub(super) fn tojson(value: JinjaValue, indent: Option<usize>, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<usize>>("indent")?,
    };
    // Names that transformers accepts; non-ASCII is never escaped and keys keep their order.
    let _: Option<bool> = options.get("ensure_ascii")?;
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let fail = |e: serde_json::Error| minijinja::Error::new(ErrorKind::InvalidOperation, format!("tojson: {e}"));
    let mut value = serde_json::to_value(&value).map_err(fail)?;
    if sort_keys {
        value.sort_all_objects();
    }
    let mut out = Vec::new();
    match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter)).map_err(fail)?;
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)).map_err(fail)?,
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// One line with a space after each comma and colon, as Python writes JSON.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}
