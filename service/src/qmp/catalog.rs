//! The types of answers and events, and those that several commands share. A test holds each to what is really sent.

use super::types::{Member, Members, NOTHING, Object, Type, Variants, may, needs, object};
use crate::migration::params::{CAPABILITIES, MigrationMode};
use crate::migration::status::MigrationStatus;

const INT: Type = Type::Int;
const STR: Type = Type::Str;
const BOOL: Type = Type::Bool;

pub(super) const STATUS: Type =
    Type::Enum(|| MigrationStatus::ALL.map(MigrationStatus::name).to_vec());
pub(super) const MODE: Type = Type::Enum(|| MigrationMode::ALL.map(MigrationMode::name).to_vec());
pub(super) const TIME_UNIT: Type = Type::Enum(|| vec!["second", "millisecond"]);
pub(super) const DIRTY_RATE_MODE: Type =
    Type::Enum(|| vec!["page-sampling", "dirty-ring", "dirty-bitmap"]);
pub(super) const RESOLVE_OUTCOME: Type = Type::Enum(|| vec!["source-runs", "target-runs"]);

/// Arguments of `migrate-set-parameters`, answer of `query-migrate-parameters`.
pub(super) const PARAMETERS: Object = Object {
    members: Members::Parameters,
    variants: None,
};

pub(super) const CAPABILITY_STATUS: Type = Type::Object(&object(&[
    needs(
        "capability",
        Type::Enum(|| CAPABILITIES.iter().map(|known| known.name).collect()),
    ),
    needs("state", BOOL),
]));

pub(super) const YANK_INSTANCE: Type = Type::Object(&Object {
    members: Members::Fixed(&[needs(
        "type",
        Type::Enum(|| vec!["block-node", "chardev", "migration"]),
    )]),
    variants: Some(Variants {
        tag: "type",
        cases: &[
            ("block-node", &BLOCK_NODE),
            ("chardev", &CHARDEV),
            ("migration", &NOTHING),
        ],
    }),
});
const BLOCK_NODE: Object = object(&[needs("node-name", STR)]);
const CHARDEV: Object = object(&[needs("id", STR)]);

pub(super) const ADDED_FD: Type =
    Type::Object(&object(&[needs("fdset-id", INT), needs("fd", INT)]));
pub(super) const FD_SET_INFO: Type = Type::Object(&object(&[
    needs("fdset-id", INT),
    needs("fds", Type::List(&FD_SET_MEMBER)),
]));
const FD_SET_MEMBER: Type = Type::Object(&object(&[needs("fd", INT), may("opaque", STR)]));

pub(super) const COMMAND_INFO: Type = Type::Object(&object(&[needs("name", STR)]));
pub(super) const VERSION_INFO: Type =
    Type::Object(&object(&[needs("qemu", VERSION), needs("package", STR)]));
const VERSION: Type = Type::Object(&object(&[
    needs("major", INT),
    needs("minor", INT),
    needs("micro", INT),
]));
pub(super) const KVM_INFO: Type =
    Type::Object(&object(&[needs("enabled", BOOL), needs("present", BOOL)]));
pub(super) const NAME_INFO: Type = Type::Object(&object(&[may("name", STR)]));
pub(super) const BLOCK_INFO: Type = Type::Object(&object(&[
    needs("device", STR),
    needs("removable", BOOL),
    needs("locked", BOOL),
    needs("type", STR),
    needs("inserted", BLOCK_IMAGE_INFO),
]));
const BLOCK_IMAGE_INFO: Type = Type::Object(&object(&[
    needs("file", STR),
    needs("drv", STR),
    needs("ro", BOOL),
    needs("active", BOOL),
    needs("x-size", INT),
]));
pub(super) const UUID_INFO: Type = Type::Object(&object(&[needs("UUID", STR)]));
pub(super) const STATUS_INFO: Type = Type::Object(&object(&[
    needs("running", BOOL),
    needs(
        "status",
        Type::Enum(|| {
            vec![
                "prelaunch",
                "inmigrate",
                "running",
                "paused",
                "finish-migrate",
                "postmigrate",
                "shutdown",
                "internal-error",
            ]
        }),
    ),
]));

