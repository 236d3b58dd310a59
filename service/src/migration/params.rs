//! Parameters and capabilities of a migration: QEMU's names, types and ranges.
//!
//! A change is parsed completely before any of it counts (all or nothing). Names that QEMU knows and vmferry does not support yet
//! are refused as such; anything else is refused as unknown.
//!
//! Recipe for a new parameter: a field in [`MigrationParameters`] and [`ParameterPatch`], a line in `ParameterPatch::set` and one
//! in `apply`, and its name out of [`PARAMETERS_NOT_SUPPORTED`].

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Longest blackout an operator may ask for: QEMU's limit.
pub const DOWNTIME_LIMIT_MS_MAX: u64 = 2_000_000;

/// Parameters of QEMU 11 that vmferry knows of and does not support.
pub const PARAMETERS_NOT_SUPPORTED: [&str; 28] = [
    "announce-initial",
    "announce-max",
    "announce-rounds",
    "announce-step",
    "avail-switchover-bandwidth",
    "block-bitmap-mapping",
    "cpr-exec-command",
    "cpu-throttle-increment",
    "cpu-throttle-initial",
    "cpu-throttle-tailslow",
    "direct-io",
    "max-cpu-throttle",
    "max-postcopy-bandwidth",
    "mode",
    "multifd-compression",
    "multifd-qatzip-level",
    "multifd-zlib-level",
    "multifd-zstd-level",
    "throttle-trigger-threshold",
    "tls-authz",
    "tls-creds",
    "tls-hostname",
    "vcpu-dirty-limit",
    "x-checkpoint-delay",
    "x-rdma-chunk-size",
    "x-vcpu-dirty-limit-period",
    "xbzrle-cache-size",
    "zero-page-detection",
];

/// Capabilities that are part of every vmferry migration.
const CAPABILITIES_ALWAYS_ON: [&str; 2] = ["multifd", "return-path"];

/// Capabilities of QEMU 11 that vmferry knows of and does not support.
pub const CAPABILITIES_NOT_SUPPORTED: [&str; 18] = [
    "auto-converge",
    "background-snapshot",
    "dirty-bitmaps",
    "dirty-limit",
    "late-block-activate",
    "mapped-ram",
    "pause-before-switchover",
    "postcopy-blocktime",
    "postcopy-preempt",
    "postcopy-ram",
    "rdma-pin-all",
    "release-ram",
    "switchover-ack",
    "validate-uuid",
    "x-colo",
    "x-ignore-shared",
    "xbzrle",
    "zero-copy-send",
];

/// A setting was refused and nothing was changed. The operator is at fault.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SettingError {
    /// Neither QEMU nor vmferry has it.
    #[error("there is no migration {kind} `{name}`")]
    Unknown {
        /// `parameter` or `capability`.
        kind: &'static str,
        /// As given, cut to a readable length.
        name: String,
    },
    /// QEMU has it, this version of vmferry does not.
    #[error("migration {kind} `{name}` is not supported yet")]
    NotSupported {
        /// `parameter` or `capability`.
        kind: &'static str,
        /// Which.
        name: String,
    },
    /// Part of every vmferry migration.
    #[error("migration capability `{name}` is always on and cannot be switched off")]
    AlwaysOn {
        /// Which.
        name: String,
    },
    /// Wrong type or out of range.
    #[error("migration parameter `{name}` takes {allowed}")]
    Value {
        /// Which.
        name: String,
        /// Type and range, for a reader.
        allowed: String,
    },
}

/// How to migrate.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationParameters {
    /// Data connections, 1 to 255.
    pub multifd_channels: u8,
    /// Longest predicted blackout that allows the switchover, in milliseconds, at most [`DOWNTIME_LIMIT_MS_MAX`].
    #[serde(rename = "downtime-limit")]
    pub downtime_limit_ms: u64,
    /// Most bytes sent per second while the guest runs, all connections together; 0 for no limit.
    #[serde(rename = "max-bandwidth")]
    pub max_bandwidth_bytes_per_sec: u64,
    /// Compare a hash of all RAM and the vCPU state of both sides inside the blackout, before the target may run. Costs blackout.
    pub x_verify: bool,
    /// Protect page data by CRC32C on the way. Costs one more copy per page on each side.
    pub x_checksum: bool,
}

impl Default for MigrationParameters {
    fn default() -> Self {
        Self {
            multifd_channels: 2,
            downtime_limit_ms: 300,
            max_bandwidth_bytes_per_sec: 0,
            x_verify: false,
            x_checksum: false,
        }
    }
}

