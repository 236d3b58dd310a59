//! Arbitrary bytes of a client against codec, session and command table: what must hold whatever it sends (I5).
//!
//! The fuzz target in `service/fuzz` calls these functions, and so does the test below on its corpus. A broken promise is a panic.

use serde_json::Value;

use super::codec::{OBJECT_BYTES_MAX, ObjectReader};
use super::command::Command;
use super::dispatch::{self, COMMANDS, Request};
use super::session::{Session, Step, What, reply};
use super::{ErrorClass, QmpError};
use crate::migration::params::{MigrationCapabilities, MigrationParameters};

/// Longest text of an error, in bytes. Errors show a part of what was wrong, or a path to it; they do not repeat it at length.
const DESC_BYTES_MAX: usize = 2 * OBJECT_BYTES_MAX;

/// A client's bytes as they arrive in pieces. The first byte says how long the pieces are, and whether the client has negotiated.
///
/// Pieces of any length give the same steps. Before the negotiation nothing reaches the engine. Whatever is answered echoes the id and
/// is either a return or an error with a class and a bounded text.
///
/// # Panics
/// If one of this does not hold.
pub fn client(bytes: &[u8]) {
    let Some((&first, stream)) = bytes.split_first() else {
        return;
    };
    let (piece, negotiated) = (usize::from(first & 0x3f) + 1, first & 0x40 != 0);
    let whole = converse(stream, usize::MAX, negotiated);
    assert_eq!(whole, converse(stream, piece, negotiated));
}

/// One command: which of the table's in the first byte, its arguments as JSON in the rest.
///
/// It is refused or understood, and what is understood of settings can be applied or is refused.
///
/// # Panics
/// If one of this does not hold.
pub fn command(bytes: &[u8]) {
    let Some((&number, text)) = bytes.split_first() else {
        return;
    };
    let Ok(Value::Object(arguments)) = serde_json::from_slice(text) else {
        return;
    };
    let name = COMMANDS[usize::from(number) % COMMANDS.len()].name;
    for oob in [false, true] {
        match dispatch::parse(name, arguments.clone(), oob) {
            Ok(Request::Engine(command)) => apply(&command),
            Ok(_) => {}
            Err(error) => check_error(&error),
        }
    }
}

fn converse(stream: &[u8], piece: usize, negotiated: bool) -> Vec<Step> {
    let mut reader = ObjectReader::default();
    let mut session = Session::default();
    if negotiated {
        let text = br#"{ "execute": "qmp_capabilities", "arguments": { "enable": ["oob"] } }"#;
        let steps = take(&mut reader, &mut session, text);
        assert!(matches!(
            steps.as_slice(),
            [Step {
                what: What::Negotiated(_),
                ..
            }]
        ));
    }
    let mut steps = Vec::new();
    let mut may_execute = negotiated;
    for bytes in stream.chunks(piece) {
        for step in take(&mut reader, &mut session, bytes) {
            let executes = matches!(step.what, What::Execute { .. });
            assert!(may_execute || !executes, "before negotiation: {step:?}");
            assert!(
                session.is_oob() || !step.oob,
                "nobody asked for it: {step:?}"
            );
            may_execute |= matches!(step.what, What::Negotiated(_));
            steps.push(step);
        }
    }
    steps
}

/// What the server does with bytes that came.
fn take(reader: &mut ObjectReader, session: &mut Session, bytes: &[u8]) -> Vec<Step> {
    let objects = reader.feed(bytes);
    assert!(objects.len() <= bytes.len());
    let steps = objects.into_iter().map(|object| match object {
        Ok(object) => {
            let id = object.get("id").cloned();
            let step = session.handle(object);
            check_step(&step, id.as_ref());
            step
        }
        Err(error) => {
            check_error(&error);
            Step {
                what: What::Reply(reply(None, Err(error))),
                oob: false,
            }
        }
    });
    steps.collect()
}

