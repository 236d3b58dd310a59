//! What differs for an attempt whose memory stays where it is: who gets the descriptors, and who the target is.

use vmferry_transport::wire::frame::SourceFrame;

use super::Outgoing;
use crate::engine::info::blackout;
use crate::engine::successor::{Answer, InPlace};
use crate::succession::Account;
use crate::succession::account::now_us;

impl Outgoing {
    /// Job `OfferFds` of the core.
    pub(super) fn offer_fds(&mut self) {
        let (id, report) = (self.core.migration_id(), self.reporter());
        match (&self.keep, &mut self.in_place) {
            (Some(keep), _) => keep.write_ahead(report),
            (None, Some(InPlace::Process(hand_over))) => hand_over.offer(id, report),
            (None, Some(InPlace::Program(successor))) => {
                successor.ask(&self.core.hello(), report);
            }
            (None, None) => {}
        }
    }

    /// Job `HandOverFds` of the core.
    pub(super) fn hand_over_fds(&mut self) {
        match (&self.keep, &mut self.in_place) {
            (Some(keep), _) => keep.seal(self.core.migration_id(), self.reporter()),
            (None, Some(InPlace::Process(hand_over))) => hand_over.hand_over(),
            // They stay where they are.
            (None, Some(InPlace::Program(_))) => {
                self.core.handle_fds_handed_over(self.clock.now());
            }
            (None, None) => {}
        }
    }

    /// Says something to the target; true if that is the word after which this process is to become the target.
    pub(super) fn send_control(&mut self, frame: &SourceFrame) -> bool {
        if let Some(InPlace::Program(successor)) = &mut self.in_place {
            match successor.take(frame) {
                Answer::Exec => return true,
                Answer::Frames(frames) => {
                    for frame in frames {
                        self.core.handle_frame(self.clock.now(), frame);
                    }
                }
            }
        } else if let Some(control) = &self.control {
            control.send(frame.encode());
        }
        false
    }

    /// Becomes the new program. Returns only if that fails, and the attempt fails with it.
    pub(in super::super) fn exec(&mut self) {
        let now = self.clock.now();
        let Some(InPlace::Program(successor)) = &self.in_place else {
            return;
        };
        let stats = self.core.stats();
        let account = Account {
            began_us: now_us().saturating_sub(now.micros_since(stats.began)),
            exec_us: now_us(),
            blackout: blackout(self.core.blackout_so_far(now)),
            guest_stall_us: self.guest_stall_us,
            clears_up: 0,
            machine: self.machine.shape(),
        };
        let failed = successor.become_it(&account);
        self.core.handle_frame(self.clock.now(), failed);
    }
}
