//! Cuts a byte stream into JSON objects: several per line or spread over lines, with bounds on everything.
//!
//! Junk costs one error and is skipped to the end of its line or to the next `{`, so that one typo of a person at a terminal does
//! not end the session. A text that is cut off within a string ends with its line, because JSON has no raw line breaks in strings.

use serde_json::{Map, Value};

use super::QmpError;

/// Longest object of a client, in bytes. The longest sensible command has a few hundred.
pub const OBJECT_BYTES_MAX: usize = 64 << 10;
/// Deepest nesting of objects and arrays.
pub const OBJECT_DEPTH_MAX: usize = 64;

/// Collects bytes until they make an object.
#[derive(Debug, Default)]
pub(super) struct ObjectReader {
    /// The object so far; begins with its bracket.
    partial: Vec<u8>,
    state: State,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum State {
    /// Between objects.
    #[default]
    Between,
    /// Within an object, at this nesting.
    Inside { depth: usize },
    /// Within a string of an object; `escaped` after a backslash.
    Text { depth: usize, escaped: bool },
    /// An error has been reported; the rest of it is skipped.
    Skipping,
}

impl ObjectReader {
    /// Takes `bytes` and gives what they complete: objects, and one error for each stretch of junk.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Vec<Result<Map<String, Value>, QmpError>> {
        bytes
            .iter()
            .filter_map(|byte| self.feed_byte(*byte))
            .collect()
    }

    fn feed_byte(&mut self, byte: u8) -> Option<Result<Map<String, Value>, QmpError>> {
        match self.state {
            State::Between | State::Skipping => return self.feed_outside(byte),
            State::Inside { depth } => match byte {
                b'{' | b'[' if depth == OBJECT_DEPTH_MAX => {
                    return Some(self.junk(format!("nested deeper than {OBJECT_DEPTH_MAX}")));
                }
                b'{' | b'[' => self.state = State::Inside { depth: depth + 1 },
                b'}' | b']' => self.state = State::Inside { depth: depth - 1 },
                b'"' => {
                    self.state = State::Text {
                        depth,
                        escaped: false,
                    }
                }
                _ => {}
            },
            State::Text { depth, escaped } => match byte {
                0..0x20 => {
                    return Some(
                        self.junk_at(byte, "a string is cut off or has a raw control character"),
                    );
                }
                b'"' if !escaped => self.state = State::Inside { depth },
                _ => {
                    self.state = State::Text {
                        depth,
                        escaped: byte == b'\\' && !escaped,
                    }
                }
            },
        }
        self.partial.push(byte);
        if self.state == (State::Inside { depth: 0 }) {
            return Some(self.complete());
        }
        if self.partial.len() == OBJECT_BYTES_MAX {
            return Some(self.junk(format!("an object has more than {OBJECT_BYTES_MAX} bytes")));
        }
        None
    }

    fn feed_outside(&mut self, byte: u8) -> Option<Result<Map<String, Value>, QmpError>> {
        match byte {
            // An array is read to its end too, so that nothing inside it is taken for a command.
            b'{' | b'[' => {
                self.partial.push(byte);
                self.state = State::Inside { depth: 1 };
                None
            }
            b'\n' => {
                self.state = State::Between;
                None
            }
            b' ' | b'\t' | b'\r' => None,
            _ if self.state == State::Skipping => None,
            _ => Some(self.junk("expected an object".to_owned())),
        }
    }

    fn complete(&mut self) -> Result<Map<String, Value>, QmpError> {
        match serde_json::from_slice(&self.partial) {
            Ok(object) => {
                self.partial.clear();
                self.state = State::Between;
                Ok(object)
            }
            Err(error) => self.junk(error.to_string()),
        }
    }

    /// Gives up on what has been collected.
    fn junk<T>(&mut self, problem: String) -> Result<T, QmpError> {
        self.partial = Vec::new();
        self.state = State::Skipping;
        Err(QmpError::generic(format!("JSON parse error: {problem}")))
    }