pub(super) const MIGRATION_INFO: Type = Type::Object(&object(&[
    may("status", STATUS),
    may("ram", RAM),
    may("vfio", VFIO),
    may("remaining", INT),
    may("total-time", INT),
    may("setup-time", INT),
    may("downtime", INT),
    may("expected-downtime", INT),
    may("cpu-throttle-percentage", INT),
    may("error-desc", STR),
    may("blocked-reasons", Type::List(&STR)),
    may("socket-address", Type::List(&SOCKET_ADDRESS)),
    may("x-blackout", BLACKOUT),
    may("x-guest-stall-us", INT),
    may("x-round", INT),
    may("x-predicted-blackout-us", INT),
    may("x-populated-source", INT),
    may("x-populated-target", INT),
    may("x-connections", INT),
    may("x-backend", STR),
    may("x-zero-copy-fallbacks", INT),
    may("x-verification", VERIFICATION),
]));
const VFIO: Type = Type::Object(&object(&[needs("transferred", INT)]));
const RAM: Type = Type::Object(&object(&[
    needs("transferred", INT),
    needs("remaining", INT),
    needs("total", INT),
    needs("duplicate", INT),
    needs("normal", INT),
    needs("normal-bytes", INT),
    needs("dirty-pages-rate", INT),
    needs("mbps", Type::Number),
    needs("dirty-sync-count", INT),
    needs("postcopy-requests", INT),
    needs("page-size", INT),
    needs("multifd-bytes", INT),
    needs("pages-per-second", INT),
    needs("precopy-bytes", INT),
    needs("downtime-bytes", INT),
    needs("postcopy-bytes", INT),
    needs("dirty-sync-missed-zero-copy", INT),
]));
const BLACKOUT: Type = Type::Object(&object(&[
    needs("total-us", INT),
    needs("pre-switchover-us", INT),
    needs("pause-us", INT),
    needs("dirty-fetch-us", INT),
    needs("last-round-us", INT),
    needs("device-state-us", INT),
    may("exec-us", INT),
    may("build-us", INT),
    needs("load-us", INT),
    needs("verify-us", INT),
    needs("commit-us", INT),
    needs("resume-us", INT),
]));
const VERIFICATION: Type = Type::Object(&object(&[
    needs("ram-hash-source", STR),
    needs("ram-hash-target", STR),
    needs("vcpus-equal", BOOL),
]));
const SOCKET_ADDRESS: Type = Type::Object(&Object {
    members: Members::Fixed(&[needs(
        "type",
        Type::Enum(|| vec!["inet", "unix", "vsock", "fd"]),
    )]),
    variants: Some(Variants {
        tag: "type",
        cases: &[
            ("inet", &INET),
            ("unix", &UNIX),
            ("vsock", &VSOCK),
            ("fd", &FD),
        ],
    }),
});
const INET: Object = object(&[needs("host", STR), needs("port", STR)]);
const UNIX: Object = object(&[needs("path", STR)]);
const VSOCK: Object = object(&[needs("cid", STR), needs("port", STR)]);
const FD: Object = object(&[needs("str", STR)]);

pub(super) const DIRTY_RATE_INFO: Type = Type::Object(&object(&[
    may("dirty-rate", INT),
    needs(
        "status",
        Type::Enum(|| vec!["unstarted", "measuring", "measured"]),
    ),
    needs("start-time", INT),
    needs("calc-time", INT),
    needs("calc-time-unit", TIME_UNIT),
    needs("sample-pages", INT),
    needs("mode", DIRTY_RATE_MODE),
    may("x-error", STR),
]));
pub(super) const BLOCKER_INFO: Type = Type::Object(&object(&[needs("id", INT)]));
pub(super) const WORKLOAD_INFO: Type = Type::Object(&object(&[
    needs("passes", INT),
    needs("errors", INT),
    may("first-error-gpa", INT),
    needs("longest-gap-us", INT),
    needs("pages-written", INT),
    needs("filled-pages", INT),
    needs("fill-pages", INT),
    needs("disk-blocks-written", INT),
    needs("disk-blocks-checked", INT),
    needs("disk-errors", INT),
]));
pub(super) const RAM_HASH_INFO: Type = Type::Object(&object(&[needs("hash", STR)]));

