//! Moving house: what belongs to the process and not to the machine, when a guest is taken over in place. The sockets of QMP and of the
//! metrics stay the same sockets at the same paths, so clients that connect meanwhile wait for a moment and are lost by nobody.

use std::path::PathBuf;

use vmferry_cpr::manifest::FdKind;
use vmferry_transport::control::{Address, Listener};

use super::Engine;
use super::hand_over::{Heirlooms, METRICS, QMP};
use super::inherit::Inherited;
use crate::config::RunConfig;
use crate::machine::heirloom::DeviceFd;
use crate::observe::logging;
use crate::qmp::{EngineHandle, QmpServer};

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
}

impl House {
    pub(super) fn new(config: &RunConfig) -> Self {
        Self {
            in_place: config.incoming_cpr.is_some(),
            server: None,
            qmp: config.qmp.clone(),
            metrics: config.observe.metrics.clone(),
            handle: None,
            inherited: None,
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
        let Inherited { qmp, metrics, .. } = self.house.inherited.take().unwrap_or_default();
        if let (Some(socket), Some(handle)) = (qmp, self.house.handle.take()) {
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
}
