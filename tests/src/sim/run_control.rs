//! Who may run the guest on each side, and who may write its disks: the engine's rules around the cores.
//!
//! The proof that the guest is stopped belongs to the engine, to a job, or to the migration; whoever wants it while it is away is
//! refused. A guest is started in one way, at the start, by `cont`, after a failure, and on arrival: its disks become active, and only
//! then does it run. The source gives the disks up with the state; a target whose guest could not be started gives them back before it
//! says so.

use super::guest::SimProof;
use super::source_host::Ending;
use super::target_host::Vcpus;
use super::{Event, JobId, Side, World};

/// Where the guest is, as the engine of the source knows.
#[derive(Debug)]
pub(super) enum Guest {
    Running,
    Stopped(SimProof),
    /// A job or the migration has the proof, or is about to get it.
    Away,
}

/// What an operator has asked for and a job does.
#[derive(Debug)]
pub(super) enum Operation {
    Stop,
    /// At the source with the proof.
    Cont(Option<SimProof>),
}

/// The disks of one side. The lock on the image lets one side in at a time; the protocol must not lean on that.
#[derive(Debug, Default)]
pub(super) struct Disks {
    /// Locked and open for writing.
    pub(super) active: bool,
    /// A job is about to activate them, or has.
    pub(super) taking: bool,
    /// They could not be inactivated, and stay locked until the process ends.
    pub(super) stuck: bool,
}

impl World {
    fn disks(&mut self, side: Side) -> &mut Disks {
        match side {
            Side::Source => &mut self.source.disks,
            Side::Target => &mut self.target.disks,
        }
    }

    /// A job that starts the guest begins.
    pub(super) fn begin_taking_disks(&mut self, side: Side) {
        self.disks(side).taking = true;
        self.check_disks();
    }

    /// The job is at the point where it activates the disks. Returns whether that worked.
    pub(super) fn take_disks(&mut self, side: Side) -> bool {
        let (other, alive) = match side {
            Side::Source => (&self.target.disks, self.target.alive),
            Side::Target => (&self.source.disks, self.source.alive),
        };
        let locked = alive && other.active;
        assert!(
            !locked || other.stuck,
            "{side:?} needs the lock to keep it from disks that the other side writes"
        );
        let fails = locked || self.chance(|faults| faults.fail_disks);
        let disks = self.disks(side);
        disks.taking = false;
        disks.active |= !fails;
        if fails {
            self.see(match side {
                Side::Source => "the source cannot have its disks",
                Side::Target => "the target cannot have the disks",
            });
        }
        if locked {
            self.see("the lock keeps the source out");
        }
        !fails
    }

    /// At every instant the disks belong to one side, and a guest runs on the side that has them.
    pub(super) fn check_disks(&self) {
        let (source, target) = (&self.source, &self.target);
        let here = source.alive && (source.disks.active || source.disks.taking);
        let there = target.alive && (target.disks.active || target.disks.taking);
        // A lock that a failed target could not give back keeps the source out, as it should.
        let kept_out = target.disks.stuck && !source.disks.active;
        assert!(
            !(here && there) || kept_out,
            "both sides have the disks: {:?}, {:?}",
            source.disks,
            target.disks
        );
        assert!(
            !(source.alive && source.running) || source.disks.active,
            "the guest runs at the source without its disks"
        );
        assert!(
            !(target.alive && target.vcpus == Vcpus::Running) || target.disks.active,
            "the guest runs at the target without its disks"
        );
    }

    /// `stop`.
    pub(super) fn operator_stops(&mut self, side: Side) {
        match side {
            Side::Source => match std::mem::replace(&mut self.source.guest, Guest::Away) {
                Guest::Running => self.begin_operation(side, Operation::Stop),
                Guest::Stopped(proof) => self.source.guest = Guest::Stopped(proof),
                Guest::Away => self.see("stop is refused at the source"),
            },
            Side::Target => match self.target.vcpus {
                Vcpus::Starting => self.see("stop is refused at the target"),
                Vcpus::Fresh => {
                    assert!(!self.target.core.has_guest(), "COMMIT came, who starts it?");
                    self.target.autostart = false;
                }
                _ if self.target.operation.is_some() => self.see("stop is refused at the target"),
                Vcpus::Running => self.begin_operation(side, Operation::Stop),
                Vcpus::Paused => {}
            },
        }
    }