/// The answer to `query-qmp-schema`, described as QEMU describes it.
pub(super) const SCHEMA_INFO: Type = Type::Object(&Object {
    members: Members::Fixed(&[
        needs("name", STR),
        needs(
            "meta-type",
            Type::Enum(|| {
                vec![
                    "builtin",
                    "enum",
                    "array",
                    "object",
                    "alternate",
                    "command",
                    "event",
                ]
            }),
        ),
        may("features", Type::List(&STR)),
    ]),
    variants: Some(Variants {
        tag: "meta-type",
        cases: &[
            ("builtin", &object(&[needs("json-type", STR)])),
            (
                "enum",
                &object(&[
                    needs("members", Type::List(&SCHEMA_ENUM_MEMBER)),
                    needs("values", Type::List(&STR)),
                ]),
            ),
            ("array", &object(&[needs("element-type", STR)])),
            (
                "object",
                &object(&[
                    needs("members", Type::List(&SCHEMA_MEMBER)),
                    may("tag", STR),
                    may("variants", Type::List(&SCHEMA_VARIANT)),
                ]),
            ),
            (
                "alternate",
                &object(&[needs("members", Type::List(&SCHEMA_TYPE))]),
            ),
            (
                "command",
                &object(&[
                    needs("arg-type", STR),
                    needs("ret-type", STR),
                    may("allow-oob", BOOL),
                ]),
            ),
            ("event", &object(&[needs("arg-type", STR)])),
        ],
    }),
});
const SCHEMA_ENUM_MEMBER: Type = Type::Object(&object(&[
    needs("name", STR),
    may("features", Type::List(&STR)),
]));
/// `default` is null where a member may be left out.
const SCHEMA_MEMBER: Type = Type::Object(&object(&[
    needs("name", STR),
    needs("type", STR),
    may("default", Type::Any),
    may("features", Type::List(&STR)),
]));
const SCHEMA_VARIANT: Type = Type::Object(&object(&[needs("case", STR), needs("type", STR)]));
const SCHEMA_TYPE: Type = Type::Object(&object(&[needs("type", STR)]));

/// An event with its data.
#[derive(Debug)]
pub(super) struct DeclaredEvent {
    pub(super) name: &'static str,
    pub(super) data: &'static [Member],
}

