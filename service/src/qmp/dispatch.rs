//! The command table: every name, and how its arguments are read. `query-commands` is made from it.
//!
//! Recipe for a new command: a variant in [`Command`], a parser in `command.rs` if it has arguments, a line here, and its arm in
//! the engine.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::QmpError;
use super::command::{self, Command};
use super::schema::CommandInfo;

/// A command as a session sees it: some it answers itself.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Request {
    /// `qmp_capabilities`.
    Negotiate,
    /// `query-version`.
    QueryVersion,
    /// `query-commands`.
    QueryCommands,
    /// Anything about the VM.
    Engine(Command),
}

type Parser = fn(Map<String, Value>) -> Result<Request, QmpError>;

/// Sorted by name.
const COMMANDS: &[(&str, Parser)] = &[
    ("cont", |a| plain(a, Command::Cont)),
    ("migrate", |a| command::migrate(a).map(Request::Engine)),
    ("migrate-continue", |a| {
        command::migrate_continue(a).map(Request::Engine)
    }),
    ("migrate-incoming", |a| {
        command::migrate_incoming(a).map(Request::Engine)
    }),
    ("migrate-set-capabilities", |a| {
        command::set_capabilities(a).map(Request::Engine)
    }),
    ("migrate-set-parameters", |a| {
        command::set_parameters(a).map(Request::Engine)
    }),
    ("migrate_cancel", |a| plain(a, Command::MigrateCancel)),
    ("qmp_capabilities", negotiate),
    ("query-commands", |a| {
        command::no_arguments(a).map(|()| Request::QueryCommands)
    }),
    ("query-kvm", |a| plain(a, Command::QueryKvm)),
    ("query-migrate", |a| plain(a, Command::QueryMigrate)),
    ("query-migrate-capabilities", |a| {
        plain(a, Command::QueryMigrateCapabilities)
    }),
    ("query-migrate-parameters", |a| {
        plain(a, Command::QueryMigrateParameters)
    }),
    ("query-name", |a| plain(a, Command::QueryName)),
    ("query-status", |a| plain(a, Command::QueryStatus)),
    ("query-version", |a| {
        command::no_arguments(a).map(|()| Request::QueryVersion)
    }),
    ("quit", |a| plain(a, Command::Quit)),
    ("stop", |a| plain(a, Command::Stop)),
    ("x-confirm-unplug", |a| {
        command::confirm_unplug(a).map(Request::Engine)
    }),
    ("x-query-workload", |a| {
        command::query_workload(a).map(Request::Engine)
    }),
    ("x-ram-hash", |a| plain(a, Command::XRamHash)),
    ("x-resolve", |a| command::resolve(a).map(Request::Engine)),
];

/// The name of the one command that is allowed before negotiation.
pub(super) const NEGOTIATE: &str = "qmp_capabilities";

/// Reads a command by name.
pub(super) fn parse(name: &str, arguments: Map<String, Value>) -> Result<Request, QmpError> {
    match COMMANDS.binary_search_by_key(&name, |(name, _)| name) {
        Ok(found) => COMMANDS[found].1(arguments),
        Err(_) => Err(unknown(name)),
    }
}

/// No such command, here or now.
pub(super) fn unknown(name: &str) -> QmpError {
    const SHOWN: usize = 60;
    let name: String = name.chars().take(SHOWN).collect();
    QmpError::command_not_found(format!("there is no command `{name}`"))
}

/// The answer to `query-commands`.
pub(super) fn commands() -> Vec<CommandInfo> {
    COMMANDS
        .iter()
        .map(|(name, _)| CommandInfo {
            name: (*name).to_owned(),
        })
        .collect()
}

fn plain(arguments: Map<String, Value>, command: Command) -> Result<Request, QmpError> {
    command::no_arguments(arguments)?;
    Ok(Request::Engine(command))
}

