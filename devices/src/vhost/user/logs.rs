//! Has a back end note what it writes.

use std::io;
use std::sync::Arc;

use super::UserDevice;
use super::session::{Session, is_lost};
use crate::DeviceError;
use crate::vhost::log::{LogPages, Logs, may_log};

impl Logs for UserDevice {
    fn start_log(&mut self, pages: &Arc<LogPages>) -> Result<(), DeviceError> {
        may_log(&self.name, self.blocker())?;
        self.log = Some(Arc::clone(pages));
        if !self.knows_of_a_log() {
            return Ok(());
        }
        let told = self.ask("starting its log", |session| {
            session.set_log_base(pages)?;
            self.tell_log(session)
        });
        if told.is_err() {
            // It may have begun; the bitmap is its own as well, so it can do no harm.
            (self.log, self.prepared) = (None, false);
        }
        told
    }

    fn stop_log(&mut self) -> Result<(), DeviceError> {
        if self.log.take().is_none() || !self.knows_of_a_log() {
            return Ok(());
        }
        let told = self.ask("ending its log", |session| self.tell_log(session));
        if told.is_err() {
            self.prepared = false;
        }
        match told {
            // One that has gone marks nothing, and the next one is not told of a log.
            Err(DeviceError::Kernel { source, .. }) if is_lost(&source) => Ok(()),
            answer => answer,
        }
    }
}

impl UserDevice {
    /// Whether the back end has to be told now that a log has begun or ended. Otherwise it writes nothing before it is prepared, and is told
    /// then: from there to its start is a while, in which logs come and go.
    fn knows_of_a_log(&self) -> bool {
        self.running || self.prepared
    }

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
