//! Moving house: what belongs to the process and not to the machine, when a guest is taken over in place. The sockets of QMP and of the
//! metrics stay the same sockets at the same paths, so clients that connect meanwhile wait for a moment and are lost by nobody.

use std::path::PathBuf;

use vmferry_cpr::manifest::FdKind;
use vmferry_devices::notifier::Mode;
use vmferry_transport::control::{Address, Listener};
use vmferry_transport::units::{MigrationId, Moment};

use super::Engine;
use super::event::{Event, Events};
use super::hand_over::{Heirlooms, METRICS, QMP};
use super::info::Record;
use super::inherit::Inherited;
use crate::config::{Incoming, RunConfig};
use crate::machine::heirloom::DeviceFd;
use crate::observe::logging;
use crate::qmp::schema::{BlackoutInfo, RunState};
use crate::qmp::{EngineHandle, QmpServer};
use crate::succession::account::{Times, clear_up, now_us};
use crate::succession::{Account, WayBack, WayBackKeeper};

/// The process's own sockets, and those that it is about to get.
#[derive(Debug)]
pub(super) struct House {
    pub(super) in_place: bool,
    pub(super) server: Option<QmpServer>,
    qmp: PathBuf,
    metrics: Option<Address>,
    /// For the server, until there is one.
    handle: Option<EngineHandle>,
    inherited: Option<Inherited>,
    /// This program has come into the process by an exec.
    pub(super) succession: Option<Succession>,
}

/// What a program that has come by an exec keeps of it.
#[derive(Debug)]
pub(super) struct Succession {
    pub(super) account: Account,
    pub(super) times: Times,
    pub(super) id: MigrationId,
    /// Why the new program could not go on, if this is the old one again.
    pub(super) returned: Option<String>,
    /// Until the guest may run.
    pub(super) way_back: WayBackKeeper,
    /// When clients are served though the guest does not run.
    pub(super) due: Option<Moment>,
    /// From then on. Not in the keeper: a program that fails now without knowing whether the guest runs must not have the old one load
    /// its state over memory that the guest has changed.
    pub(super) held: Option<WayBack>,
    /// Those outside have been told how it has ended, or are just now.
    pub(super) told: bool,
    pub(super) tells: bool,
}

impl Succession {
    /// The guest is about to run. Only the answer that it does not leads back from here.
    fn about_to_run(&mut self) {
        self.held = self.way_back.let_go();
    }

    /// The whole blackout, from the old program's stop on; `None` until the guest is here.
    pub(super) fn blackout(&self) -> Option<BlackoutInfo> {
        (self.times.running_us > 0).then(|| self.account.whole(self.times))
    }

    /// The guest is known not to run here.
    fn take_way_back(&mut self) -> Option<WayBack> {
        self.held.take().or_else(|| self.way_back.take())
    }
}

impl House {
    pub(super) fn new(config: &RunConfig) -> Self {
        Self {
            in_place: config.incoming_cpr.is_some() || config.incoming == Some(Incoming::Exec),
            server: None,
            qmp: config.qmp.clone(),
            metrics: config.observe.metrics.clone(),
            handle: None,
            inherited: None,
            succession: None,
        }
    }

    /// In which mode the guest comes here.
    pub(super) fn mode(&self) -> Mode {
        match &self.succession {
            Some(_) => Mode::CprExec,
            None if self.in_place => Mode::CprTransfer,
            None => Mode::Normal,
        }
    }

    /// Serves clients from now on, or from when there is a socket to serve them on.
    pub(super) fn open(&mut self, listener: Option<Listener>, handle: EngineHandle) {
        match listener {
            Some(listener) => self.server = Some(QmpServer::start(listener, handle)),
            None => self.handle = Some(handle),
        }
    }

    /// What is of devices, for the machine.
    pub(super) fn take_devices(&mut self) -> Vec<DeviceFd> {
        let inherited = self.inherited.as_mut();
        inherited.map_or_else(Vec::new, |inherited| std::mem::take(&mut inherited.devices))
    }

