//! Parameters and capabilities of a migration: QEMU's names, types and ranges.
//!
//! A change is checked completely before any of it counts (all or nothing). Names that QEMU knows and vmferry does not support yet are
//! refused by name, except with the value they have anyway: tools write back what they have read. Anything else is unknown.
//!
//! Recipe for a new parameter: a field in [`MigrationParameters`], its default, and a line in `table.rs`. For a new capability: a field
//! in [`MigrationCapabilities`] and a line in `capabilities.rs`.

mod capabilities;
mod table;

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Map, Value};

pub(crate) use capabilities::CAPABILITIES;
pub use vmferry_devices::notifier::Mode as MigrationMode;

pub use capabilities::{CapabilityStatus, MigrationCapabilities};
use table::Setting;
pub(crate) use table::{PARAMETERS, Parameter, Shape};

/// Longest blackout an operator may ask for: QEMU's limit.
pub const DOWNTIME_LIMIT_MS_MAX: u64 = 2_000_000;
/// Longest `cpr-exec-command`, in bytes, with an end for each word. Linux takes 2 MiB with the environment.
pub const COMMAND_BYTES_MAX: usize = 1 << 20;

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
    /// QEMU has this value, this version of vmferry does not.
    #[error("migration parameter `{name}`: `{value}` is not supported yet")]
    ValueNotSupported {
        /// Which.
        name: String,
        /// The value.
        value: String,
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
    /// Two parameters do not go together.
    #[error("migration parameters do not fit together: {problem}")]
    Together {
        /// Both, with their values.
        problem: String,
    },
}

/// How to migrate. The names on QMP are in `table.rs`; the order here is theirs by subject.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MigrationParameters {
    /// Longest predicted blackout that allows the switchover, in milliseconds, at most [`DOWNTIME_LIMIT_MS_MAX`].
    pub downtime_limit_ms: u64,
    /// Most bytes sent per second while the guest runs, all connections together; 0 for no limit.
    pub max_bandwidth_bytes_per_sec: u64,
    /// Bytes per second to expect of the link when the blackout is predicted; 0 to go by what was measured.
    pub avail_switchover_bandwidth_bytes_per_sec: u64,
    /// Data connections, 1 to 255.
    pub multifd_channels: u8,
    /// Which kind of migration.
    pub mode: MigrationMode,
    /// The program that a migration of mode `cpr-exec` turns this process into, and its arguments; empty while there is none.
    pub cpr_exec_command: Vec<String>,
    /// Look for pages that are zero and send them without their content.
    pub detect_zero_pages: bool,

    /// Throttle the guest when it dirties more than this share of what was sent meanwhile, in percent, 1 to 100.
    pub throttle_trigger_threshold_percent: u8,
    /// First throttling, in percent of vCPU time taken away, 1 to 99.
    pub cpu_throttle_initial_percent: u8,
    /// What each further step takes away, in percentage points, 1 to 99.
    pub cpu_throttle_increment_percent: u8,
    /// Make the last steps smaller, as small as is needed.
    pub cpu_throttle_tailslow: bool,
    /// Most throttling, in percent; at least [`cpu_throttle_initial_percent`](Self::cpu_throttle_initial_percent), at most 99.
    pub max_cpu_throttle_percent: u8,

    /// Time before the second announcement on the network, in milliseconds.
    pub announce_initial_ms: u64,
    /// Longest time between two announcements, in milliseconds.
    pub announce_max_ms: u64,
    /// How many announcements.
    pub announce_rounds: u64,
    /// By how much the time between two announcements grows, in milliseconds.
    pub announce_step_ms: u64,

    /// Compare a hash of all RAM and the vCPU state of both sides inside the blackout, before the target may run. Costs blackout.
    pub x_verify: bool,
    /// Protect page data by CRC32C on the way. Costs one more copy per page on each side.
    pub x_checksum: bool,
}

impl Default for MigrationParameters {
    /// QEMU's defaults, except that `max-bandwidth` is unlimited: 128 MiB/s is a limit for the links of 2020.
    fn default() -> Self {
        Self {
            downtime_limit_ms: 300,
            max_bandwidth_bytes_per_sec: 0,
            avail_switchover_bandwidth_bytes_per_sec: 0,
            multifd_channels: 2,
            mode: MigrationMode::Normal,
            cpr_exec_command: Vec::new(),
            detect_zero_pages: true,
            throttle_trigger_threshold_percent: 50,
            cpu_throttle_initial_percent: 20,
            cpu_throttle_increment_percent: 10,
            cpu_throttle_tailslow: false,
            max_cpu_throttle_percent: 99,
            announce_initial_ms: 50,
            announce_max_ms: 550,
            announce_rounds: 5,
            announce_step_ms: 100,
            x_verify: false,
            x_checksum: false,
        }
    }
}

