//! One client's conversation, without I/O: greeting, negotiation, the envelope of commands and replies.
//!
//! Commands are executed one after the other. A client that has asked for it may have some executed at once, out of band, while an
//! ordinary one is waited for.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::command::Command;
use super::dispatch::{self, Request};
use super::introspect;
use super::schema::VersionInfo;
use super::{ErrorClass, QmpError};

/// What a client may do depends on whether it has sent `qmp_capabilities`.
#[derive(Debug, Default)]
pub(super) struct Session {
    negotiated: bool,
    oob: bool,
}

/// What to do about an object that came in.
#[derive(Debug, PartialEq)]
pub(super) struct Step {
    pub(super) what: What,
    /// At once, not after the commands before it.
    pub(super) oob: bool,
}

/// What a [`Step`] does.
#[derive(Debug, PartialEq)]
pub(super) enum What {
    /// Send this back.
    Reply(Value),
    /// Send this back; from now on the client gets events.
    Negotiated(Value),
    /// Have the engine execute it, then send [`reply`] with this id.
    Execute {
        /// What.
        command: Command,
        /// To be echoed.
        id: Option<Value>,
    },
}

/// The first object of a session.
pub(super) fn greeting() -> Value {
    json!({ "QMP": { "version": VersionInfo::ours(), "capabilities": [dispatch::OOB] } })
}

/// The answer to a command.
pub(super) fn reply(id: Option<Value>, result: Result<Value, QmpError>) -> Value {
    let mut members = Map::new();
    match result {
        Ok(value) => members.insert("return".to_owned(), value),
        Err(error) => members.insert("error".to_owned(), json!(error)),
    };
    if let Some(id) = id {
        members.insert("id".to_owned(), id);
    }
    Value::Object(members)
}

impl Session {
    /// Whether the client may send commands before it has the answers to earlier ones, and expect some of them to overtake.
    pub(super) fn is_oob(&self) -> bool {
        self.oob
    }

    /// Takes one object of the client.
    pub(super) fn handle(&mut self, mut object: Map<String, Value>) -> Step {
        let id = object.remove("id");
        let oob = object.contains_key("exec-oob") && self.oob;
        let what = match self.request(object, oob) {
            Ok(Request::Negotiate { oob }) => {
                self.negotiated = true;
                self.oob = oob;
                What::Negotiated(reply(id, Ok(json!({}))))
            }
            Ok(Request::QueryVersion) => answer(id, VersionInfo::ours()),
            Ok(Request::QueryCommands) => answer(id, dispatch::commands()),
            Ok(Request::QuerySchema) => answer(id, introspect::schema()),
            Ok(Request::Engine(command)) => What::Execute { command, id },
            Err(error) => What::Reply(reply(id, Err(error))),
        };
        Step { what, oob }
    }

    fn request(&self, object: Map<String, Value>, oob: bool) -> Result<Request, QmpError> {
        let (name, arguments) = envelope(object, oob)?;
        match (self.negotiated, name.as_str()) {
            (false, dispatch::NEGOTIATE) => {}
            (true, dispatch::NEGOTIATE) => {
                return Err(QmpError::command_not_found("negotiation is over already"));
            }
            (false, _) => {
                let mut error = dispatch::unknown(&name);
                debug_assert_eq!(error.class, ErrorClass::CommandNotFound);
                error.desc = format!("`{}` must come first", dispatch::NEGOTIATE);
                return Err(error);
            }
            (true, _) => {}
        }
        dispatch::parse(&name, arguments, oob)
    }
}

/// Name and arguments of a command.
fn envelope(
    mut object: Map<String, Value>,
    oob: bool,
) -> Result<(String, Map<String, Value>), QmpError> {
    let key = if oob { "exec-oob" } else { "execute" };
    let name = match object.remove(key) {
        Some(Value::String(name)) => name,
        Some(_) => return Err(QmpError::generic(format!("`{key}` must be a string"))),
        None if object.contains_key("exec-oob") => {
            return Err(QmpError::generic(
                "out-of-band execution was not enabled with qmp_capabilities",
            ));
        }
        None => return Err(QmpError::generic("a command needs `execute`")),
    };
    let arguments = match object.remove("arguments") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err(QmpError::generic("`arguments` must be an object")),
    };
    match object.keys().next() {
        None => Ok((name, arguments)),
        Some(key) => {
            const SHOWN: usize = 60;
            let key: String = key.chars().take(SHOWN).collect();
            Err(QmpError::generic(format!(
                "a command has no member `{key}`"
            )))
        }
    }
}