    pub(super) fn inherit(&mut self, inherited: Inherited) {
        self.inherited = Some(inherited);
    }

    /// The process was told to end. Who was does not begin again as another program.
    pub(super) fn stay(&mut self) {
        if let Some(succession) = &mut self.succession {
            drop(succession.way_back.let_go());
            succession.held = None;
        }
    }

    /// Those outside are still to hear how an exec has ended.
    pub(super) fn tells(&self) -> bool {
        let succession = self.succession.as_ref();
        succession.is_some_and(|succession| succession.tells)
    }

    /// They have heard it, or nobody waits until they have.
    pub(super) fn told(&mut self) {
        if let Some(succession) = &mut self.succession {
            succession.tells = false;
        }
    }
}

impl Engine {
    /// What leaves with the guest.
    ///
    /// # Errors
    /// For the operator: no descriptor is left, or RAM has no file.
    pub(super) fn heirlooms(&self) -> Result<Heirlooms, String> {
        let text = |error: std::io::Error| format!("what is to be handed over: {error}");
        let mut heirlooms = Heirlooms::of(self.machine.ram()).map_err(text)?;
        for fd in self.machine.heirlooms().map_err(text)? {
            heirlooms.add_of_device(fd);
        }
        if let Some(server) = &self.house.server {
            let listener = server.duplicate_listener().map_err(text)?;
            heirlooms.add(QMP, FdKind::Qmp, listener);
        }
        if let Some(listener) = self.observer.metrics_listener().map_err(text)? {
            heirlooms.add(METRICS, FdKind::Listener, listener);
        }
        Ok(heirlooms)
    }

    /// Source: the guest is the new process's, which serves new clients from now on.
    pub(super) fn leave_house(&mut self) {
        if let Some(server) = &self.house.server {
            server.leave_listener();
        }
        self.observer.leave_metrics();
    }

    /// Target: COMMIT has come. The guest's next output goes where the last went.
    pub(super) fn adopt_output(&mut self) {
        let Some(inherited) = &mut self.house.inherited else {
            return;
        };
        let adopted = [
            inherited.stdout.take().map(rustix::stdio::dup2_stdout),
            inherited.stderr.take().map(rustix::stdio::dup2_stderr),
        ];
        for error in adopted.into_iter().flatten().filter_map(Result::err) {
            tracing::warn!(%error, "the output of the old process cannot be used");
        }
    }

    /// Target: the guest is here. Clients find us where they found the old process.
    pub(super) fn settle_in(&mut self) {
        if !self.house.in_place {
            return;
        }
        self.end_succession();
        self.serve_clients();
        let Inherited { metrics, .. } = self.house.inherited.take().unwrap_or_default();
        if let Some(address) = self.house.metrics.clone()
            && let Err(error) = self
                .observer
                .serve_metrics(&address, metrics, &self.machine)
        {
            tracing::error!(error = format!("{error:#}"), "metrics cannot be served");
        }
        logging::announce(format_args!(
            "took the guest over, QMP at {}",
            self.house.qmp.display()
        ));
    }

    /// Clients find us where they found who was here before. Does nothing the second time.
    fn serve_clients(&mut self) {
        let inherited = self.house.inherited.as_mut();
        let Some(socket) = inherited.and_then(|inherited| inherited.qmp.take()) else {
            return;
        };
        let Some(handle) = self.house.handle.take() else {
            return;
        };
        let listener = Address::unix(&self.house.qmp)
            .map_err(|error| error.to_string())
            .and_then(|address| {
                Listener::inherit(socket, &address).map_err(|error| error.to_string())
            });
        match listener {
            Ok(listener) => self.house.server = Some(QmpServer::start(listener, handle)),
            Err(error) => tracing::error!(error, "QMP cannot be served"),
        }
    }

