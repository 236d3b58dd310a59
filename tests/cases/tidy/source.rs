//! Reading our own sources: which files there are, and what in them is code.

use std::process::Command;

use crate::root;

/// One text file of the repository.
pub(super) struct SourceFile {
    /// Path from the root of the repository, with forward slashes.
    pub(super) path: String,
    /// The whole text.
    pub(super) text: String,
}

impl SourceFile {
    pub(super) fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }
}

/// All text files that are, or without an ignore rule would be, part of the repository.
pub(super) fn files() -> Vec<SourceFile> {
    let root = root();
    let listing = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .current_dir(&root)
        .output()
        .expect("git is installed (.ci/packages)");
    assert!(
        listing.status.success(),
        "git ls-files failed: {}",
        String::from_utf8_lossy(&listing.stderr)
    );
    let paths = String::from_utf8(listing.stdout).expect("our file names are UTF-8");
    let files: Vec<_> = paths
        .split_terminator('\0')
        // Binary fixtures are no text, and a file removed but not yet committed is no file.
        .filter_map(|path| {
            let text = std::fs::read_to_string(root.join(path)).ok()?;
            Some(SourceFile {
                path: path.to_owned(),
                text,
            })
        })
        .collect();
    assert!(files.len() > 20, "only {} files found", files.len());
    files
}

/// The text with comments, string and character literals blanked out; every line keeps its number.
pub(super) fn code_only(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skipped = comment_len(rest)
            .or_else(|| literal_len(rest, code.chars().next_back()))
            .unwrap_or(0);
        if skipped == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            let (gone, left) = rest.split_at(skipped);
            code.extend(gone.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            rest = left;
        }
    }
    code
}

/// `code` up to the unit tests, which by convention stand last.
pub(super) fn without_tests(code: &str) -> &str {
    code.find("#[cfg(test)]\nmod ")
        .map_or(code, |start| &code[..start])
}

fn comment_len(text: &str) -> Option<usize> {
    if text.starts_with("//") {
        return Some(text.find('\n').unwrap_or(text.len()));
    }
    if !text.starts_with("/*") {
        return None;
    }
    let mut depth = 0_u32;
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return Some(at);
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    Some(text.len())
}

/// Length of the string or character literal that `text` starts with. A letter before it would make `r` part of a name.
fn literal_len(text: &str, before: Option<char>) -> Option<usize> {
    let in_name = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let prefix = if in_name {
        0
    } else {
        text.find(|c: char| !matches!(c, 'b' | 'c' | 'r'))
            .unwrap_or(0)
    };
    let (marks, body) = text.split_at(prefix);
    let hashes = body.len() - body.trim_start_matches('#').len();
    if marks.contains('r') && body[hashes..].starts_with('"') {
        let close = format!("\"{}", "#".repeat(hashes));
        let start = prefix + hashes + 1;
        return Some(
            text[start..]
                .find(&close)
                .map_or(text.len(), |end| start + end + close.len()),
        );
    }
    if body.starts_with('"') {
        return Some(prefix + quoted_len(body, '"'));
    }
    if body.starts_with('\'') {
        // 'a' and '\n' are characters, 'a without a closing quote is a lifetime.
        let mut chars = body.chars().skip(1);
        let is_character = chars.next() == Some('\\') || chars.next() == Some('\'');
        return is_character.then(|| prefix + quoted_len(body, '\''));
    }
    None
}

/// Length of a literal that starts with `quote`, escapes respected.
fn quoted_len(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if escaped {
            escaped = false;
        } else if c == '\\' {
            escaped = true;
        } else if c == quote {
            return at + c.len_utf8();
        }
    }
    text.len()
}

/// Line number, from 1, of the byte at `offset`.
pub(super) fn line_of(text: &str, offset: usize) -> usize {
    text[..offset].matches('\n').count() + 1
}

/// Where `word` stands in `code` as a whole word.
pub(super) fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let in_name = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |&at| {
            !code[..at].chars().next_back().is_some_and(in_name)
                && !code[at + word.len()..].chars().next().is_some_and(in_name)
        })
}

/// Every path that the `use` items of `code` name, groups written out: `use a::{b, c::d};` gives `a::b` and `a::c::d`.
pub(super) fn imports(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for at in words(code, "use") {
        let Some(end) = code[at..].find(';') else {
            continue;
        };
        let tree: String = code[at + 3..at + end]
            .chars()
            .filter(|c| !c.is_whitespace())
            .collect();
        write_out("", &tree, &mut |path| found.push((line_of(code, at), path)));
    }
    found
}

fn write_out(prefix: &str, tree: &str, found: &mut impl FnMut(String)) {
    let Some((head, group)) = tree.split_once('{') else {
        found(format!("{prefix}{tree}"));
        return;
    };
    let mut depth = 0;
    let mut start = 0;
    let group = group.strip_suffix('}').unwrap_or(group);
    let prefix = format!("{prefix}{head}");
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                write_out(&prefix, &group[start..at], found);
                start = at + 1;
            }
            _ => {}
        }
    }
    if start < group.len() {
        write_out(&prefix, &group[start..], found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_no_code() {
        let text = "let a = \"unsafe \\\" x\"; // unsafe\n/* unsafe /* nested */ unsafe */ let r#b = r#\"unsafe\"#;\n\
                    let c: &'static str = b'\\'' ; '\"' ; done";
        let code = code_only(text);
        assert_eq!(code.matches('\n').count(), text.matches('\n').count());
        assert_eq!(words(&code, "unsafe").count(), 0, "{code}");
        for kept in ["let a =", "let r#b =", "&'static str", "done"] {
            assert!(code.contains(kept), "{kept:?} is gone from {code:?}");
        }
    }

    #[test]
    fn words_are_whole() {
        let code = "unsafe_code unsafe not_unsafe unsafe{";
        assert_eq!(words(code, "unsafe").collect::<Vec<_>>(), [12, 30]);
    }

    #[test]
    fn grouped_imports_are_written_out() {
        let code = "use std::{net::TcpStream, time::{Duration, Instant}};\npub use crate::a;";
        let found: Vec<_> = imports(code).into_iter().map(|(_, path)| path).collect();
        assert_eq!(
            found,
            [
                "std::net::TcpStream",
                "std::time::Duration",
                "std::time::Instant",
                "crate::a"
            ]
        );
    }
}
