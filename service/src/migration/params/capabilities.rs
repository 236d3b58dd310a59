//! Every migration capability in one table: which can be switched, which are always on, which only QEMU has.

use serde::{Deserialize, Serialize};

use super::{SettingError, unknown};

/// One line of `query-migrate-capabilities`, and of a request to change them.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CapabilityStatus {
    /// Name.
    pub capability: String,
    /// Whether it is on.
    pub state: bool,
}

/// What a migration may do beyond the plain. Those that are always on (`multifd`, `return-path`) are not here.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct MigrationCapabilities {
    /// Send MIGRATION and MIGRATION_PASS events.
    pub events: bool,
    /// Stop in `pre-switchover` until `migrate-continue`.
    pub pause_before_switchover: bool,
    /// The target must agree to the switchover.
    pub switchover_ack: bool,
    /// Slow the guest down if it dirties memory faster than it can be sent.
    pub auto_converge: bool,
    /// Refuse a target whose VM has another UUID.
    pub validate_uuid: bool,
    /// Accepted and kept. Block devices are activated when the guest starts, whatever it says.
    pub late_block_activate: bool,
}

/// One capability.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Capability {
    /// On QMP.
    pub(crate) name: &'static str,
    support: Support,
}

#[derive(Clone, Copy, Debug)]
enum Support {
    Switch(fn(&mut MigrationCapabilities) -> &mut bool),
    AlwaysOn,
    NotYet,
}

/// In QEMU's order.
pub(crate) const CAPABILITIES: &[Capability] = &[
    not_yet("xbzrle"),
    not_yet("rdma-pin-all"),
    switch("auto-converge", |c| &mut c.auto_converge),
    switch("events", |c| &mut c.events),
    not_yet("postcopy-ram"),
    not_yet("x-colo"),
    not_yet("release-ram"),
    always_on("return-path"),
    switch("pause-before-switchover", |c| {
        &mut c.pause_before_switchover
    }),
    always_on("multifd"),
    not_yet("dirty-bitmaps"),
    not_yet("postcopy-blocktime"),
    switch("late-block-activate", |c| &mut c.late_block_activate),
    not_yet("x-ignore-shared"),
    switch("validate-uuid", |c| &mut c.validate_uuid),
    not_yet("background-snapshot"),
    not_yet("zero-copy-send"),
    not_yet("postcopy-preempt"),
    switch("switchover-ack", |c| &mut c.switchover_ack),
    not_yet("dirty-limit"),
    not_yet("mapped-ram"),
];

const fn switch(
    name: &'static str,
    field: fn(&mut MigrationCapabilities) -> &mut bool,
) -> Capability {
    Capability {
        name,
        support: Support::Switch(field),
    }
}

const fn always_on(name: &'static str) -> Capability {
    Capability {
        name,
        support: Support::AlwaysOn,
    }
}

const fn not_yet(name: &'static str) -> Capability {
    Capability {
        name,
        support: Support::NotYet,
    }
}

impl MigrationCapabilities {
    /// These capabilities after `changes`, in their order.
    ///
    /// # Errors
    /// The first change that cannot be; none has been made then.
    pub fn with(mut self, changes: &[CapabilityStatus]) -> Result<Self, SettingError> {
        for CapabilityStatus { capability, state } in changes {
            let found = CAPABILITIES
                .iter()
                .find(|known| known.name == capability)
                .ok_or_else(|| unknown("capability", capability))?;
            let name = || found.name.to_owned();
            match (found.support, *state) {
                (Support::Switch(field), state) => *field(&mut self) = state,
                // Switching to what it is anyway changes nothing, and scripts do it.
                (Support::AlwaysOn, true) | (Support::NotYet, false) => {}
                (Support::AlwaysOn, false) => return Err(SettingError::AlwaysOn { name: name() }),
                (Support::NotYet, true) => {
                    return Err(SettingError::NotSupported {
                        kind: "capability",
                        name: name(),
                    });
                }
            }
        }
        Ok(self)
    }

    /// Every capability QEMU has, for `query-migrate-capabilities`.
    pub fn list(mut self) -> Vec<CapabilityStatus> {
        CAPABILITIES
            .iter()
            .map(|Capability { name, support }| CapabilityStatus {
                capability: (*name).to_owned(),
                state: match support {
                    Support::Switch(field) => *field(&mut self),
                    Support::AlwaysOn => true,
                    Support::NotYet => false,
                },
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(capability: &str, state: bool) -> CapabilityStatus {
        CapabilityStatus {
            capability: capability.to_owned(),
            state,
        }
    }

    #[test]
    fn capabilities_change_all_or_nothing() {
        let off = MigrationCapabilities::default();
        let on = off
            .with(&[change("events", true), change("return-path", true)])
            .unwrap();
        assert!(on.events);
        assert!(
            off.with(&[change("events", true), change("postcopy-ram", true)])
                .is_err()
        );
        assert!(off.with(&[change("multifd", false)]).is_err());
        assert!(off.with(&[change("nope", false)]).is_err());
        assert_eq!(
            off.with(&[change("xbzrle", false), change("multifd", true)]),
            Ok(off)
        );
    }

    #[test]
    fn each_capability_switches_itself_or_is_refused_by_name() {
        let off = MigrationCapabilities::default();
        let is_on = |list: Vec<CapabilityStatus>| -> Vec<String> {
            let on = list.into_iter().filter(|line| line.state);
            on.map(|line| line.capability).collect()
        };
        let before = is_on(off.list());
        assert_eq!(before, ["return-path", "multifd"]);
        let mut switched = Vec::new();
        for Capability { name, .. } in CAPABILITIES {
            match off.with(&[change(name, true)]) {
                Ok(on) if on != off => {
                    let new = is_on(on.list());
                    assert_eq!(new.len(), 3);
                    assert!(new.iter().any(|on| on == name));
                    assert_eq!(on.with(&[change(name, false)]), Ok(off));
                    switched.push(*name);
                }
                Ok(_) => assert!(before.iter().any(|on| on == name)),
                Err(error) => assert_eq!(
                    error.to_string(),
                    format!("migration capability `{name}` is not supported yet")
                ),
            }
        }
        let expected = [
            "auto-converge",
            "events",
            "pause-before-switchover",
            "late-block-activate",
            "validate-uuid",
            "switchover-ack",
        ];
        assert_eq!(switched, expected);
    }

    #[test]
    fn the_list_has_every_capability_once_and_can_be_written_back() {
        let on = MigrationCapabilities {
            events: true,
            auto_converge: true,
            ..Default::default()
        };
        let list = on.list();
        assert_eq!(MigrationCapabilities::default().with(&list), Ok(on));
        let mut names: Vec<_> = list.iter().map(|c| c.capability.clone()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 21);
    }
}
