//! The notifiers' part in a migration: told on the job thread, in the order that the cores decide.

use vmferry_devices::DeviceError;
use vmferry_devices::notifier::{Mode, Notifiers, Setup, Told};
use vmferry_transport::units::MigrationId;

use super::outgoing::chain;

/// Who was told SETUP and is owed DONE or FAILED.
///
/// The core asks for one of the two before an attempt is over. Only a process that ends in the middle of an attempt drops it; nobody is
/// told anything then, because nobody knows where the guest will run.
#[derive(Debug)]
pub(super) struct SetupTold {
    notifiers: Notifiers,
    told: Option<Told>,
}

impl SetupTold {
    /// Tells SETUP. The second value says what is still waited for, or who objects.
    pub(super) fn tell(
        notifiers: Notifiers,
        mode: Mode,
        migration: MigrationId,
    ) -> (Self, Result<Option<String>, String>) {
        match notifiers.setup(&Setup { mode, migration }) {
            Ok(told) => {
                let this = Self {
                    notifiers,
                    told: Some(told),
                };
                let pending = this.pending().map_err(|error| chain(&error));
                (this, pending)
            }
            Err(vetoed) => {
                let text = chain(&vetoed.error);
                let told = Some(vetoed.told);
                (Self { notifiers, told }, Err(text))
            }
        }
    }

    /// What is still waited for.
    pub(super) fn pending(&self) -> Result<Option<String>, DeviceError> {
        match &self.told {
            Some(told) => self.notifiers.pending(told),
            None => Ok(None),
        }
    }

    /// Tells DONE.
    pub(super) fn done(mut self) {
        if let Some(told) = self.told.take() {
            self.notifiers.done(told);
        }
    }

    /// Tells FAILED.
    pub(super) fn failed(mut self) {
        if let Some(told) = self.told.take() {
            self.notifiers.failed(told);
        }
    }
}

impl Drop for SetupTold {
    fn drop(&mut self) {
        if let Some(told) = self.told.take() {
            self.notifiers.abandon(told);
        }
    }
}