    /// `cont`.
    pub(super) fn operator_conts(&mut self, side: Side) {
        match side {
            Side::Source if self.source.ending == Some(Ending::Completed) => {
                self.see("cont is refused: the guest was handed over");
            }
            Side::Source => match std::mem::replace(&mut self.source.guest, Guest::Away) {
                Guest::Running => self.source.guest = Guest::Running,
                Guest::Stopped(proof) => {
                    self.begin_operation(side, Operation::Cont(Some(proof)));
                }
                Guest::Away => self.see("cont is refused at the source"),
            },
            Side::Target if self.target.core.error().is_some() => {
                self.see("cont is refused: the guest will never run here");
            }
            Side::Target => match self.target.vcpus {
                Vcpus::Fresh => self.target.autostart = true,
                _ if self.target.operation.is_some() => self.see("cont is refused at the target"),
                Vcpus::Paused => self.begin_operation(side, Operation::Cont(None)),
                Vcpus::Starting | Vcpus::Running => {}
            },
        }
    }

    fn begin_operation(&mut self, side: Side, operation: Operation) {
        if matches!(operation, Operation::Cont(_)) {
            self.begin_taking_disks(side);
        }
        let id = self.new_job();
        match side {
            Side::Source => self.source.operation = Some((id, operation)),
            Side::Target => self.target.operation = Some((id, operation)),
        }
        let delay = self.job_delay();
        self.schedule(delay, Event::Operation(side, id));
    }

    /// The job that an operator has asked for is done.
    pub(super) fn operation(&mut self, side: Side, id: JobId) {
        let slot = match side {
            Side::Source => &mut self.source.operation,
            Side::Target => &mut self.target.operation,
        };
        let Some((_, operation)) = slot.take_if(|(running, _)| *running == id) else {
            return;
        };
        let fails = self.chance(|faults| faults.fail_job);
        match side {
            Side::Source => self.source_operated(operation, fails),
            Side::Target => self.target_operated(&operation, fails),
        }
    }

    fn source_operated(&mut self, operation: Operation, fails: bool) {
        let stops = matches!(operation, Operation::Stop);
        let worked = match operation {
            Operation::Stop if fails => {
                self.source.guest = Guest::Running;
                false
            }
            Operation::Stop => {
                self.source.guest = Guest::Stopped(self.pause_guest());
                true
            }
            Operation::Cont(proof) => {
                let proof = proof.expect("cont at the source takes the proof");
                if self.take_disks(Side::Source) && !fails {
                    self.run_source(proof);
                    true
                } else {
                    self.source.guest = Guest::Stopped(proof);
                    self.owes_cont = true;
                    false
                }
            }
        };
        if worked {
            self.see(if stops {
                "the guest is stopped by the operator"
            } else {
                "the guest is started by the operator"
            });
            self.guest_should_run = !stops;
            self.owes_cont &= stops;
            if self.source.ending.is_none() {
                self.source.core.set_guest_runs(!stops);
            }
        }
        if std::mem::take(&mut self.source.switchover_waits) {
            self.see("the switchover waited for the operator's job");
            self.stop_guest();
        }
    }

    fn target_operated(&mut self, operation: &Operation, fails: bool) {
        match operation {
            Operation::Stop if fails => {}
            Operation::Stop => {
                self.see("the guest is stopped at the target");
                self.target.vcpus = Vcpus::Paused;
                self.target.should_run = false;
            }
            Operation::Cont(_) => {
                if self.take_disks(Side::Target) && !fails {
                    self.see("the guest is started at the target");
                    self.target.vcpus = Vcpus::Running;
                    self.target.should_run = true;
                }
            }
        }
    }

    /// The proof is given up, and the guest runs at the source.
    pub(super) fn run_source(&mut self, proof: SimProof) {
        let paused = self.pause.as_ref().expect("it was paused");
        assert!(
            paused.memory == self.source_memory && paused.vcpus == self.source_vcpus,
            "I3: the guest changed while it was stopped"
        );
        assert_ne!(
            self.source.ending,
            Some(Ending::Completed),
            "I1: resumed after it was handed over"
        );
        drop(proof);
        self.source.running = true;
        self.source.guest = Guest::Running;
    }
}
