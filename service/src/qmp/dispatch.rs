//! The command table: every name, what it takes and returns, and how its arguments become a [`Command`]. `query-commands` and
//! `query-qmp-schema` are made from it.
//!
//! Recipe for a new command: a variant in [`Command`], a parser in `command.rs` if it has arguments, a line here, its answer's type in
//! `catalog.rs`, its rule in `migration/admission.rs`, and its arm in the engine.

use serde_json::{Map, Value};

use super::QmpError;
use super::catalog;
use super::channels::CHANNELS;
use super::command::{self, Command};
use super::schema::CommandInfo;
use super::types::{Members, NOTHING, Object, Type, may, needs, object};

/// A command as a session sees it: some it answers itself.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Request {
    /// `qmp_capabilities`.
    Negotiate {
        /// Allow out-of-band commands.
        oob: bool,
    },
    /// `query-version`.
    QueryVersion,
    /// `query-commands`.
    QueryCommands,
    /// `query-qmp-schema`.
    QuerySchema,
    /// Anything about the VM.
    Engine(Command),
}

type Parser = fn(Map<String, Value>) -> Result<Request, QmpError>;

/// One line of the table.
#[derive(Debug)]
pub(super) struct Declared {
    pub(super) name: &'static str,
    pub(super) arguments: Object,
    /// Nothing means an empty object.
    pub(super) returns: Option<Type>,
    /// May be executed out of band.
    pub(super) oob: bool,
    parse: Parser,
}

/// The name of the one command that is allowed before negotiation.
pub(super) const NEGOTIATE: &str = "qmp_capabilities";
/// The one capability of a session.
pub(super) const OOB: &str = "oob";

