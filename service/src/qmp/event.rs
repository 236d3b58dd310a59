//! Events: what clients are told without asking.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::catalog::EVENTS;
use crate::migration::status::MigrationStatus;

/// Something that happened, with the wall-clock time of its making.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QmpEvent {
    /// Name, in capitals.
    #[serde(rename = "event")]
    pub name: &'static str,
    /// Details; left out if there are none.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub data: Map<String, Value>,
    /// When.
    pub timestamp: Timestamp,
}

/// Wall-clock time since 1970.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct Timestamp {
    /// Whole seconds.
    pub seconds: u64,
    /// Microseconds on top, below 1,000,000.
    pub microseconds: u32,
}

impl Timestamp {
    /// The wall clock's time.
    pub fn now() -> Self {
        // A clock before 1970 is nonsense that must not stop a migration.
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or(Duration::ZERO);
        Self {
            seconds: since.as_secs(),
            microseconds: since.subsec_micros(),
        }
    }
}

/// Why the VM ends, in the words of QEMU's `ShutdownCause`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ShutdownReason {
    /// The guest shut itself down.
    GuestShutdown,
    /// A QMP client said `quit`.
    HostQmpQuit,
    /// A signal.
    HostSignal,
    /// The guest cannot go on.
    HostError,
}

impl ShutdownReason {
    /// The name on QMP.
    pub fn name(self) -> &'static str {
        match self {
            Self::GuestShutdown => "guest-shutdown",
            Self::HostQmpQuit => "host-qmp-quit",
            Self::HostSignal => "host-signal",
            Self::HostError => "host-error",
        }
    }
}

impl QmpEvent {
    /// An event of this moment. Members of `data` that is no object are lost.
    pub fn now(name: &'static str, data: Value) -> Self {
        debug_assert!(
            EVENTS.iter().any(|event| event.name == name),
            "{name} is not in the table of events"
        );
        let data = match data {
            Value::Object(members) => members,
            _ => Map::new(),
        };
        Self {
            name,
            data,
            timestamp: Timestamp::now(),
        }
    }

    /// MIGRATION: the status has changed.
    pub fn migration(status: MigrationStatus) -> Self {
        Self::now("MIGRATION", json!({ "status": status }))
    }

    /// MIGRATION_PASS: pass number `pass` begins; the first is 1.
    pub fn migration_pass(pass: u64) -> Self {
        Self::now("MIGRATION_PASS", json!({ "pass": pass }))
    }

    /// STOP: the guest has stopped.
    pub fn stop() -> Self {
        Self::now("STOP", Value::Null)
    }

    /// RESUME: the guest runs again.
    pub fn resume() -> Self {
        Self::now("RESUME", Value::Null)
    }

    /// SHUTDOWN: the VM ends.
    pub fn shutdown(reason: ShutdownReason) -> Self {
        let guest = reason == ShutdownReason::GuestShutdown;
        Self::now(
            "SHUTDOWN",
            json!({ "guest": guest, "reason": reason.name() }),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::types::object;

    #[test]
    fn events_are_shaped_as_qemu_shapes_them() {
        let json =
            serde_json::to_value(QmpEvent::migration(MigrationStatus::PreSwitchover)).unwrap();
        assert_eq!(json["event"], "MIGRATION");
        assert_eq!(json["data"], json!({"status": "pre-switchover"}));
        assert!(json["timestamp"]["seconds"].as_u64().unwrap() > 1_600_000_000);
        assert!(json["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000);

        let json = serde_json::to_value(QmpEvent::stop()).unwrap();
        assert_eq!(json.as_object().unwrap().len(), 2, "no empty data: {json}");

        let json = serde_json::to_value(QmpEvent::shutdown(ShutdownReason::HostQmpQuit)).unwrap();
        assert_eq!(
            json["data"],
            json!({"guest": false, "reason": "host-qmp-quit"})
        );
    }

    #[test]
    fn every_event_is_sent_as_the_table_declares_it() {
        assert!(EVENTS.is_sorted_by(|a, b| a.name < b.name));
        let reasons = [
            ShutdownReason::GuestShutdown,
            ShutdownReason::HostQmpQuit,
            ShutdownReason::HostSignal,
            ShutdownReason::HostError,
        ];
        let mut sent: Vec<_> = reasons.map(QmpEvent::shutdown).into();
        sent.extend(MigrationStatus::ALL.map(QmpEvent::migration));
        sent.extend([
            QmpEvent::migration_pass(1),
            QmpEvent::stop(),
            QmpEvent::resume(),
        ]);
        for event in sent {
            let declared = EVENTS
                .iter()
                .find(|known| known.name == event.name)
                .unwrap();
            assert_eq!(object(declared.data).check("", &event.data), Ok(()));
        }
    }
}
