//! When something happens to an upgrade by exec, what, and what may become of the guest then.

use crate::grid::Fate;

/// Moments of an upgrade by exec, in their order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Step {
    Look,
    Ask,
    Answer,
    Stop,
    Setup,
    Exec,
    Letter,
    Fds,
    Build,
    Load,
    Start,
    Running,
    Back,
}

impl Step {
    pub(super) const ALL: [Self; 13] = [
        Self::Look,
        Self::Ask,
        Self::Answer,
        Self::Stop,
        Self::Setup,
        Self::Exec,
        Self::Letter,
        Self::Fds,
        Self::Build,
        Self::Load,
        Self::Start,
        Self::Running,
        Self::Back,
    ];

    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Look => "new program is looked for",
            Self::Ask => "a copy of it is asked",
            Self::Answer => "its answer",
            Self::Stop => "guest is stopped",
            Self::Setup => "SETUP",
            Self::Exec => "letter and execve",
            Self::Letter => "new program has begun, its letter",
            Self::Fds => "descriptors that it was left",
            Self::Build => "its machine",
            Self::Load => "guest's state",
            Self::Start => "about to run",
            Self::Running => "guest runs",
            Self::Back => "old program is back, about to run",
        }
    }

    /// How long the asking may take does not matter to the other steps.
    pub(super) fn needs_short_deadline(self, fault: Fault) -> bool {
        matches!(
            (self, fault),
            (Self::Ask, Fault::Silent) | (Self::Answer, Fault::TooLong)
        )
    }
}

/// What happens there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fault {
    Kill,
    Term,
    Cancel,
    Veto,
    KillCopy,
    Silent,
    Missing,
    Other,
    Changed,
    Cut,
    TooLong,
    Swapped,
    Refuses,
    Ends,
    Taken,
    NoRoom,
}