impl MigrationParameters {
    /// These parameters after `patch`.
    ///
    /// # Errors
    /// The result would not fit together.
    pub fn with(mut self, patch: &ParameterPatch) -> Result<Self, SettingError> {
        for (parameter, setting) in &patch.0 {
            parameter.apply(&mut self, setting.clone());
        }
        let Self {
            cpu_throttle_initial_percent: initial,
            max_cpu_throttle_percent: max,
            ..
        } = self;
        if max < initial {
            return Err(SettingError::Together {
                problem: format!(
                    "`max-cpu-throttle` ({max}) must be at least `cpu-throttle-initial` ({initial})"
                ),
            });
        }
        Ok(self)
    }
}

/// The answer to `query-migrate-parameters`: every member that QEMU always returns, and ours.
impl Serialize for MigrationParameters {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for parameter in PARAMETERS {
            if let Some(value) = parameter.value(self) {
                map.serialize_entry(parameter.name, &value)?;
            }
        }
        map.end()
    }
}

/// A checked change of some parameters. What depends on others is checked when it is applied.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ParameterPatch(Vec<(&'static Parameter, Setting)>);

impl ParameterPatch {
    /// Reads the arguments of `migrate-set-parameters`.
    ///
    /// # Errors
    /// The first name that is unknown, not supported, or has a wrong value.
    pub fn parse(arguments: &Map<String, Value>) -> Result<Self, SettingError> {
        let read = |(name, value): (&String, &Value)| {
            let parameter = PARAMETERS
                .iter()
                .find(|parameter| parameter.name == name)
                .ok_or_else(|| unknown("parameter", name))?;
            Ok((parameter, parameter.read(value)?))
        };
        arguments
            .iter()
            .map(read)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The names that are changed.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().map(|(parameter, _)| parameter.name)
    }
}

