//! Finding a tag in text that comes in pieces.

/// Where `tag` is in `text`, or else how much of `text` cannot be its beginning.
pub enum Found {
    /// It begins here.
    At(usize),
    /// Not there; after these bytes it may have begun.
    NotIn(usize),
}

/// Looks for `tag` in `text`.
pub fn find(text: &str, tag: &str) -> Found {
    if let Some(at) = text.find(tag) {
        return Found::At(at);
    }
    // The longest end of the text that the tag begins with.
    let n_held = (1..tag.len()).rev().find(|&n| tag.is_char_boundary(n) && text.ends_with(&tag[..n])).unwrap_or(0);
    Found::NotIn(text.len() - n_held)
}
