//! Parts that must know how a migration goes: told SETUP before anything else happens, then DONE or FAILED.
//!
//! ```text
//! source   SETUP --- guest moves, or does not --- DONE     the target runs the guest
//!            \                               \--- FAILED   the guest stays; comes before any vCPU runs again
//!             \-- veto ------------------------- FAILED
//! target   INCOMING_FAILED                                 comes before the source can learn of the failure
//! ```
//!
//! Invariant I7: per attempt, a notifier sees SETUP first and then exactly one of DONE and FAILED. There is no exception: one that
//! vetoes, or panics in SETUP, has seen SETUP and hears FAILED like those before it, so what it began is undone in one place. Those
//! after it hear nothing. One that is registered during an attempt hears of the next attempt first; one that is unregistered during an
//! attempt still hears how that one ends, unless its SETUP has not come yet.
//!
//! An upgrade by exec has two programs, one after the other, in one process: the first tells SETUP, and FAILED if there is no exec; the
//! second tells the end to those outside ([`Notifier::after_exec`]), DONE or FAILED, so that each of them sees exactly one.
//!
//! SETUP and DONE come in the order of [`Priority`], then of registration; FAILED comes in the reverse order, because it undoes.
//!
//! Who was told SETUP is a value, [`Told`], which only [`Notifiers::done`] and [`Notifiers::failed`] consume. All calls come from the
//! thread of whoever calls [`Notifiers`], one at a time, and may block for milliseconds.

mod registry;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::BitOr;

use vmferry_transport::units::MigrationId;

use crate::DeviceError;

pub use registry::{NotifierId, Notifiers, Told, Vetoed};

/// A part of the VM that must know how a migration goes.
pub trait Notifier: Send {
    /// Name for errors and the log; must not change.
    fn name(&self) -> &str;

    /// SETUP: the source is about to migrate; the guest still runs if it ran before. What takes longer than milliseconds is only
    /// begun here and waited for by [`pending`](Self::pending).
    ///
    /// # Errors
    /// A veto: the migration does not take place. The text reaches the operator and names this part. [`failed`](Self::failed) follows.
    fn setup(&mut self, setup: &Setup) -> Result<(), DeviceError>;

    /// The device that the guest still has to let go of since SETUP; `None` once the migration may go on. Asked again and again, until
    /// it says `None` or the attempt ends; must not block.
    ///
    /// # Errors
    /// What was waited for will not happen; the migration fails, and [`failed`](Self::failed) follows.
    fn pending(&mut self) -> Result<Option<String>, DeviceError> {
        Ok(None)
    }

    /// DONE: the target runs the guest. Nothing here will run it again. Failures are logged and change nothing.
    fn done(&mut self);

    /// FAILED: the guest stays here. Undoes what SETUP did, also when SETUP failed half-way. Comes before any vCPU runs again; if the
    /// guest was not stopped yet, it runs during this call. Failures are logged and change nothing.
    fn failed(&mut self);

    /// INCOMING_FAILED, at the target: migration `migration` will not bring a guest here. Comes before the source can learn of it, so
    /// that what was taken over is given back before the source wants it. Most parts take over nothing.
    fn incoming_failed(&mut self, migration: MigrationId) {
        let _ = migration;
    }

    /// DONE or FAILED of a migration of mode cpr-exec, told by the program that the process has become: SETUP was told by the program
    /// before, and this object is another one. FAILED comes before any vCPU runs. Only who is known outside of this process has anything
    /// to do.
    fn after_exec(&mut self, migration: MigrationId, done: bool) {
        let _ = (migration, done);
    }
}

/// What SETUP tells.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Setup {
    /// How the guest is going to move.
    pub mode: Mode,
    /// Which migration it is, for external parties.
    pub migration: MigrationId,
}

/// How the guest moves; QMP's MigMode.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Mode {
    /// To another process, on this or another host, over sockets or by way of a file.
    #[default]
    Normal,
    /// By way of a file while the host reboots.
    CprReboot,
    /// To a new process on this host, which gets the memory itself.
    CprTransfer,
    /// To a new program in this process.
    CprExec,
}

impl Mode {
    /// Every mode there is.
    pub const ALL: [Self; 4] = [
        Self::Normal,
        Self::CprReboot,
        Self::CprTransfer,
        Self::CprExec,
    ];

    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::CprReboot => "cpr-reboot",
            Self::CprTransfer => "cpr-transfer",
            Self::CprExec => "cpr-exec",
        }
    }

    fn bit(self) -> u8 {
        match self {
            Self::Normal => 1,
            Self::CprReboot => 2,
            Self::CprTransfer => 4,
            Self::CprExec => 8,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The modes that a notifier wants to hear of: `Mode::CprTransfer | Mode::CprExec`, or [`Modes::ALL`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Modes(u8);

impl Modes {
    /// Every mode.
    pub const ALL: Self = Self(15);

    /// Whether `mode` is one of them.
    pub fn contains(self, mode: Mode) -> bool {
        self.0 & mode.bit() != 0
    }
}

impl From<Mode> for Modes {
    fn from(mode: Mode) -> Self {
        Self(mode.bit())
    }
}

impl BitOr for Mode {
    type Output = Modes;

    fn bitor(self, other: Self) -> Modes {
        Modes(self.bit() | other.bit())
    }
}

impl BitOr<Mode> for Modes {
    type Output = Self;

    fn bitor(self, other: Mode) -> Self {
        Self(self.0 | other.bit())
    }
}

/// When a notifier is told: SETUP and DONE from the smallest to the largest, FAILED the other way round.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Priority(pub i16);

impl Priority {
    /// Parts that only look whether the migration can take place: their vetoes cost nobody anything.
    pub const CHECK: Self = Self(0);
    /// Servers outside of this process.
    pub const SERVER: Self = Self(100);
    /// Devices and back ends that change how they work.
    pub const DEVICE: Self = Self(200);
    /// Parts that bother the guest: only when nobody else objects.
    pub const GUEST: Self = Self(300);
}
