//! Colours, and how wide a text is on a terminal.

use std::io::IsTerminal;

/// What a piece of text means; what has no meaning of its own has no colour.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Tone {
    /// As the terminal writes.
    Plain,
    /// It went well.
    Good,
    /// Somebody has to do something.
    Attention,
    /// It went wrong.
    Bad,
    /// Not so important.
    Faint,
}

/// Whether to colour what goes to one stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Colours(bool);

impl Colours {
    /// For standard output.
    pub(super) fn of_stdout() -> Self {
        Self(std::io::stdout().is_terminal() && wanted())
    }

    /// For standard error.
    pub(super) fn of_stderr() -> Self {
        Self(std::io::stderr().is_terminal() && wanted())
    }

    /// None, whatever the stream.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self(false)
    }

    /// Whether there are any.
    pub(super) fn on(self) -> bool {
        self.0
    }

    /// `text` in the colour of `tone`.
    pub(super) fn paint(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Plain => return text.to_owned(),
            Tone::Good => 32,
            Tone::Attention => 33,
            Tone::Bad => 31,
            Tone::Faint => 2,
        };
        if self.0 && !text.is_empty() {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// The user wants colours, as far as the environment tells.
fn wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) && !is_dumb()
}

/// The terminal does not move its cursor.
pub(super) fn is_dumb() -> bool {
    std::env::var_os("TERM").is_none_or(|value| value.is_empty() || value == "dumb")
}

/// Columns that `text` takes at most; it has no control characters.
pub(super) fn columns(text: &str) -> usize {
    text.chars().map(width_max).sum()
}

/// The beginning of `text` that fits into so many columns, with an ellipsis if that is not all.
pub(super) fn cut(text: &str, most: usize) -> String {
    if columns(text) <= most {
        return text.to_owned();
    }
    let mut left = most.saturating_sub(1);
    let fits = |char: &char| {
        let fits = width_max(*char) <= left;
        left = left.saturating_sub(width_max(*char));
        fits
    };
    let mut kept: String = text.chars().take_while(fits).collect();
    if most > 0 {
        kept.push('…');
    }
    kept
}

/// Lines of at most so many columns; words stay whole where they fit.
pub(super) fn wrap(text: &str, most: usize) -> Vec<String> {
    let most = most.max(8);
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last().map_or(0, |line| columns(line));
        if line > 0 && line + 1 + columns(word) > most {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut().filter(|line| !line.is_empty()) {
            line.push(' ');
        }
        for char in word.chars() {
            if lines
                .last()
                .is_some_and(|line| columns(line) + width_max(char) > most)
            {
                lines.push(String::new());
            }
            if let Some(line) = lines.last_mut() {
                line.push(char);
            }
        }
    }
    lines
}

/// What this program writes itself is narrow; what others write may be wide, and too short a line is better than one that wraps.
fn width_max(char: char) -> usize {
    match char {
        '\u{20}'..='\u{24f}' | '\u{2010}'..='\u{2027}' | '\u{2500}'..='\u{259f}' => 1,
        _ => 2,
    }
}

/// `text` without characters that a terminal would obey: what a VM or its peer says must not be able to write elsewhere on the screen.
pub(super) fn clean(text: &str) -> String {
    let shown = |char: char| {
        // Directions and marks that show nothing, or turn round what follows.
        let hidden = matches!(char, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
        if char.is_control() || hidden {
            ' '
        } else {
            char
        }
    };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_to_fit_and_says_so() {
        assert_eq!(cut("round 1", 7), "round 1");
        assert_eq!(cut("round 1", 6), "round…");
        assert_eq!(cut("12 µs", 5), "12 µs");
        assert_eq!(cut("漢字漢字", 5), "漢字…");
        assert_eq!(cut("x", 0), "");
    }

    #[test]
    fn words_stay_whole_where_they_fit() {
        assert_eq!(
            wrap("the target has less memory", 10),
            ["the target", "has less", "memory"]
        );
        assert_eq!(
            wrap("/a/very/long/path is", 9),
            ["/a/very/l", "ong/path", "is"]
        );
        assert_eq!(wrap("", 80), [""]);
        for line in wrap(&"漢".repeat(50), 21) {
            assert!(columns(&line) <= 21);
        }
    }

    #[test]
    fn nobody_else_moves_our_cursor() {
        assert_eq!(clean("a\x1b[2Jb\u{9b}c\r\n\u{202e}d"), "a [2Jb c   d");
    }

    #[test]
    fn colours_are_only_where_they_are_wanted() {
        assert_eq!(Colours(false).paint(Tone::Bad, "failed"), "failed");
        assert_eq!(
            Colours(true).paint(Tone::Bad, "failed"),
            "\x1b[31mfailed\x1b[0m"
        );
        assert_eq!(Colours(true).paint(Tone::Plain, "x"), "x");
    }
}