/// Sorted by name.
pub(super) const COMMANDS: &[Declared] = &[
    with("add-fd", |a| engine(command::add_fd(a)))
        .takes(object(&[
            may("fdset-id", Type::Int),
            may("opaque", Type::Str),
        ]))
        .returns(catalog::ADDED_FD),
    with("announce-self", |a| engine(command::announce_self(a))).takes(object(&[
        may("initial", Type::Int),
        may("max", Type::Int),
        may("rounds", Type::Int),
        may("step", Type::Int),
        may("interfaces", Type::List(&Type::Str)),
        may("id", Type::Str),
    ])),
    with("calc-dirty-rate", |a| engine(command::calc_dirty_rate(a))).takes(object(&[
        needs("calc-time", Type::Int),
        may("calc-time-unit", catalog::TIME_UNIT),
        may("sample-pages", Type::Int),
        may("mode", catalog::DIRTY_RATE_MODE),
    ])),
    with("closefd", |a| engine(command::closefd(a))).takes(object(&[needs("fdname", Type::Str)])),
    with("cont", |_| engine(Ok(Command::Cont))),
    with("getfd", |a| engine(command::getfd(a))).takes(object(&[needs("fdname", Type::Str)])),
    with("migrate", |a| engine(command::migrate(a))).takes(object(&[
        may("uri", Type::Str),
        may("channels", CHANNELS),
        may("resume", Type::Bool),
    ])),
    with("migrate-continue", |a| engine(command::migrate_continue(a)))
        .takes(object(&[needs("state", catalog::STATUS)])),
    with("migrate-incoming", |a| engine(command::migrate_incoming(a))).takes(object(&[
        may("uri", Type::Str),
        may("channels", CHANNELS),
        may("exit-on-error", Type::Bool),
    ])),
    with("migrate-pause", |_| engine(Ok(Command::MigratePause))).out_of_band(),
    with("migrate-recover", |a| engine(command::migrate_recover(a)))
        .takes(object(&[needs("uri", Type::Str)]))
        .out_of_band(),
    with("migrate-set-capabilities", |a| {
        engine(command::set_capabilities(a))
    })
    .takes(object(&[needs(
        "capabilities",
        Type::List(&catalog::CAPABILITY_STATUS),
    )])),
    with("migrate-set-parameters", |a| {
        engine(command::set_parameters(a))
    })
    .takes(catalog::PARAMETERS),
    with("migrate-start-postcopy", |_| {
        engine(Ok(Command::MigrateStartPostcopy))
    }),
    with("migrate_cancel", |_| engine(Ok(Command::MigrateCancel))),
    with(NEGOTIATE, negotiate).takes(object(&[may(
        "enable",
        // Read word by word, so that a word is refused as not offered.
        Type::List(&Type::Enum(|| vec![OOB])),
    )])),
    with("query-block", |_| engine(Ok(Command::QueryBlock)))
        .returns(Type::List(&catalog::BLOCK_INFO)),
    with("query-commands", |_| Ok(Request::QueryCommands))
        .returns(Type::List(&catalog::COMMAND_INFO)),
    with("query-dirty-rate", |a| engine(command::query_dirty_rate(a)))
        .takes(object(&[may("calc-time-unit", catalog::TIME_UNIT)]))
        .returns(catalog::DIRTY_RATE_INFO),
    with("query-fdsets", |_| engine(Ok(Command::QueryFdSets)))
        .returns(Type::List(&catalog::FD_SET_INFO)),
    with("query-kvm", |_| engine(Ok(Command::QueryKvm))).returns(catalog::KVM_INFO),
    with("query-migrate", |_| engine(Ok(Command::QueryMigrate))).returns(catalog::MIGRATION_INFO),
    with("query-migrate-capabilities", |_| {
        engine(Ok(Command::QueryMigrateCapabilities))
    })
    .returns(Type::List(&catalog::CAPABILITY_STATUS)),
    with("query-migrate-parameters", |_| {
        engine(Ok(Command::QueryMigrateParameters))
    })
    .returns(Type::Object(&catalog::PARAMETERS)),
    with("query-name", |_| engine(Ok(Command::QueryName))).returns(catalog::NAME_INFO),
    with("query-qmp-schema", |_| Ok(Request::QuerySchema))
        .returns(Type::List(&catalog::SCHEMA_INFO)),
    with("query-status", |_| engine(Ok(Command::QueryStatus))).returns(catalog::STATUS_INFO),
    with("query-uuid", |_| engine(Ok(Command::QueryUuid))).returns(catalog::UUID_INFO),
    with("query-version", |_| Ok(Request::QueryVersion)).returns(catalog::VERSION_INFO),
    with("query-yank", |_| engine(Ok(Command::QueryYank)))
        .returns(Type::List(&catalog::YANK_INSTANCE))
        .out_of_band(),
    with("quit", |_| engine(Ok(Command::Quit))),
    with("remove-fd", |a| engine(command::remove_fd(a))).takes(object(&[
        needs("fdset-id", Type::Int),
        may("fd", Type::Int),
    ])),
    with("stop", |_| engine(Ok(Command::Stop))),
    with("x-add-blocker", |a| engine(command::add_blocker(a)))
        .takes(object(&[
            needs("reason", Type::Str),
            may("modes", Type::List(&catalog::MODE)),
        ]))
        .returns(catalog::BLOCKER_INFO),
    with("x-confirm-unplug", |a| engine(command::confirm_unplug(a)))
        .takes(object(&[needs("id", Type::Str)])),
    with("x-query-workload", |a| engine(command::query_workload(a)))
        .takes(object(&[may("reset", Type::Bool)]))
        .returns(catalog::WORKLOAD_INFO),
    with("x-ram-hash", |_| engine(Ok(Command::XRamHash))).returns(catalog::RAM_HASH_INFO),
    with("x-remove-blocker", |a| engine(command::remove_blocker(a)))
        .takes(object(&[needs("id", Type::Int)])),
    with("x-resolve", |a| engine(command::resolve(a)))
        .takes(object(&[needs("outcome", catalog::RESOLVE_OUTCOME)])),
    with("yank", |a| engine(command::yank(a)))
        .takes(object(&[needs(
            "instances",
            Type::List(&catalog::YANK_INSTANCE),
        )]))
        .out_of_band(),
];

const fn with(name: &'static str, parse: Parser) -> Declared {
    Declared {
        name,
        arguments: NOTHING,
        returns: None,
        oob: false,
        parse,
    }
}

impl Declared {
    const fn takes(mut self, arguments: Object) -> Self {
        self.arguments = arguments;
        self
    }

    const fn returns(mut self, kind: Type) -> Self {
        self.returns = Some(kind);
        self
    }