impl MigrationParameters {
    /// Takes over what `patch` names.
    pub fn apply(&mut self, patch: &ParameterPatch) {
        let ParameterPatch {
            multifd_channels,
            downtime_limit_ms,
            max_bandwidth_bytes_per_sec,
            x_verify,
            x_checksum,
        } = *patch;
        self.multifd_channels = multifd_channels.unwrap_or(self.multifd_channels);
        self.downtime_limit_ms = downtime_limit_ms.unwrap_or(self.downtime_limit_ms);
        self.max_bandwidth_bytes_per_sec =
            max_bandwidth_bytes_per_sec.unwrap_or(self.max_bandwidth_bytes_per_sec);
        self.x_verify = x_verify.unwrap_or(self.x_verify);
        self.x_checksum = x_checksum.unwrap_or(self.x_checksum);
    }
}

/// A checked change of some parameters.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ParameterPatch {
    /// See [`MigrationParameters::multifd_channels`].
    pub multifd_channels: Option<u8>,
    /// See [`MigrationParameters::downtime_limit_ms`].
    pub downtime_limit_ms: Option<u64>,
    /// See [`MigrationParameters::max_bandwidth_bytes_per_sec`].
    pub max_bandwidth_bytes_per_sec: Option<u64>,
    /// See [`MigrationParameters::x_verify`].
    pub x_verify: Option<bool>,
    /// See [`MigrationParameters::x_checksum`].
    pub x_checksum: Option<bool>,
}

impl ParameterPatch {
    /// Reads the arguments of `migrate-set-parameters`.
    ///
    /// # Errors
    /// The first name that is unknown, not supported, or has a wrong value.
    pub fn parse(arguments: &Map<String, Value>) -> Result<Self, SettingError> {
        let mut patch = Self::default();
        for (name, value) in arguments {
            patch.set(name, value)?;
        }
        Ok(patch)
    }

    fn set(&mut self, name: &str, value: &Value) -> Result<(), SettingError> {
        match name {
            "multifd-channels" => {
                let channels = integer(name, value, 1, u64::from(u8::MAX))?;
                self.multifd_channels = u8::try_from(channels).ok();
            }
            "downtime-limit" => {
                self.downtime_limit_ms = Some(integer(name, value, 0, DOWNTIME_LIMIT_MS_MAX)?);
            }
            "max-bandwidth" => {
                self.max_bandwidth_bytes_per_sec = Some(integer(name, value, 0, u64::MAX)?);
            }
            "x-verify" => self.x_verify = Some(boolean(name, value)?),
            "x-checksum" => self.x_checksum = Some(boolean(name, value)?),
            _ => return Err(no_such("parameter", name, &PARAMETERS_NOT_SUPPORTED)),
        }
        Ok(())
    }
}

/// One line of `query-migrate-capabilities`, and of a request to change them.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CapabilityStatus {
    /// Name.
    pub capability: String,
    /// Whether it is on.
    pub state: bool,
}

/// What a migration may do beyond the plain.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct MigrationCapabilities {
    /// Send MIGRATION and MIGRATION_PASS events.
    pub events: bool,
}

impl MigrationCapabilities {
    /// These capabilities after `changes`, in their order.
    ///
    /// # Errors
    /// The first change that cannot be; none has been made then.
    pub fn with(mut self, changes: &[CapabilityStatus]) -> Result<Self, SettingError> {
        for CapabilityStatus { capability, state } in changes {
            match capability.as_str() {
                "events" => self.events = *state,
                name if CAPABILITIES_ALWAYS_ON.contains(&name) => {
                    if !state {
                        return Err(SettingError::AlwaysOn {
                            name: name.to_owned(),
                        });
                    }
                }
                // Switching off what is never on changes nothing, and scripts do it.
                name if CAPABILITIES_NOT_SUPPORTED.contains(&name) && !state => {}
                name => return Err(no_such("capability", name, &CAPABILITIES_NOT_SUPPORTED)),
            }
        }
        Ok(self)
    }

    /// Every capability QEMU has, for `query-migrate-capabilities`.
    pub fn list(self) -> Vec<CapabilityStatus> {
        let Self { events } = self;
        let status = |capability: &str, state| CapabilityStatus {
            capability: capability.to_owned(),
            state,
        };
        let mut list = vec![status("events", events)];
        list.extend(CAPABILITIES_ALWAYS_ON.map(|name| status(name, true)));
        list.extend(CAPABILITIES_NOT_SUPPORTED.map(|name| status(name, false)));
        list
    }
}