fn answer(id: Option<Value>, value: impl Serialize) -> What {
    What::Reply(reply(id, Ok(json!(value))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(session: &mut Session, object: Value) -> What {
        let Step { what, oob } = session.handle(object.as_object().unwrap().clone());
        assert!(!oob);
        what
    }

    fn negotiated() -> Session {
        let mut session = Session::default();
        let step = handle(&mut session, json!({"execute": "qmp_capabilities"}));
        assert_eq!(step, What::Negotiated(json!({"return": {}})));
        session
    }

    fn error(step: What) -> (String, String) {
        let What::Reply(reply) = step else {
            panic!("{step:?}")
        };
        let text = |name: &str| reply["error"][name].as_str().unwrap().to_owned();
        (text("class"), text("desc"))
    }

    #[test]
    fn the_greeting_has_what_clients_look_for() {
        let greeting = greeting();
        assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64());
        assert!(
            greeting["QMP"]["version"]["package"]
                .as_str()
                .unwrap()
                .starts_with("vmferry ")
        );
        assert_eq!(greeting["QMP"]["capabilities"], json!(["oob"]));
    }

    #[test]
    fn only_negotiation_is_possible_first_and_it_is_possible_once() {
        let mut session = Session::default();
        for name in ["query-status", "nonsense", "query-version"] {
            let (class, desc) = error(handle(&mut session, json!({ "execute": name })));
            assert_eq!(class, "CommandNotFound");
            assert!(desc.contains("qmp_capabilities"));
        }
        let bad = json!({"execute": "qmp_capabilities", "arguments": {"enable": ["x"]}});
        assert_eq!(error(handle(&mut session, bad)).0, "GenericError");
        let mut session = negotiated();
        let (class, _) = error(handle(&mut session, json!({"execute": "qmp_capabilities"})));
        assert_eq!(class, "CommandNotFound");
    }

    #[test]
    fn the_id_comes_back_whatever_it_is_also_with_errors() {
        let mut session = negotiated();
        for id in [json!(1), json!("x"), json!(null), json!({"a": [1]})] {
            let step = handle(&mut session, json!({"execute": "nope", "id": id}));
            let What::Reply(reply) = step else {
                panic!("{step:?}")
            };
            assert_eq!(reply["id"], id);
            let step = handle(&mut session, json!({"execute": "stop", "id": id}));
            assert_eq!(
                step,
                What::Execute {
                    command: Command::Stop,
                    id: Some(id)
                }
            );
        }
    }

    #[test]
    fn version_and_commands_need_no_engine() {
        let mut session = negotiated();
        let What::Reply(reply) = handle(&mut session, json!({"execute": "query-commands"})) else {
            panic!()
        };
        let names: Vec<_> = reply["return"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| &c["name"])
            .collect();
        assert!(names.contains(&&json!("migrate_cancel")) && names.contains(&&json!("x-ram-hash")));
        let What::Reply(reply) = handle(&mut session, json!({"execute": "query-version"})) else {
            panic!()
        };
        assert_eq!(reply["return"]["qemu"]["major"], 11);
    }

    #[test]
    fn malformed_envelopes_are_refused() {
        let mut session = negotiated();
        for (object, part) in [
            (json!({}), "needs `execute`"),
            (json!({"execute": 1}), "must be a string"),
            (
                json!({"execute": "stop", "arguments": []}),
                "must be an object",
            ),
            (json!({"execute": "stop", "extra": 1}), "`extra`"),
            (json!({"exec-oob": "yank"}), "out-of-band"),
            (
                json!({"exec-oob": "yank", "execute": "stop"}),
                "no member `exec-oob`",
            ),
        ] {
            let (class, desc) = error(handle(&mut session, object));
            assert_eq!(class, "GenericError");
            assert!(desc.contains(part), "{desc}");
        }
    }

    #[test]
    fn what_overtakes_is_marked_and_everything_else_waits() {
        let mut session = Session::default();
        let enable = json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}});
        assert!(matches!(handle(&mut session, enable), What::Negotiated(_)));
        assert!(session.is_oob());
        let mut oob = |object: Value| session.handle(object.as_object().unwrap().clone());
        let step = oob(json!({"exec-oob": "migrate-pause", "id": 7}));
        let expected = What::Execute {
            command: Command::MigratePause,
            id: Some(json!(7)),
        };
        assert_eq!((step.what, step.oob), (expected, true));
        assert!(!oob(json!({"execute": "migrate-pause"})).oob);
        for (object, part) in [
            (
                json!({"exec-oob": "stop"}),
                "cannot be executed out of band",
            ),
            (json!({"exec-oob": 1}), "`exec-oob` must be a string"),
            (json!({"exec-oob": "yank", "execute": "x"}), "`execute`"),
        ] {
            let step = oob(object);
            assert!(step.oob);
            assert!(error(step.what).1.contains(part));
        }
    }
}
