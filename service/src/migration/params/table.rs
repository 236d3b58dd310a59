//! Every migration parameter in one table: name, type, range, and how it gets into [`MigrationParameters`] and out again.
//!
//! Reading, the query and the introspection data are made from it.

use serde_json::{Value, json};

use super::{
    COMMAND_BYTES_MAX, DOWNTIME_LIMIT_MS_MAX, MigrationMode, MigrationParameters, SettingError,
};

/// One parameter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parameter {
    /// On QMP.
    pub(crate) name: &'static str,
    /// Type and range.
    pub(crate) shape: Shape,
    access: Access,
}

/// Names are unique, so they stand for the whole line.
impl PartialEq for Parameter {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Parameter {}

/// Type and range as QEMU has them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Shape {
    /// An integer, bounds included.
    Integer {
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
    },
    /// True or false.
    Boolean,
    /// One of these words.
    Choice(fn() -> Vec<&'static str>),
    /// A string, or null for the empty one.
    TextOrNull,
    /// A list of strings.
    Texts,
    /// A list of something of QEMU's that means nothing here.
    Anything,
}

/// Where the value is.
#[derive(Clone, Copy, Debug)]
enum Access {
    Integer(Get<u64>, Set<u64>),
    Boolean(Get<bool>, Set<bool>),
    Word(fn(&MigrationParameters) -> &'static str, SetWord),
    /// Absent from the query while empty.
    Texts(
        fn(&MigrationParameters) -> &[String],
        fn(&mut MigrationParameters, Vec<String>),
    ),
    /// Not supported: always this integer.
    FixedInteger(u64),
    /// Not supported: always off.
    FixedOff,
    /// One of the words is supported, which is this one.
    FixedWord(&'static str),
    /// Not supported: always empty.
    FixedEmpty,
    /// Not supported, and absent from the query.
    Unset,
}

type Get<T> = fn(&MigrationParameters) -> T;
type Set<T> = fn(&mut MigrationParameters, T);
/// Says whether the word is supported; changes nothing if it is not.
type SetWord = fn(&mut MigrationParameters, &str) -> bool;

/// A value that was read and is in range.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Setting {
    Integer(u64),
    Boolean(bool),
    Word(&'static str),
    Texts(Vec<String>),
    /// The value it has anyway.
    Same,
}

/// In QEMU's order, ours at the end.
pub(crate) const PARAMETERS: &[Parameter] = &[
    integer(
        "announce-initial",
        0..=100_000,
        |p| p.announce_initial_ms,
        |p, ms| p.announce_initial_ms = ms,
    ),
    integer(
        "announce-max",
        0..=100_000,
        |p| p.announce_max_ms,
        |p, ms| p.announce_max_ms = ms,
    ),
    integer(
        "announce-rounds",
        0..=1000,
        |p| p.announce_rounds,
        |p, rounds| p.announce_rounds = rounds,
    ),
    integer(
        "announce-step",
        1..=10_000,
        |p| p.announce_step_ms,
        |p, ms| p.announce_step_ms = ms,
    ),
    integer(
        "throttle-trigger-threshold",
        1..=100,
        |p| p.throttle_trigger_threshold_percent.into(),
        |p, percent| p.throttle_trigger_threshold_percent = byte(percent),
    ),
    integer(
        "cpu-throttle-initial",
        1..=99,
        |p| p.cpu_throttle_initial_percent.into(),
        |p, percent| p.cpu_throttle_initial_percent = byte(percent),
    ),
    integer(
        "cpu-throttle-increment",
        1..=99,
        |p| p.cpu_throttle_increment_percent.into(),
        |p, percent| p.cpu_throttle_increment_percent = byte(percent),
    ),
    boolean(
        "cpu-throttle-tailslow",
        |p| p.cpu_throttle_tailslow,
        |p, on| p.cpu_throttle_tailslow = on,
    ),
    integer(
        "max-cpu-throttle",
        1..=99,
        |p| p.max_cpu_throttle_percent.into(),
        |p, percent| p.max_cpu_throttle_percent = byte(percent),
    ),
    fixed("tls-creds", Shape::TextOrNull, Access::FixedEmpty),
    fixed("tls-hostname", Shape::TextOrNull, Access::FixedEmpty),
    fixed("tls-authz", Shape::TextOrNull, Access::FixedEmpty),
    integer(
        "max-bandwidth",
        0..=u64::MAX,
        |p| p.max_bandwidth_bytes_per_sec,
        |p, bytes| p.max_bandwidth_bytes_per_sec = bytes,
    ),
    integer(
        "avail-switchover-bandwidth",
        0..=u64::MAX,
        |p| p.avail_switchover_bandwidth_bytes_per_sec,
        |p, bytes| p.avail_switchover_bandwidth_bytes_per_sec = bytes,
    ),
    integer(
        "downtime-limit",
        0..=DOWNTIME_LIMIT_MS_MAX,
        |p| p.downtime_limit_ms,
        |p, ms| p.downtime_limit_ms = ms,
    ),
    fixed_integer("x-checkpoint-delay", 0..=u32::MAX as u64, 20_000),
    integer(
        "multifd-channels",
        1..=255,
        |p| p.multifd_channels.into(),
        |p, channels| p.multifd_channels = byte(channels),
    ),
    fixed(
        "multifd-compression",
        Shape::Choice(|| vec!["none", "zlib", "zstd", "qatzip", "qpl", "uadk"]),
        Access::FixedWord("none"),
    ),
    fixed_integer("multifd-zlib-level", 0..=9, 1),
    fixed_integer("multifd-zstd-level", 0..=20, 1),
    fixed_integer("multifd-qatzip-level", 1..=9, 1),
    fixed_integer("xbzrle-cache-size", 4096..=u64::MAX, 64 << 20),
    fixed_integer("max-postcopy-bandwidth", 0..=u64::MAX, 0),
    fixed("block-bitmap-mapping", Shape::Anything, Access::Unset),
    fixed_integer("x-vcpu-dirty-limit-period", 1..=1000, 1000),
    fixed_integer("vcpu-dirty-limit", 1..=u64::MAX, 1),
    Parameter {
        name: "mode",
        shape: Shape::Choice(|| MigrationMode::ALL.map(MigrationMode::name).to_vec()),
        access: Access::Word(
            |p| p.mode.name(),
            |p, word| {
                let supported = [
                    MigrationMode::Normal,
                    MigrationMode::CprReboot,
                    MigrationMode::CprTransfer,
                    MigrationMode::CprExec,
                ];
                let wanted = supported.into_iter().find(|mode| mode.name() == word);
                p.mode = wanted.unwrap_or(p.mode);
                wanted.is_some()
            },
        ),
    },
    Parameter {
        name: "zero-page-detection",
        shape: Shape::Choice(|| vec!["none", "legacy", "multifd"]),
        access: Access::Word(
            |p| match p.detect_zero_pages {
                true => "multifd",
                false => "none",
            },
            |p, word| {
                p.detect_zero_pages = word == "multifd";
                word != "legacy"
            },
        ),
    },
    fixed("direct-io", Shape::Boolean, Access::FixedOff),
    Parameter {
        name: "cpr-exec-command",
        shape: Shape::Texts,
        access: Access::Texts(
            |p| &p.cpr_exec_command,
            |p, words| p.cpr_exec_command = words,
        ),
    },
    fixed_integer("x-rdma-chunk-size", 1 << 20..=1 << 30, 1 << 20),
    boolean("x-verify", |p| p.x_verify, |p, on| p.x_verify = on),
    boolean("x-checksum", |p| p.x_checksum, |p, on| p.x_checksum = on),
];

const fn integer(
    name: &'static str,
    range: std::ops::RangeInclusive<u64>,
    get: Get<u64>,
    set: Set<u64>,
) -> Parameter {
    Parameter {
        name,
        shape: Shape::Integer {
            min: *range.start(),
            max: *range.end(),
        },
        access: Access::Integer(get, set),
    }
}

const fn boolean(name: &'static str, get: Get<bool>, set: Set<bool>) -> Parameter {
    Parameter {
        name,
        shape: Shape::Boolean,
        access: Access::Boolean(get, set),
    }
}

const fn fixed(name: &'static str, shape: Shape, access: Access) -> Parameter {
    Parameter {
        name,
        shape,
        access,
    }
}

const fn fixed_integer(
    name: &'static str,
    range: std::ops::RangeInclusive<u64>,
    value: u64,
) -> Parameter {
    let shape = Shape::Integer {
        min: *range.start(),
        max: *range.end(),
    };
    fixed(name, shape, Access::FixedInteger(value))
}

/// What a command line is made of.
fn read_texts(value: &Value) -> Option<Vec<String>> {
    let words = value.as_array()?.iter();
    let words: Option<Vec<_>> = words.map(|word| word.as_str().map(str::to_owned)).collect();
    let words = words?;
    let bytes: usize = words.iter().map(|word| word.len() + 1).sum();
    let fits = bytes <= COMMAND_BYTES_MAX && words.iter().all(|word| !word.contains('\0'));
    fits.then_some(words)
}

/// For what was found to be within the range of a byte before.
fn byte(value: u64) -> u8 {
    u8::try_from(value).unwrap_or(u8::MAX)
}

impl Parameter {
    /// Whether it can have more than one value here.
    #[cfg(test)]
    pub(super) fn is_supported(&self) -> bool {
        matches!(
            self.access,
            Access::Integer(..) | Access::Boolean(..) | Access::Word(..) | Access::Texts(..)
        )
    }

    /// As the query shows it; `None` if it does not.
    pub(super) fn value(&self, parameters: &MigrationParameters) -> Option<Value> {
        Some(match self.access {
            Access::Integer(get, _) => json!(get(parameters)),
            Access::Boolean(get, _) => json!(get(parameters)),
            Access::Word(get, _) => json!(get(parameters)),
            Access::Texts(get, _) => match get(parameters) {
                [] => return None,
                words => json!(words),
            },
            Access::FixedInteger(value) => json!(value),
            Access::FixedOff => json!(false),
            Access::FixedWord(word) => json!(word),
            Access::FixedEmpty => json!(""),
            Access::Unset => return None,
        })
    }

    /// Checks a value that an operator gave.
    pub(super) fn read(&self, value: &Value) -> Result<Setting, SettingError> {
        let setting = match self.shape {
            Shape::Integer { min, max } => {
                let number = value.as_u64().filter(|n| (min..=max).contains(n));
                number.map(Setting::Integer)
            }
            Shape::Boolean => value.as_bool().map(Setting::Boolean),
            Shape::Choice(words) => {
                let word = value
                    .as_str()
                    .and_then(|given| words().into_iter().find(|word| *word == given));
                return match word {
                    Some(word) => self.word(word),
                    None => Err(self.wrong_value()),
                };
            }
            Shape::TextOrNull if value.is_null() => Some(Setting::Same),
            Shape::TextOrNull => {
                return match value.as_str() {
                    Some("") => Ok(Setting::Same),
                    Some(_) => Err(self.not_supported()),
                    None => Err(self.wrong_value()),
                };
            }
            Shape::Texts => read_texts(value).map(Setting::Texts),
            Shape::Anything => return Err(self.not_supported()),
        };
        let setting = setting.ok_or_else(|| self.wrong_value())?;
        match (self.access, &setting) {
            (Access::FixedInteger(only), Setting::Integer(given)) if *given == only => {
                Ok(Setting::Same)
            }
            (Access::FixedOff, Setting::Boolean(false)) => Ok(Setting::Same),
            (Access::FixedInteger(_) | Access::FixedOff | Access::Unset, _) => {
                Err(self.not_supported())
            }
            _ => Ok(setting),
        }
    }

    /// Sets what [`read`](Self::read) has checked.
    pub(super) fn apply(&self, parameters: &mut MigrationParameters, setting: Setting) {
        match (self.access, setting) {
            (Access::Integer(_, set), Setting::Integer(value)) => set(parameters, value),
            (Access::Boolean(_, set), Setting::Boolean(value)) => set(parameters, value),
            (Access::Word(_, set), Setting::Word(word)) => {
                let supported = set(parameters, word);
                debug_assert!(supported, "{} was checked", self.name);
            }
            (Access::Texts(_, set), Setting::Texts(words)) => set(parameters, words),
            (_, setting) => debug_assert_eq!(setting, Setting::Same, "{}", self.name),
        }
    }

    fn word(&self, word: &'static str) -> Result<Setting, SettingError> {
        match self.access {
            Access::Word(_, set) if set(&mut MigrationParameters::default(), word) => {
                Ok(Setting::Word(word))
            }
            Access::FixedWord(only) if word == only => Ok(Setting::Same),
            _ => Err(SettingError::ValueNotSupported {
                name: self.name.to_owned(),
                value: word.to_owned(),
            }),
        }
    }

    fn not_supported(&self) -> SettingError {
        SettingError::NotSupported {
            kind: "parameter",
            name: self.name.to_owned(),
        }
    }

    fn wrong_value(&self) -> SettingError {
        let allowed = match self.shape {
            Shape::Integer { min, max } => format!("an integer from {min} to {max}"),
            Shape::Boolean => "true or false".to_owned(),
            Shape::Choice(words) => format!("one of {}", words().join(", ")),
            Shape::TextOrNull => "a string or null".to_owned(),
            Shape::Texts => {
                format!("a list of strings without NUL, at most {COMMAND_BYTES_MAX} bytes in all")
            }
            Shape::Anything => "a list".to_owned(),
        };
        SettingError::Value {
            name: self.name.to_owned(),
            allowed,
        }
    }
}
