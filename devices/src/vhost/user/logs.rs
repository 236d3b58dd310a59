//! Has a back end note what it writes.

use std::io;
use std::sync::Arc;

use super::UserDevice;
use super::session::{Session, is_lost};
use crate::DeviceError;
use crate::vhost::log::{LogPages, Logs};

impl Logs for UserDevice {
    fn start_log(&mut self, pages: &Arc<LogPages>) -> Result<(), DeviceError> {
        if let Some(reason) = self.blocker() {
            return Err(DeviceError::Vetoed {
                device: self.name.clone(),
                reason,
            });
        }
        self.log = Some(Arc::clone(pages));
        if !self.running {
            return Ok(());
        }
        let told = self.ask("starting its log", |session| {
            session.set_log_base(pages)?;
            self.tell_log(session)
        });
        if told.is_err() {
            // It may have begun; the bitmap is its own as well, so it can do no harm.
            self.log = None;
        }
        told
    }

    fn stop_log(&mut self) -> Result<(), DeviceError> {
        if self.log.take().is_none() || !self.running {
            return Ok(());
        }
        match self.ask("ending its log", |session| self.tell_log(session)) {
            // One that has gone marks nothing, and the next one is not told of a log.
            Err(DeviceError::Kernel { source, .. }) if is_lost(&source) => Ok(()),
            answer => answer,
        }
    }
}

impl UserDevice {
    fn tell_log(&self, session: &Session) -> io::Result<()> {
        self.tell_features(session)?;
        for (index, queue) in self.queues.iter().enumerate() {
            if let Some(ring) = &queue.ring {
                self.tell_ring_address(session, index, ring)?;
            }
        }
        Ok(())
    }
}
