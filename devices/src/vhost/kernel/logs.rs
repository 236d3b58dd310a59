//! Has a back end in the kernel note what it writes.

use std::sync::Arc;

use vhost::VhostBackend;

use super::VhostDevice;
use crate::DeviceError;
use crate::vhost::log::{LogPages, Logs, may_log};

impl Logs for VhostDevice {
    fn start_log(&mut self, pages: &Arc<LogPages>) -> Result<(), DeviceError> {
        may_log(&self.name, self.blocker())?;
        // It may be marking that one still.
        let before = self.log.replace(Arc::clone(pages));
        if !self.knows_of_a_log() {
            return Ok(());
        }
        let told = self.tell_log_base();
        if told.is_err() && self.running {
            self.log = before;
            return told;
        }
        let told = told.and_then(|()| self.tell_rings_again());
        if told.is_err() && self.prepared {
            // It marks nothing before it is prepared anew.
            (self.log, self.prepared) = (None, false);
        }
        told
    }

    fn stop_log(&mut self) -> Result<(), DeviceError> {
        let Some(log) = self.log.take() else {
            return Ok(());
        };
        if !self.knows_of_a_log() {
            return Ok(());
        }
        let answer = self.requests.set_features(self.features);
        let told = self.asked("VHOST_SET_FEATURES", answer);
        let told = told.and_then(|()| self.tell_rings_again());
        match told {
            // It may go on marking: the bitmap must stay.
            Err(_) if self.running => self.log = Some(log),
            Err(_) => self.prepared = false,
            Ok(()) => {}
        }
        told
    }
}

impl VhostDevice {
    /// Whether the kernel has to be told now that a log has begun or ended. Otherwise it writes nothing before it is prepared, and is told then:
    /// from there to its start is a while, in which logs come and go.
    fn knows_of_a_log(&self) -> bool {
        self.running || self.prepared
    }

    fn tell_rings_again(&self) -> Result<(), DeviceError> {
        let mut rings = self.queues.iter().enumerate();
        rings.try_for_each(|(index, queue)| match &queue.ring {
            Some(ring) => self.tell_ring(index, ring),
            None => Ok(()),
        })
    }
}
