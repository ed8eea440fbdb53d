//! Plain text tables: aligned for a terminal, valid as Markdown.

/// A Markdown table whose columns are padded to one width; columns after the first are right-aligned.
pub fn markdown(header: &[&str], rows: &[Vec<String>]) -> String {
    let n_columns = header.len();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|it| it.chars().count());
        cells.chain([header[column].chars().count(), 3]).max().unwrap_or(3)
    };
    let widths: Vec<usize> = (0..n_columns).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::from("|");
        for (column, cell) in cells.enumerate() {
            let pad = " ".repeat(widths[column].saturating_sub(cell.chars().count()));
            text += &if column == 0 { format!(" {cell}{pad} |") } else { format!(" {pad}{cell} |") };
        }
        text + "\n"
    };
    let mut text = line(&mut header.iter().copied());
    text.push('|');
    for (column, width) in widths.iter().enumerate() {
        text += &if column == 0 { format!("-{}-|", "-".repeat(*width)) } else { format!("-{}:|", "-".repeat(*width)) };
    }
    text.push('\n');
    for row in rows {
        text += &line(&mut row.iter().map(String::as_str));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let text = markdown(&["step", "s"], &[vec!["format".into(), "1.2".into()], vec!["x".into(), "100.0".into()]]);
        assert_eq!(text, "| step   |     s |\n|--------|------:|\n| format |   1.2 |\n| x      | 100.0 |\n");
    }
}