/// Every event there is, sorted by name. Sending another one fails in debug builds.
pub(super) const EVENTS: &[DeclaredEvent] = &[
    DeclaredEvent {
        name: "MIGRATION",
        data: &[needs("status", STATUS)],
    },
    DeclaredEvent {
        name: "MIGRATION_PASS",
        data: &[needs("pass", INT)],
    },
    DeclaredEvent {
        name: "RESUME",
        data: &[],
    },
    DeclaredEvent {
        name: "SHUTDOWN",
        data: &[
            needs("guest", BOOL),
            needs(
                "reason",
                Type::Enum(|| {
                    vec![
                        "guest-shutdown",
                        "host-qmp-quit",
                        "host-signal",
                        "host-error",
                    ]
                }),
            ),
        ],
    },
    DeclaredEvent {
        name: "STOP",
        data: &[],
    },
    DeclaredEvent {
        name: "UNPLUG_PRIMARY",
        data: &[needs("device-id", STR)],
    },
    DeclaredEvent {
        name: "x-MIGRATION_UNRESOLVED",
        data: &[needs("desc", STR)],
    },
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde::Serialize;
    use serde_json::{Map, Value};

    use super::super::command::YankInstance;
    use super::super::schema::*;
    use super::*;
    use crate::fds::{AddedFd, FdSetInfo, FdSetMember};
    use crate::migration::params::{MigrationCapabilities, MigrationParameters};

    /// `answer` is of type `kind`; and if it is `whole`, it has every member that the type declares, down to the last.
    fn assert_is(kind: Type, answer: impl Serialize, whole: bool) {
        let answer = serde_json::to_value(answer).unwrap();
        assert_eq!(kind.check("answer", &answer), Ok(()), "{answer}");
        if whole {
            assert_whole(kind, &answer);
        }
    }

    fn assert_whole(kind: Type, answer: &Value) {
        match (kind, answer) {
            (Type::Object(object), Value::Object(members)) => {
                let declared: Map<String, Value> = object
                    .members()
                    .iter()
                    .map(|member| {
                        let value = members.get(member.name);
                        assert_whole(member.kind, value.unwrap_or(&Value::Null));
                        (member.name.to_owned(), Value::Null)
                    })
                    .collect();
                let names = |of: &Map<String, Value>| of.keys().cloned().collect::<BTreeSet<_>>();
                assert!(names(members).is_superset(&names(&declared)), "{answer}");
            }
            (Type::List(kind), Value::Array(items)) => {
                assert!(!items.is_empty());
                items.iter().for_each(|item| assert_whole(*kind, item));
            }
            _ => {}
        }
    }

    #[test]
    fn every_answer_has_the_members_that_its_type_declares_and_no_others() {
        let text = || "x".to_owned();
        let whole = MigrationInfo {
            status: Some(MigrationStatus::Active),
            ram: Some(RamInfo::default()),
            vfio: Some(VfioInfo::default()),
            remaining: Some(1),
            total_time: Some(u64::MAX),
            setup_time: Some(1),
            downtime: Some(1),
            expected_downtime: Some(1),
            cpu_throttle_percentage: Some(1),
            error_desc: Some(text()),
            blocked_reasons: Some(vec![text()]),
            socket_address: Some(vec![SocketAddressInfo::Unix { path: text() }]),
            x_blackout: Some(BlackoutInfo {
                exec_us: 1,
                build_us: 1,
                ..BlackoutInfo::default()
            }),
            x_guest_stall_us: Some(1),
            x_round: Some(1),
            x_predicted_blackout_us: Some(1),
            x_populated_source: Some(1),
            x_populated_target: Some(1),
            x_connections: Some(1),
            x_backend: Some(text()),
            x_zero_copy_fallbacks: Some(1),
            x_verification: Some(VerificationInfo::default()),
        };
        assert_is(MIGRATION_INFO, whole, true);
        assert_is(MIGRATION_INFO, MigrationInfo::default(), false);
        assert_is(
            DIRTY_RATE_INFO,
            DirtyRateInfo {
                dirty_rate: Some(1),
                x_error: Some(text()),
                ..DirtyRateInfo::default()
            },
            true,
        );
        assert_is(WORKLOAD_INFO, WorkloadInfo::default(), false);
        let error = WorkloadInfo {
            first_error_gpa: Some(1),
            ..WorkloadInfo::default()
        };
        assert_is(WORKLOAD_INFO, error, true);
        assert_is(RAM_HASH_INFO, RamHashInfo::default(), true);
        assert_is(VERSION_INFO, VersionInfo::ours(), true);
        assert_is(NAME_INFO, NameInfo { name: Some(text()) }, true);
        assert_is(UUID_INFO, UuidInfo { uuid: text() }, true);
        assert_is(BLOCKER_INFO, BlockerInfo { id: 1 }, true);
        assert_is(ADDED_FD, AddedFd { fdset_id: 1, fd: 2 }, true);
        let member = FdSetMember {
            fd: 1,
            opaque: Some(text()),
        };
        let set = FdSetInfo {
            fdset_id: 1,
            fds: vec![member],
        };
        assert_is(FD_SET_INFO, set, true);
    }

    #[test]
    fn settings_run_states_and_instances_are_of_the_types_declared() {
        let parameters = MigrationParameters::default();
        assert_is(Type::Object(&PARAMETERS), parameters, false);
        let capabilities = MigrationCapabilities::default().list();
        assert_is(Type::List(&CAPABILITY_STATUS), capabilities, true);
        for status in [
            RunState::Prelaunch,
            RunState::Inmigrate,
            RunState::Running,
            RunState::Paused,
            RunState::FinishMigrate,
            RunState::Postmigrate,
            RunState::Shutdown,
            RunState::InternalError,
        ] {
            let running = status == RunState::Running;
            assert_is(STATUS_INFO, StatusInfo { running, status }, true);
        }
        let text = || "x".to_owned();
        for instance in [
            YankInstance::Migration,
            YankInstance::BlockNode { node_name: text() },
            YankInstance::Chardev { id: text() },
        ] {
            assert_is(YANK_INSTANCE, instance, false);
        }
    }
}