fn check_step(step: &Step, id: Option<&Value>) {
    match &step.what {
        What::Reply(answer) | What::Negotiated(answer) => check_answer(answer, id),
        What::Execute {
            command,
            id: echoed,
        } => {
            assert_eq!(echoed.as_ref(), id);
            apply(command);
        }
    }
}

fn check_answer(answer: &Value, id: Option<&Value>) {
    let Value::Object(members) = answer else {
        panic!("no object: {answer}");
    };
    assert_eq!(members.get("id"), id);
    let (returned, failed) = (members.get("return"), members.get("error"));
    assert!(returned.is_some() != failed.is_some(), "{answer}");
    if let Some(error) = failed {
        let text = |name| error.get(name).and_then(Value::as_str).map(str::len);
        assert!(text("class").is_some(), "{answer}");
        assert!(
            text("desc").is_some_and(|len| len <= DESC_BYTES_MAX),
            "{answer}"
        );
    }
}

fn check_error(error: &QmpError) {
    let answer = reply(None, Err(error.clone()));
    check_answer(&answer, None);
    assert!(!error.desc.is_empty());
    if error.class == ErrorClass::CommandNotFound {
        assert!(error.desc.len() < 300, "{error:?}");
    }
}

/// Settings are applied as the engine applies them.
fn apply(command: &Command) {
    match command {
        Command::MigrateSetParameters(patch) => {
            if let Ok(parameters) = MigrationParameters::default().with(patch) {
                // What was accepted can be told again.
                let told = serde_json::to_value(parameters);
                assert!(told.is_ok_and(|told| told.as_object().is_some_and(|all| all.len() > 5)));
            }
        }
        Command::MigrateSetCapabilities(changes) => {
            if let Ok(capabilities) = MigrationCapabilities::default().with(changes) {
                assert!(capabilities.with(changes).is_ok(), "{changes:?}");
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// What the fuzzer found worth keeping.
    fn corpus() -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/qmp");
        let files = std::fs::read_dir(folder).unwrap();
        let corpus: Vec<_> = files
            .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
            .collect();
        assert!(corpus.len() > 20, "only {} inputs found", corpus.len());
        corpus
    }

    #[test]
    fn no_input_of_the_corpus_breaks_the_session() {
        for bytes in corpus() {
            client(&bytes);
            command(&bytes);
            for cut in 0..bytes.len().min(200) {
                client(&bytes[..cut]);
            }
        }
    }

    #[test]
    fn every_command_meets_arguments_of_every_kind() {
        let texts = [
            "{}",
            r#"{"uri": "tcp:[::1]:0"}"#,
            r#"{"uri": 5}"#,
            r#"{"id": null}"#,
            r#"{"capabilities": [{"capability": "events", "state": true}]}"#,
            r#"{"downtime-limit": 1, "max-bandwidth": -1}"#,
            r#"{"channels": [{"channel-type": "main", "addr": {"transport": "socket"}}]}"#,
        ];
        for number in 0..=u8::MAX {
            for text in texts {
                command(&[&[number], text.as_bytes()].concat());
            }
        }
    }

    #[test]
    fn a_conversation_is_the_same_in_pieces_of_any_length() {
        let text = "{\"execute\": \"query-status\", \"id\": [1]} junk\n{\"execute\": \"quit\"}{\"exec-oob\": \"yank\"}\n";
        for first in 0..=u8::MAX {
            client(&[&[first], text.as_bytes()].concat());
        }
    }

    #[test]
    fn nothing_is_executed_before_the_negotiation() {
        let text = br#"{ "execute": "quit" }"#;
        let steps = converse(text, 3, false);
        assert!(
            matches!(
                &steps[..],
                [Step {
                    what: What::Reply(_),
                    oob: false
                }]
            ),
            "{steps:?}"
        );
        let steps = converse(text, 3, true);
        let quits = Step {
            what: What::Execute {
                command: Command::Quit,
                id: None,
            },
            oob: false,
        };
        assert_eq!(steps, [quits]);
    }
}