fn unknown(kind: &'static str, name: &str) -> SettingError {
    const SHOWN: usize = 60;
    SettingError::Unknown {
        kind,
        name: name.chars().take(SHOWN).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(arguments: Value) -> Result<ParameterPatch, SettingError> {
        ParameterPatch::parse(arguments.as_object().unwrap())
    }

    fn set(
        params: impl std::borrow::Borrow<MigrationParameters>,
        arguments: Value,
    ) -> MigrationParameters {
        params
            .borrow()
            .clone()
            .with(&parse(arguments).unwrap())
            .unwrap()
    }

    #[test]
    fn a_patch_changes_only_what_it_names() {
        let params = set(
            MigrationParameters::default(),
            json!({"multifd-channels": 255, "x-verify": true}),
        );
        let expected = MigrationParameters {
            multifd_channels: 255,
            x_verify: true,
            ..Default::default()
        };
        assert_eq!(params, expected);
        let params = set(
            params,
            json!({"downtime-limit": 0, "max-bandwidth": u64::MAX}),
        );
        assert_eq!(params.downtime_limit_ms, 0);
        assert_eq!(params.max_bandwidth_bytes_per_sec, u64::MAX);
        assert_eq!(params.multifd_channels, 255);
        assert_eq!(parse(json!({})).unwrap(), ParameterPatch::default());
    }

    #[test]
    fn every_parameter_reaches_a_field_of_its_own() {
        for parameter in PARAMETERS {
            let before = MigrationParameters::default();
            let new = match parameter.name {
                "mode" | "zero-page-detection" | "multifd-compression" => continue,
                _ => match parameter.shape {
                    Shape::Integer { min, max } if parameter.is_supported() => {
                        let default = parameter.value(&before).unwrap().as_u64().unwrap();
                        json!(if default == max { min + 30 } else { max })
                    }
                    Shape::Boolean if parameter.is_supported() => {
                        json!(!parameter.value(&before).unwrap().as_bool().unwrap())
                    }
                    _ => continue,
                },
            };
            let after = set(&before, json!({ parameter.name: new }));
            for other in PARAMETERS {
                let expected = match other.name == parameter.name {
                    true => Some(new.clone()),
                    false => other.value(&before),
                };
                assert_eq!(other.value(&after), expected, "{}", other.name);
            }
        }
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
            (json!({"cpu-throttle-initial": 100}), "from 1 to 99"),
            (json!({"throttle-trigger-threshold": 0}), "from 1 to 100"),
            (json!({"announce-step": 0}), "from 1 to 10000"),
            (json!({"announce-rounds": 1001}), "from 0 to 1000"),
            (json!({"x-verify": 1}), "`x-verify` takes true or false"),
            (json!({"mode": "fast"}), "`mode` takes one of normal, cpr-"),
            (json!({"mode": 1}), "`mode` takes one of"),
            (json!({"tls-creds": 1}), "`tls-creds` takes a string"),
            (json!({"cpr-exec-command": "x"}), "takes a list of strings"),
            (json!({"cpr-exec-command": ["x", 1]}), "a list of strings"),
            (json!({"cpr-exec-command": ["x\0"]}), "without NUL"),
            (
                json!({"cpr-exec-command": ["x".repeat(COMMAND_BYTES_MAX)]}),
                "bytes in all",
            ),
        ] {
            let error = parse(arguments.clone()).unwrap_err().to_string();
            assert!(error.contains(text), "{arguments}: {error}");
        }
    }

    #[test]
    fn values_that_only_qemu_has_are_refused_by_name() {
        for (arguments, text) in [
            (
                json!({"zero-page-detection": "legacy"}),
                "`zero-page-detection`: `legacy`",
            ),
            (
                json!({"multifd-compression": "zstd"}),
                "`multifd-compression`: `zstd`",
            ),
            (json!({"tls-creds": "tls0"}), "`tls-creds`"),
            (json!({"direct-io": true}), "`direct-io`"),
            (json!({"multifd-zlib-level": 9}), "`multifd-zlib-level`"),
            (
                json!({"block-bitmap-mapping": []}),
                "`block-bitmap-mapping`",
            ),
        ] {
            let error = parse(arguments.clone()).unwrap_err().to_string();
            assert!(error.contains(text), "{arguments}: {error}");
            assert!(error.ends_with("is not supported yet"), "{error}");
        }
    }

    #[test]
    fn words_reach_their_field_and_come_back() {
        let none = set(
            MigrationParameters::default(),
            json!({"zero-page-detection": "none", "mode": "normal"}),
        );
        assert!(!none.detect_zero_pages);
        let json = serde_json::to_value(&none).unwrap();
        assert_eq!(json["zero-page-detection"], "none");
        let back = set(none, json!({"zero-page-detection": "multifd"}));
        assert_eq!(back, MigrationParameters::default());
    }

    #[test]
    fn the_command_of_an_exec_is_kept_whole_and_shown_while_there_is_one() {
        let words = json!(["/opt/new", "run", "--name", "a b", ""]);
        let before = MigrationParameters::default();
        let after = set(
            before.clone(),
            json!({"cpr-exec-command": words.clone(), "mode": "cpr-exec"}),
        );
        let shown = serde_json::to_value(&after).unwrap();
        assert_eq!(
            (&shown["cpr-exec-command"], &shown["mode"]),
            (&words, &json!("cpr-exec"))
        );
        let cleared = json!({"cpr-exec-command": [], "mode": "normal"});
        assert_eq!(set(&after, cleared), before);
    }

    #[test]
    fn one_bad_parameter_refuses_all_of_them() {
        for bad in ["direct-io", "nonsense"] {
            let error = parse(json!({"downtime-limit": 5, bad: 1, "max-bandwidth": 3}));
            assert!(error.unwrap_err().to_string().contains(bad));
        }
        assert!(matches!(
            parse(json!({"nope": 1})),
            Err(SettingError::Unknown { .. })
        ));
    }

    #[test]
    fn the_throttle_limits_must_fit_whichever_of_them_changes() {
        let default = MigrationParameters::default();
        let bad = |params: &MigrationParameters, arguments: Value| {
            let error = params.clone().with(&parse(arguments).unwrap()).unwrap_err();
            assert!(error.to_string().contains("`max-cpu-throttle`"), "{error}");
        };
        bad(&default, json!({"max-cpu-throttle": 19}));
        bad(
            &default,
            json!({"max-cpu-throttle": 40, "cpu-throttle-initial": 41}),
        );
        let low = set(
            &default,
            json!({"max-cpu-throttle": 10, "cpu-throttle-initial": 10}),
        );
        bad(&low, json!({"cpu-throttle-initial": 11}));
        assert_eq!(low.max_cpu_throttle_percent, 10);
    }

    #[test]
    fn the_query_has_every_member_that_qemu_always_returns() {
        let json = serde_json::to_value(MigrationParameters::default()).unwrap();
        let expected = json!({
            "announce-initial": 50, "announce-max": 550, "announce-rounds": 5, "announce-step": 100,
            "throttle-trigger-threshold": 50, "cpu-throttle-initial": 20, "cpu-throttle-increment": 10,
            "cpu-throttle-tailslow": false, "max-cpu-throttle": 99,
            "tls-creds": "", "tls-hostname": "", "tls-authz": "",
            "max-bandwidth": 0, "avail-switchover-bandwidth": 0, "downtime-limit": 300, "x-checkpoint-delay": 20000,
            "multifd-channels": 2, "multifd-compression": "none", "multifd-zlib-level": 1, "multifd-zstd-level": 1,
            "multifd-qatzip-level": 1, "xbzrle-cache-size": 67_108_864, "max-postcopy-bandwidth": 0,
            "x-vcpu-dirty-limit-period": 1000, "vcpu-dirty-limit": 1, "mode": "normal", "zero-page-detection": "multifd",
            "direct-io": false, "x-rdma-chunk-size": 1_048_576, "x-verify": false, "x-checksum": false
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn what_the_query_says_the_setter_takes() {
        let params = set(
            MigrationParameters::default(),
            json!({"max-bandwidth": 5, "announce-step": 7}),
        );
        let json = serde_json::to_value(&params).unwrap();
        assert_eq!(set(MigrationParameters::default(), json), params);
        let cleared = json!({"tls-creds": null, "tls-hostname": "", "tls-authz": null});
        assert_eq!(set(&params, cleared), params);
    }

    #[test]
    fn the_table_has_each_name_once() {
        let mut names: Vec<_> = PARAMETERS.iter().map(|parameter| parameter.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), PARAMETERS.len());
    }
}