    /// COMMIT has come to a program that is to go on after an exec, and the guest has not run here yet. If this is the old program
    /// again, those outside hear FAILED before it does.
    pub(super) fn begin_succession(&mut self) {
        let Some(succession) = &mut self.house.succession else {
            return;
        };
        succession.times.loaded_us = now_us();
        succession.about_to_run();
        if succession.returned.is_some() {
            self.tell_after_exec(false);
        }
    }

    /// The guest is here, and there is no way back any more.
    fn end_succession(&mut self) {
        let Some(succession) = &mut self.house.succession else {
            return;
        };
        succession.times.running_us = now_us();
        (succession.held, succession.due) = (None, None);
        clear_up(succession.account.clears_up);
        match succession.returned.clone() {
            None => self.tell_after_exec(true),
            Some(reason) => {
                tracing::error!(reason, "the upgrade has failed, the guest is still here");
                self.record = Some(Record::returned(reason));
            }
        }
    }

    /// The process does not end before they have heard it.
    pub(super) fn tell_after_exec(&mut self, done: bool) {
        let Some(succession) = &mut self.house.succession else {
            return;
        };
        if std::mem::replace(&mut succession.told, true) {
            return;
        }
        succession.tells = true;
        let (notifiers, id) = (self.notifiers.clone(), succession.id);
        let (events, instead) = (self.events.clone(), self.events.clone());
        // The engine ends only with the process.
        let told = |events: Events| {
            let _ = events.send(Event::ToldAfterExec);
        };
        let instead = move || told(instead);
        self.jobs.run_owing(instead, move || {
            notifiers.after_exec(id, done);
            told(events);
        });
    }

    /// The guest does not run and cannot go on in this program. If it has come by an exec, this process becomes the old program again,
    /// which returns only if it cannot.
    pub(super) fn go_back(&mut self, why: &str) {
        let succession = self.house.succession.as_mut();
        if let Some(way_back) = succession.and_then(Succession::take_way_back) {
            let error = way_back.go(why);
            tracing::error!(error = format!("{error:#}"), "no way back");
        }
    }

    /// The guest is this process's, and nobody knows whether it runs: it may have done all, part or nothing of that. It is left as it is,
    /// for the operator. A source that asks gets no answer, and is in doubt.
    pub(super) fn start_lost(&mut self) {
        tracing::error!("it is not known whether the guest runs, and nobody else may start it");
        self.start_lost = true;
        self.set_runstate(RunState::InternalError);
        if self.house.succession.is_some() {
            self.serve_clients();
        }
    }

    /// A program that has come by an exec answers nobody before it has the guest. One that should have it, and could not go back, does: it is
    /// the operator who can end its waiting (I6).
    pub(super) fn answer_when_late(&mut self) {
        let now = self.clock.now();
        let succession = self.house.succession.as_mut();
        if let Some(late) = succession.filter(|late| late.due.is_some_and(|due| now >= due)) {
            late.due = None;
            tracing::error!("the guest does not run yet; clients are served to be told so");
            self.serve_clients();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn succession(way_back: &WayBackKeeper) -> Succession {
        Succession {
            account: Account::default(),
            times: Times::default(),
            id: MigrationId::default(),
            returned: None,
            way_back: way_back.clone(),
            due: None,
            held: None,
            told: false,
            tells: false,
        }
    }

    #[test]
    fn before_the_guest_may_run_whoever_finds_a_fault_goes_back_and_only_once() {
        let keeper = WayBackKeeper::new(Some(WayBack::nowhere()));
        let mut succession = succession(&keeper);
        assert!(succession.take_way_back().is_some());
        assert!(keeper.take().is_none() && succession.take_way_back().is_none());
    }

    #[test]
    fn once_the_guest_may_run_only_the_answer_that_it_does_not_leads_back() {
        let keeper = WayBackKeeper::new(Some(WayBack::nowhere()));
        let mut succession = succession(&keeper);
        succession.about_to_run();
        assert!(
            keeper.take().is_none(),
            "a panic would start the guest again"
        );
        assert!(succession.take_way_back().is_some());
    }
}
