//! Errors as QMP sends them: a class for programs, a sentence for people.

use serde::{Deserialize, Serialize};

use crate::migration::params::SettingError;

/// What kind of error, for programs. QEMU's classes.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[non_exhaustive]
pub enum ErrorClass {
    /// Anything without a class of its own.
    GenericError,
    /// No such command, or not available in this mode of the session.
    CommandNotFound,
    /// A device is in the way.
    DeviceNotActive,
    /// A device is missing.
    DeviceNotFound,
}

/// A refused or failed command. The text says what was wrong and, where there is something, what to do.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// For programs.
    pub class: ErrorClass,
    /// For people.
    pub desc: String,
}

impl QmpError {
    /// An error of class GenericError.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::GenericError,
            desc: desc.into(),
        }
    }

    /// An error of class CommandNotFound.
    pub fn command_not_found(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::CommandNotFound,
            desc: desc.into(),
        }
    }

    /// An error of class GenericError with the text of `error` and of everything below it, joined by colons.
    pub fn from_chain(error: &dyn std::error::Error) -> Self {
        let mut desc = error.to_string();
        let mut below = error.source();
        while let Some(source) = below {
            desc.push_str(": ");
            desc.push_str(&source.to_string());
            below = source.source();
        }
        Self::generic(desc)
    }
}

impl From<SettingError> for QmpError {
    fn from(error: SettingError) -> Self {
        Self::from_chain(&error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_of_causes_is_told_once_each() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot migrate")]
        struct Outer(#[source] std::io::Error);

        let error = Outer(std::io::Error::other("connection refused"));
        let error = QmpError::from_chain(&error);
        assert_eq!(error.desc, "cannot migrate: connection refused");
        let json = serde_json::to_value(&error).unwrap();
        assert_eq!(json["class"], "GenericError");
    }
}