impl Fault {
    pub(super) const ALL: [Self; 16] = [
        Self::Kill,
        Self::Term,
        Self::Cancel,
        Self::Veto,
        Self::KillCopy,
        Self::Silent,
        Self::Missing,
        Self::Other,
        Self::Changed,
        Self::Cut,
        Self::TooLong,
        Self::Swapped,
        Self::Refuses,
        Self::Ends,
        Self::Taken,
        Self::NoRoom,
    ];

    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kill => "SIGKILL",
            Self::Term => "SIGTERM",
            Self::Cancel => "cancel",
            Self::Veto => "veto",
            Self::KillCopy => "copy killed",
            Self::Silent => "silent",
            Self::Missing => "missing",
            Self::Other => "another",
            Self::Changed => "changed",
            Self::Cut => "cut",
            Self::TooLong => "too long",
            Self::Swapped => "two swapped",
            Self::Refuses => "refuses",
            Self::Ends => "ends by itself",
            Self::Taken => "disk taken",
            Self::NoRoom => "no descriptor free",
        }
    }

    /// What may become of the guest, and what is said of it; nothing if it cannot happen there.
    pub(super) fn allowed(self, step: Step) -> Option<(Outcome, &'static str)> {
        use Outcome::{Ends, GoesOn, Lost, Returns, RunsOn, Stays, Waits};
        let allowed = match (step, self) {
            (Step::Look, Self::Kill | Self::Term) => return None,
            (Step::Answer | Step::Fds, Self::Kill | Self::Term) => return None,
            (Step::Exec, Self::Kill) => return None,
            (_, Self::Kill | Self::Term) => (Ends, ""),

            (Step::Look, Self::Missing) => (RunsOn, "cannot be executed"),
            (Step::Look, Self::Other) => (RunsOn, "cannot be executed"),

            (Step::Ask, Self::Cancel) => (RunsOn, ""),
            (Step::Ask, Self::KillCopy) => (RunsOn, "signal: 9"),
            (Step::Ask, Self::Silent) => (RunsOn, "it took longer than"),
            (Step::Ask, Self::Other) => (RunsOn, "it does not answer"),
            (Step::Ask, Self::NoRoom) => (RunsOn, "Too many open files"),

            (Step::Answer, Self::Refuses) => (RunsOn, "bytes of memory"),
            (Step::Answer, Self::Missing) => (RunsOn, "it does not answer"),
            (Step::Answer, Self::Changed) => (RunsOn, "it does not answer"),
            (Step::Answer, Self::Cut) => (RunsOn, "it does not answer"),
            (Step::Answer, Self::TooLong) => (RunsOn, "it took longer than"),

            (Step::Stop, Self::Cancel) => (Stays, ""),
            (Step::Stop, Self::Missing) => (Stays, "cannot be executed"),
            (Step::Stop, Self::Other) => (Stays, "changed since it was asked"),
            (Step::Stop, Self::Changed) => (Stays, "changed since it was asked"),
            (Step::Stop, Self::NoRoom) => (Waits, "could not be resumed"),

            (Step::Setup, Self::Cancel) => (Stays, ""),
            (Step::Setup, Self::Veto) => (Stays, "not now"),

            // Its interpreter is not there, nobody may execute it, it is no program any more; each is found by the kernel.
            (Step::Exec, Self::Missing) => (Stays, "No such file"),
            (Step::Exec, Self::Refuses) => (Stays, "Permission denied"),
            (Step::Exec, Self::Changed) => (Stays, "cannot be executed"),

            // Only the variable that names it, as if the program were wrapped in one that cleans the environment.
            (Step::Letter, Self::Missing) => (GoesOn, ""),
            (Step::Letter, Self::Other) => (Lost, "the letter is for process"),
            (Step::Letter, Self::Changed) => (Lost, "the letter was changed"),
            (Step::Letter, Self::Cut) => (Lost, "the letter has"),
            (Step::Letter, Self::Swapped) => (Lost, "the letter is a question"),
            (Step::Letter, Self::Refuses) => (Returns, "--no-such-option"),
            (Step::Letter, Self::Ends) => (Ends, ""),

            (Step::Fds, Self::Missing) => (Lost, "Bad file descriptor"),
            (Step::Fds, Self::Other) => (Lost, "ram0"),
            (Step::Fds, Self::Swapped) => (Lost, "ram0"),

            (Step::Build, Self::Missing) => (Returns, "/nowhere/disk"),
            (Step::Build, Self::Other) => (Returns, "disk1"),
            (Step::Build, Self::Refuses) => (Returns, "bytes of memory"),

            (Step::Load, Self::Silent) => (Returns, "was not loaded within"),
            (Step::Load, Self::Changed) => (Lost, "checksum"),
            (Step::Load, Self::Cut) => (Lost, "no other process has the guest"),
            (Step::Load, Self::Refuses) => (Returns, "vcpu"),

            (Step::Start, Self::Other) => (Returns, "another process holds the lock"),
            (Step::Start, Self::Taken) => (Waits, "another process holds the lock"),

            (Step::Back, Self::Missing) => (Returns, "bytes of memory"),
            _ => return None,
        };
        Some(allowed)
    }
}

/// What became of the guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Outcome {
    RunsOn,
    GoesOn,
    Stays,
    Returns,
    Waits,
    Lost,
    Ends,
}

impl Fate for Outcome {
    const ALL: &'static [Self] = &[
        Self::RunsOn,
        Self::Stays,
        Self::Returns,
        Self::GoesOn,
        Self::Waits,
        Self::Lost,
        Self::Ends,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::RunsOn => "runs on",
            Self::GoesOn => "goes on",
            Self::Stays => "stays",
            Self::Returns => "comes back",
            Self::Waits => "waits",
            Self::Lost => "lost",
            Self::Ends => "ends with its process",
        }
    }

    fn meaning(self) -> &'static str {
        match self {
            Self::RunsOn => {
                "the upgrade fails before the guest is stopped; the next one, by exec or transfer in turns, works"
            }
            Self::GoesOn => {
                "nothing is wrong: the guest goes on in the new program; the next upgrade works"
            }
            Self::Stays => {
                "the guest was stopped and goes on in the old program, which was never left; the next upgrade works"
            }
            Self::Returns => {
                "the process had become the new program and is the old one again, where the guest goes on; the next upgrade works"
            }
            Self::Waits => {
                "the guest is in the old program and cannot run there yet, because somebody else has its disk or no descriptor is free: it stays stopped, `cont` says why, and has it go on when the reason is gone; the next upgrade works"
            }
            Self::Lost => {
                "what the program before had left was damaged by the new one, so that neither can go on: the process says so and ends with code 1, and nobody runs the guest"
            }
            Self::Ends => {
                "the process has ended, killed or because it was told to, and nobody runs the guest"
            }
        }
    }
}