    fn junk_at<T>(&mut self, byte: u8, problem: &str) -> Result<T, QmpError> {
        let error = self.junk(problem.to_owned());
        if byte == b'\n' {
            self.state = State::Between;
        }
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `text` whole and byte by byte, which must make no difference; returns objects as text and errors as `!`.
    fn read(text: &str) -> Vec<String> {
        let show = |results: Vec<Result<Map<String, Value>, QmpError>>| -> Vec<String> {
            let show = |r: Result<Map<String, Value>, _>| {
                r.map_or_else(|_| "!".to_owned(), |o| Value::Object(o).to_string())
            };
            results.into_iter().map(show).collect()
        };
        let whole = show(ObjectReader::default().feed(text.as_bytes()));
        let mut reader = ObjectReader::default();
        let single = text.bytes().flat_map(|byte| reader.feed(&[byte])).collect();
        assert_eq!(whole, show(single), "{text:?}");
        whole
    }

    #[test]
    fn objects_may_share_a_line_or_span_lines() {
        assert_eq!(
            read("{\"a\":1}{\"b\":2} {\"c\":[{}]}\r\n"),
            ["{\"a\":1}", "{\"b\":2}", "{\"c\":[{}]}"]
        );
        assert_eq!(read("{\n\"a\"\n:\t1\n}\n"), ["{\"a\":1}"]);
        assert_eq!(read("  \n\r\n\t"), [""; 0]);
        assert_eq!(read("{\"a\":"), [""; 0]);
    }

    #[test]
    fn brackets_and_quotes_in_strings_do_not_count() {
        assert_eq!(
            read(r#"{"a":"}{\"]\\"}{"b":1}"#),
            [r#"{"a":"}{\"]\\"}"#, r#"{"b":1}"#]
        );
    }

    #[test]
    fn junk_costs_one_error_and_the_next_object_is_read() {
        assert_eq!(read("GET / HTTP/1.1\n{\"a\":1}"), ["!", "{\"a\":1}"]);
        assert_eq!(read("junk junk {\"a\":1}"), ["!", "{\"a\":1}"]);
        assert_eq!(read("{\"a\": ]}\n{\"b\":2}"), ["!", "{\"b\":2}"]);
        assert_eq!(read("{\"a\" 1} trailing\n{\"b\":2}"), ["!", "{\"b\":2}"]);
        assert_eq!(
            read("[{\"execute\":\"quit\"}]\n42\n\"text\"\n{}"),
            ["!", "!", "!", "{}"]
        );
    }

    #[test]
    fn an_unclosed_string_ends_with_its_line() {
        assert_eq!(read("{\"a\": \"oops}\n{\"b\":2}\n"), ["!", "{\"b\":2}"]);
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth: usize| {
            format!(
                "{{\"a\":{}{}}}",
                "[".repeat(depth - 1),
                "]".repeat(depth - 1)
            )
        };
        assert_eq!(read(&nested(OBJECT_DEPTH_MAX)).len(), 1);
        assert_ne!(read(&nested(OBJECT_DEPTH_MAX))[0], "!");
        assert_eq!(
            read(&format!("{}\n{{}}", nested(OBJECT_DEPTH_MAX + 1))),
            ["!", "{}"]
        );
    }

    #[test]
    fn length_is_bounded_whatever_comes() {
        let mut reader = ObjectReader::default();
        let endless = vec![b' '; OBJECT_BYTES_MAX];
        assert!(reader.feed(b"{").is_empty());
        assert!(reader.feed(&endless)[0].is_err());
        for _ in 0..100 {
            assert!(reader.feed(&endless).is_empty());
            assert!(reader.partial.capacity() <= OBJECT_BYTES_MAX);
        }
        assert!(reader.feed(b"{}")[0].is_ok());
    }

    #[test]
    fn no_bytes_make_it_panic() {
        // A small generator of its own: every run tries the same bytes.
        let mut seed = 1_u64;
        let mut reader = ObjectReader::default();
        let alphabet = b"{}[]\"\\ \n\0\xff1:,atrue\x1b";
        for _ in 0..200_000 {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let index = usize::try_from(seed >> 33).unwrap() % alphabet.len();
            let _ = reader.feed(&[alphabet[index]]);
        }
    }
}