    const fn out_of_band(mut self) -> Self {
        self.oob = true;
        self
    }
}

/// Reads a command by name. `oob`: it is to be executed out of band.
pub(super) fn parse(
    name: &str,
    arguments: Map<String, Value>,
    oob: bool,
) -> Result<Request, QmpError> {
    let found = COMMANDS
        .binary_search_by_key(&name, |declared| declared.name)
        .map_err(|_| unknown(name))?;
    let declared = &COMMANDS[found];
    if oob && !declared.oob {
        return Err(QmpError::generic(format!(
            "`{}` cannot be executed out of band",
            declared.name
        )));
    }
    // Parameters tell apart what does not exist and what is not supported, and name ranges.
    if !matches!(declared.arguments.members, Members::Parameters) {
        declared
            .arguments
            .check("", &arguments)
            .map_err(|problem| QmpError::generic(format!("argument {problem}")))?;
    }
    (declared.parse)(arguments)
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
        .map(|declared| CommandInfo {
            name: declared.name.to_owned(),
        })
        .collect()
}

fn engine(command: Result<Command, QmpError>) -> Result<Request, QmpError> {
    command.map(Request::Engine)
}

fn negotiate(arguments: Map<String, Value>) -> Result<Request, QmpError> {
    // The only word there is, says the type.
    let wanted = arguments.get("enable").and_then(Value::as_array);
    Ok(Request::Negotiate {
        oob: wanted.is_some_and(|words| !words.is_empty()),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::migration::params::{CapabilityStatus, MigrationMode, ParameterPatch};
    use crate::migration::status::MigrationStatus;
    use crate::qmp::ErrorClass;
    use crate::qmp::command::{ResolveOutcome, TimeUnit, YankInstance};

    fn engine(name: &str, arguments: Value) -> Result<Command, QmpError> {
        match parse(name, arguments.as_object().unwrap().clone(), false)? {
            Request::Engine(command) => Ok(command),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_table_is_sorted_so_that_every_command_is_found() {
        assert!(COMMANDS.is_sorted_by(|a, b| a.name < b.name));
        for info in commands() {
            let class = parse(&info.name, Map::new(), false)
                .err()
                .map(|error| error.class);
            assert_ne!(class, Some(ErrorClass::CommandNotFound), "{}", info.name);
        }
    }

    #[test]
    fn arguments_become_typed_commands() {
        let address = || "tcp:[::1]:4".parse().unwrap();
        for (name, arguments, expected) in [
            ("stop", json!({}), Command::Stop),
            // Where to is for the engine to ask: mode cpr-exec has no such place.
            (
                "migrate",
                json!({}),
                Command::Migrate {
                    address: None,
                    cpr: None,
                    resume: false,
                },
            ),
            (
                "migrate",
                json!({"uri": "tcp:[::1]:4"}),
                Command::Migrate {
                    address: Some(address()),
                    cpr: None,
                    resume: false,
                },
            ),
            (
                "migrate",
                json!({"resume": true, "channels": [{"channel-type": "main", "addr":
                    {"transport": "socket", "type": "inet", "host": "::1", "port": "4"}}]}),
                Command::Migrate {
                    address: Some(address()),
                    cpr: None,
                    resume: true,
                },
            ),
            (
                "migrate-incoming",
                json!({"uri": "tcp:[::1]:4"}),
                Command::MigrateIncoming {
                    address: address(),
                    exit_on_error: true,
                },
            ),
            (
                "migrate-incoming",
                json!({"uri": "tcp:[::1]:4", "exit-on-error": false}),
                Command::MigrateIncoming {
                    address: address(),
                    exit_on_error: false,
                },
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
                "migrate-continue",
                json!({"state": "pre-switchover"}),
                Command::MigrateContinue {
                    state: MigrationStatus::PreSwitchover,
                },
            ),
            (
                "query-dirty-rate",
                json!({"calc-time-unit": "millisecond"}),
                Command::QueryDirtyRate {
                    unit: TimeUnit::Millisecond,
                },
            ),
            (
                "yank",
                json!({"instances": [{"type": "migration"}, {"type": "chardev", "id": "a"}]}),
                Command::Yank {
                    instances: vec![
                        YankInstance::Migration,
                        YankInstance::Chardev { id: "a".into() },
                    ],
                },
            ),
            (
                "add-fd",
                json!({"fdset-id": 7}),
                Command::AddFd {
                    set: Some(7),
                    opaque: None,
                },
            ),
            (
                "x-add-blocker",
                json!({"reason": "no", "modes": ["normal"]}),
                Command::XAddBlocker {
                    reason: "no".into(),
                    modes: vec![MigrationMode::Normal],
                },
            ),
            (
                "x-query-workload",
                json!({}),
                Command::XQueryWorkload { reset: false },
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
            ("stop", json!({"now": true}), "`now` is unknown"),
            ("migrate-incoming", json!({}), "either `uri` or `channels`"),
            ("migrate", json!({"uri": 5}), "argument `uri`"),
            ("migrate", json!({"uri": "tcp:x"}), "port is missing"),
            (
                "migrate",
                json!({"uri": "unix:x", "channels": []}),
                "not both",
            ),
            (
                "migrate",
                json!({"channels": [{"channel-type": "main", "addr": {"transport": "socket"}}]}),
                "`channels[0].addr.type` is missing",
            ),
            (
                "migrate",
                json!({"uri": "unix:x", "detach": true}),
                "`detach`",
            ),
            (
                "migrate-incoming",
                json!({"uri": "unix:x", "exit-on-error": 1}),
                "`exit-on-error`",
            ),
            (
                "migrate-continue",
                json!({"state": "postmigrate"}),
                "`state`",
            ),
            ("migrate-set-parameters", json!({"nope": 1}), "`nope`"),
            ("migrate-set-capabilities", json!({}), "`capabilities`"),
            (
                "migrate-set-capabilities",
                json!({"capabilities": [{"capability": "events", "state": 1}]}),
                "`capabilities[0].state`",
            ),
            ("announce-self", json!({"rounds": -1}), "`rounds`"),
            ("x-resolve", json!({"outcome": "maybe"}), "`maybe`"),
            ("x-query-workload", json!({"reset": "yes"}), "`reset`"),
            (
                "yank",
                json!({"instances": [{"type": "chardev"}]}),
                "`instances[0].id`",
            ),
        ] {
            let error = engine(name, arguments).unwrap_err();
            assert_eq!(error.class, ErrorClass::GenericError);
            assert!(error.desc.contains(part), "{name}: {}", error.desc);
        }
    }

    /// Null in place of a missing argument is no argument of QMP.
    #[test]
    fn null_stands_for_nothing_only_where_the_type_says_so() {
        assert!(engine("query-dirty-rate", json!({"calc-time-unit": null})).is_err());
        assert!(engine("migrate-set-parameters", json!({"tls-creds": null})).is_ok());
    }

    #[test]
    fn unknown_commands_have_their_own_class() {
        let error = parse("nope", Map::new(), false).unwrap_err();
        assert_eq!(error.class, ErrorClass::CommandNotFound);
        let long = parse(&"x".repeat(60_000), Map::new(), false).unwrap_err();
        assert!(long.desc.len() < 200);
    }

    #[test]
    fn only_what_cannot_wait_may_be_executed_out_of_band() {
        let allowed: Vec<_> = COMMANDS
            .iter()
            .filter(|declared| {
                let text = format!("`{}` cannot be executed out of band", declared.name);
                parse(declared.name, Map::new(), true)
                    .err()
                    .is_none_or(|error| error.desc != text)
            })
            .map(|declared| declared.name)
            .collect();
        assert_eq!(
            allowed,
            ["migrate-pause", "migrate-recover", "query-yank", "yank"]
        );
    }

    #[test]
    fn the_one_session_capability_is_enabled_by_its_name() {
        let enable = |list: Value| {
            let arguments = json!({ "enable": list });
            parse(NEGOTIATE, arguments.as_object().unwrap().clone(), false)
        };
        assert_eq!(enable(json!([])), Ok(Request::Negotiate { oob: false }));
        assert_eq!(enable(json!(["oob"])), Ok(Request::Negotiate { oob: true }));
        let error = enable(json!(["oob", "fast"])).unwrap_err();
        assert!(error.desc.contains("`fast`"), "{}", error.desc);
    }
}