fn boolean(name: &str, value: &Value) -> Result<bool, SettingError> {
    value
        .as_bool()
        .ok_or_else(|| value_error(name, "true or false".to_owned()))
}

fn integer(name: &str, value: &Value, min: u64, max: u64) -> Result<u64, SettingError> {
    match value.as_u64() {
        Some(number) if (min..=max).contains(&number) => Ok(number),
        _ => Err(value_error(name, format!("an integer from {min} to {max}"))),
    }
}

fn value_error(name: &str, allowed: String) -> SettingError {
    SettingError::Value {
        name: name.to_owned(),
        allowed,
    }
}

fn no_such(kind: &'static str, name: &str, not_supported: &[&str]) -> SettingError {
    if not_supported.contains(&name) {
        SettingError::NotSupported {
            kind,
            name: name.to_owned(),
        }
    } else {
        const SHOWN: usize = 60;
        SettingError::Unknown {
            kind,
            name: name.chars().take(SHOWN).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(arguments: Value) -> Result<ParameterPatch, SettingError> {
        ParameterPatch::parse(arguments.as_object().unwrap())
    }

    #[test]
    fn a_patch_changes_only_what_it_names() {
        let mut params = MigrationParameters::default();
        params.apply(&parse(json!({"multifd-channels": 255, "x-verify": true})).unwrap());
        let expected = MigrationParameters {
            multifd_channels: 255,
            x_verify: true,
            ..Default::default()
        };
        assert_eq!(params, expected);
        params.apply(&parse(json!({"downtime-limit": 0, "max-bandwidth": u64::MAX})).unwrap());
        assert_eq!(params.downtime_limit_ms, 0);
        assert_eq!(params.max_bandwidth_bytes_per_sec, u64::MAX);
        assert_eq!(params.multifd_channels, 255);
        assert_eq!(parse(json!({})).unwrap(), ParameterPatch::default());
    }

    #[test]
    fn values_out_of_range_or_of_another_type_name_the_parameter_and_the_range() {
        for (arguments, text) in [
            (
                json!({"multifd-channels": 0}),
                "`multifd-channels` takes an integer from 1 to 255",
            ),
            (json!({"multifd-channels": 256}), "from 1 to 255"),
            (json!({"multifd-channels": "2"}), "from 1 to 255"),
            (json!({"multifd-channels": 2.5}), "from 1 to 255"),
            (json!({"multifd-channels": null}), "from 1 to 255"),
            (
                json!({"downtime-limit": 2_000_001}),
                "`downtime-limit` takes an integer from 0 to 2000000",
            ),
            (json!({"max-bandwidth": -1}), "`max-bandwidth` takes"),
            (json!({"x-verify": 1}), "`x-verify` takes true or false"),
        ] {
            let error = parse(arguments.clone()).unwrap_err().to_string();
            assert!(error.contains(text), "{arguments}: {error}");
        }
    }

    #[test]
    fn one_bad_parameter_refuses_all_of_them() {
        for bad in ["tls-creds", "nonsense"] {
            let error = parse(json!({"downtime-limit": 5, bad: 1, "max-bandwidth": 3}));
            assert!(error.unwrap_err().to_string().contains(bad));
        }
    }

    #[test]
    fn known_and_unknown_names_are_told_apart() {
        for name in PARAMETERS_NOT_SUPPORTED {
            let error = parse(json!({name: 1})).unwrap_err();
            assert!(
                error.to_string().ends_with("is not supported yet"),
                "{error}"
            );
        }
        assert!(matches!(
            parse(json!({"nope": 1})),
            Err(SettingError::Unknown { .. })
        ));
    }

    #[test]
    fn the_query_uses_qemus_names() {
        let json = serde_json::to_value(MigrationParameters::default()).unwrap();
        let expected = json!({
            "multifd-channels": 2, "downtime-limit": 300, "max-bandwidth": 0, "x-verify": false, "x-checksum": false
        });
        assert_eq!(json, expected);
        // What the query says, the setter takes.
        assert!(ParameterPatch::parse(json.as_object().unwrap()).is_ok());
    }

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
    fn the_list_has_every_capability_once() {
        let list = MigrationCapabilities { events: true }.list();
        let on: Vec<_> = list
            .iter()
            .filter(|c| c.state)
            .map(|c| c.capability.as_str())
            .collect();
        assert_eq!(on, ["events", "multifd", "return-path"]);
        let mut names: Vec<_> = list.iter().map(|c| c.capability.clone()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 21);
        // What the query says, the setter takes.
        assert!(MigrationCapabilities::default().with(&list).unwrap().events);
    }
}