fn negotiate(arguments: Map<String, Value>) -> Result<Request, QmpError> {
    #[derive(Debug, Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Arguments {
        enable: Vec<String>,
    }

    let Arguments { enable } = command::arguments(arguments)?;
    match enable.first() {
        None => Ok(Request::Negotiate),
        Some(name) => {
            let text = format!("capability `{name}` was not offered in the greeting");
            Err(QmpError::generic(text))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::migration::params::{CapabilityStatus, ParameterPatch};
    use crate::qmp::ErrorClass;
    use crate::qmp::command::ResolveOutcome;

    fn engine(name: &str, arguments: Value) -> Result<Command, QmpError> {
        match parse(name, arguments.as_object().unwrap().clone())? {
            Request::Engine(command) => Ok(command),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_table_is_sorted_so_that_every_command_is_found() {
        assert!(COMMANDS.is_sorted_by(|a, b| a.0 < b.0));
        for info in commands() {
            let class = parse(&info.name, Map::new()).err().map(|error| error.class);
            assert_ne!(class, Some(ErrorClass::CommandNotFound), "{}", info.name);
        }
    }

    #[test]
    fn arguments_become_typed_commands() {
        let uri = "tcp:[::1]:4".parse().unwrap();
        for (name, arguments, expected) in [
            ("stop", json!({}), Command::Stop),
            (
                "migrate",
                json!({"uri": "tcp:[::1]:4"}),
                Command::Migrate { uri },
            ),
            (
                "migrate-set-parameters",
                json!({"multifd-channels": 4}),
                Command::MigrateSetParameters(
                    ParameterPatch::parse(json!({"multifd-channels": 4}).as_object().unwrap())
                        .unwrap(),
                ),
            ),
            (
                "migrate-set-capabilities",
                json!({"capabilities": [{"capability": "events", "state": true}]}),
                Command::MigrateSetCapabilities(vec![CapabilityStatus {
                    capability: "events".into(),
                    state: true,
                }]),
            ),
            (
                "x-query-workload",
                json!({}),
                Command::XQueryWorkload { reset: false },
            ),
            (
                "x-query-workload",
                json!({"reset": true}),
                Command::XQueryWorkload { reset: true },
            ),
            (
                "x-resolve",
                json!({"outcome": "target-runs"}),
                Command::XResolve {
                    outcome: ResolveOutcome::TargetRuns,
                },
            ),
        ] {
            assert_eq!(engine(name, arguments).unwrap(), expected);
        }
    }

    #[test]
    fn bad_arguments_are_named() {
        for (name, arguments, part) in [
            ("stop", json!({"now": true}), "`now`"),
            ("migrate", json!({}), "`uri` is missing"),
            ("migrate", json!({"uri": 5}), "argument `uri`"),
            ("migrate", json!({"uri": "tcp:x"}), "port is missing"),
            (
                "migrate",
                json!({"uri": "unix:x", "channels": []}),
                "not both",
            ),
            (
                "migrate",
                json!({"channels": []}),
                "`channels` is not supported",
            ),
            (
                "migrate",
                json!({"uri": "unix:x", "resume": true}),
                "`resume` is not supported",
            ),
            (
                "migrate",
                json!({"uri": "unix:x", "detach": true}),
                "`detach`",
            ),
            (
                "migrate-incoming",
                json!({"uri": "unix:x", "exit-on-error": true}),
                "`exit-on-error`",
            ),
            ("migrate-set-parameters", json!({"nope": 1}), "`nope`"),
            ("migrate-set-capabilities", json!({}), "`capabilities`"),
            (
                "migrate-set-capabilities",
                json!({"capabilities": [{"capability": "events", "state": 1}]}),
                "`capabilities[0].state`",
            ),
            ("x-resolve", json!({"outcome": "maybe"}), "`maybe`"),
            ("x-query-workload", json!({"reset": "yes"}), "`reset`"),
        ] {
            let error = engine(name, arguments).unwrap_err();
            assert_eq!(error.class, ErrorClass::GenericError);
            assert!(error.desc.contains(part), "{name}: {}", error.desc);
        }
    }

    #[test]
    fn unknown_commands_have_their_own_class() {
        let error = parse("nope", Map::new()).unwrap_err();
        assert_eq!(error.class, ErrorClass::CommandNotFound);
        assert!(
            parse(&"x".repeat(60_000), Map::new())
                .unwrap_err()
                .desc
                .len()
                < 200
        );
    }

    #[test]
    fn no_session_capability_can_be_enabled() {
        let enable = |list: Value| {
            parse(
                NEGOTIATE,
                json!({ "enable": list }).as_object().unwrap().clone(),
            )
        };
        assert_eq!(enable(json!([])).unwrap(), Request::Negotiate);
        assert!(enable(json!(["oob"])).unwrap_err().desc.contains("`oob`"));
    }
}
