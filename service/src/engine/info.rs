//! `query-migrate`: figures of the migration under way, or of the last one.

use vmferry_transport::data::{Backend, SenderProgress};
use vmferry_transport::memory::populate;
use vmferry_transport::proto::{BlackoutParts, MigrationStatus, SourceStats};
use vmferry_transport::units::{Moment, PAGE_SIZE};

use super::Engine;
use super::arrival::qmp_status;
use super::incoming::Incoming;
use super::outgoing::Outgoing;
use super::settle::Succession;
use crate::qmp::schema::{
    BlackoutInfo, MigrationInfo, RamInfo, SocketAddressInfo, VerificationInfo, VfioInfo,
};

/// What an operator has to know whose migration is in doubt.
pub(super) fn unresolved(in_place: bool) -> &'static str {
    match in_place {
        false => {
            "the link was lost at the commit and the target does not answer: it may run the guest or not. This side stays stopped. \
             Look at the target, then say x-resolve here"
        }
        true => {
            "the new process was lost at the commit and does not answer: it may run the guest or not, and may have changed its memory. \
             This process stays stopped for good. If the new one runs the guest, say x-resolve here; if it has ended, so has the guest"
        }
    }
}

/// Figures of an outgoing attempt at one moment; kept when it has ended.
#[derive(Clone, Debug)]
pub(super) struct Record {
    status: MigrationStatus,
    stats: SourceStats,
    progress: SenderProgress,
    bytes_per_sec: Option<u64>,
    dirty_pages_per_sec: u64,
    backend: &'static str,
    guest_stall_us: Option<u64>,
    error: Option<String>,
    /// Of an upgrade by exec after which this program is the old one again: the figures are the succession's.
    is_return: bool,
}

impl Record {
    pub(super) fn of(outgoing: &Outgoing, error: Option<String>) -> Self {
        let core = outgoing.core();
        Self {
            status: core.status(),
            stats: core.stats().clone(),
            progress: outgoing.progress(),
            bytes_per_sec: core.estimate().bytes_per_sec(),
            dirty_pages_per_sec: core.estimate().dirty_pages_per_sec(),
            backend: outgoing.backend().backend.name(),
            guest_stall_us: outgoing.guest_stall_us(),
            error,
            is_return: false,
        }
    }

    /// Of an upgrade by exec after which this program is the old one again.
    pub(super) fn returned(reason: String) -> Self {
        Self {
            status: MigrationStatus::Failed,
            stats: SourceStats::default(),
            progress: SenderProgress::default(),
            bytes_per_sec: None,
            dirty_pages_per_sec: 0,
            backend: Backend::detect().backend.name(),
            guest_stall_us: None,
            error: Some(reason),
            is_return: true,
        }
    }

    pub(super) fn status(&self) -> MigrationStatus {
        self.status
    }

    /// Members appear as in QEMU: before the first page there is only the status. The figures of an attempt that has failed or was
    /// cancelled stay, which QEMU's do not. `limit_ms` is the downtime limit, which is what is expected until a round has been measured.
    fn info(&self, now: Moment, total_bytes: u64, limit_ms: u64) -> MigrationInfo {
        let Self {
            status,
            stats,
            progress,
            backend,
            guest_stall_us,
            error,
            ..
        } = self;
        let head = MigrationInfo {
            status: Some(*status),
            error_desc: error.clone(),
            x_connections: Some(progress.connection_bytes.len() as u64),
            x_backend: Some((*backend).to_owned()),
            ..MigrationInfo::default()
        };
        if matches!(status, MigrationStatus::Setup | MigrationStatus::WaitUnplug) {
            return head;
        }
        let until = stats.ended.unwrap_or(now);
        let over = status.is_end();
        let ram = self.ram(until, total_bytes);
        let expected_ms = stats.predicted_blackout_us.map_or(limit_ms, |us| us / 1000);
        MigrationInfo {
            ram: Some(ram),
            vfio: (progress.device_bytes > 0).then_some(VfioInfo {
                transferred: progress.device_bytes,
            }),
            remaining: (!over).then_some(ram.remaining),
            total_time: Some(until.micros_since(stats.began) / 1000),
            setup_time: stats
                .first_round
                .map(|first| first.micros_since(stats.began) / 1000),
            downtime: stats.blackout.map(|parts| parts.total_us() / 1000),
            expected_downtime: (!over).then_some(expected_ms),
            x_blackout: stats.blackout.map(blackout),
            x_guest_stall_us: *guest_stall_us,
            x_round: stats.first_round.map(|_| u64::from(stats.round.0) + 1),
            x_predicted_blackout_us: stats.predicted_blackout_us,
            x_populated_target: stats.ready.as_ref().map(|ready| ready.populated_bytes),
            x_zero_copy_fallbacks: Some(progress.zero_copy.fallbacks),
            x_verification: self.verification(),
            ..head
        }
    }

    fn ram(&self, until: Moment, total: u64) -> RamInfo {
        let Self {
            status,
            stats,
            progress,
            ..
        } = self;
        let sent = progress.wire_bytes();
        let since_us = until
            .micros_since(stats.first_round.unwrap_or(until))
            .max(1);
        let pages = stats.data.0 + stats.zero.0;
        let per_second = |amount: u64| {
            u64::try_from(u128::from(amount) * 1_000_000 / u128::from(since_us)).unwrap_or(u64::MAX)
        };
        let remaining = if status.is_end() {
            0
        } else {
            progress.round_pages_remaining() * PAGE_SIZE
        };
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let mbps = per_second(sent) as f64 * 8.0 / 1e6;
        RamInfo {
            transferred: sent,
            remaining,
            total,
            duplicate: stats.zero.0,
            normal: stats.data.0,
            normal_bytes: stats.data.to_bytes(),
            dirty_pages_rate: self.dirty_pages_per_sec,
            mbps,
            dirty_sync_count: stats.sync_count,
            postcopy_requests: 0,
            page_size: PAGE_SIZE,
            multifd_bytes: sent,
            pages_per_second: self
                .bytes_per_sec
                .map_or_else(|| per_second(pages), |bytes| bytes / PAGE_SIZE),
            precopy_bytes: sent.saturating_sub(stats.last_round_bytes),
            downtime_bytes: stats.last_round_bytes,
            postcopy_bytes: 0,
            dirty_sync_missed_zero_copy: progress.zero_copy.fallbacks,
        }
    }

    fn verification(&self) -> Option<VerificationInfo> {
        let found = self.stats.ready.as_ref()?.verification.as_ref()?;
        Some(VerificationInfo {
            ram_hash_source: format!("{:032x}", self.stats.ram_hash?),
            ram_hash_target: format!("{:032x}", found.ram_hash),
            vcpus_equal: found.state_differences.is_empty(),
        })
    }
}

pub(super) fn blackout(parts: BlackoutParts) -> BlackoutInfo {
    let total_us = parts.total_us();
    let BlackoutParts {
        pause_us,
        pre_switchover_us,
        dirty_fetch_us,
        last_round_us,
        device_state_us,
        load_us,
        commit_us,
        resume_us,
        verify_us,
    } = parts;
    BlackoutInfo {
        total_us,
        pause_us,
        pre_switchover_us,
        dirty_fetch_us,
        last_round_us,
        device_state_us,
        load_us,
        verify_us,
        commit_us,
        resume_us,
        ..BlackoutInfo::default()
    }
}

impl Engine {
    /// The answer to `query-migrate`: the outgoing side if there was one, otherwise the incoming side.
    pub(super) fn migration_info(&self) -> MigrationInfo {
        let total = self.machine.ram().pages().to_bytes();
        let (now, limit_ms) = (self.clock.now(), self.parameters.downtime_limit_ms);
        let mut info = match (&self.outgoing, &self.record) {
            (Some(outgoing), _) => {
                let doubt = outgoing.core().is_unresolved();
                // Known from the first moment of the cleanup on.
                let failure = outgoing.core().failure().map(ToString::to_string);
                let problem = doubt
                    .then(|| unresolved(outgoing.is_in_place()).to_owned())
                    .or(failure);
                let throttle = outgoing.core().throttle_percent();
                MigrationInfo {
                    cpu_throttle_percentage: (throttle > 0).then_some(throttle.into()),
                    ..Record::of(outgoing, problem).info(now, total, limit_ms)
                }
            }
            (None, Some(record)) => record.info(now, total, limit_ms),
            (None, None) => self
                .incoming
                .as_ref()
                .map(|incoming| incoming_info(incoming, total))
                .unwrap_or_default(),
        };
        let of_exec = self.record.as_ref().is_none_or(|record| record.is_return);
        if let (None, true, Some(succession)) = (&self.outgoing, of_exec, &self.house.succession) {
            whole_of_exec(&mut info, succession);
        }
        let blocked = self.blockers.reasons(self.parameters.mode);
        info.blocked_reasons = (!blocked.is_empty()).then_some(blocked);
        // Statistics are worth having even where the files cannot be asked.
        let populated = populate::populated_bytes(self.machine.ram()).ok();
        if self.outgoing.is_some() || self.record.is_some() {
            info.x_populated_source = populated;
        } else if self.incoming.is_some() {
            info.x_populated_target = populated;
        }
        info
    }
}

/// An upgrade by exec is one migration, whose beginning only the old program has seen.
fn whole_of_exec(info: &mut MigrationInfo, succession: &Succession) {
    let Some(blackout) = succession.blackout() else {
        return;
    };
    let Succession { account, times, .. } = succession;
    info.total_time = Some(times.running_us.saturating_sub(account.began_us) / 1000);
    info.downtime = Some(blackout.total_us / 1000);
    info.x_blackout = Some(blackout);
    info.x_guest_stall_us = account.guest_stall_us;
}

fn incoming_info(incoming: &Incoming, total: u64) -> MigrationInfo {
    let progress = incoming.progress();
    let status = qmp_status(incoming.core().status());
    MigrationInfo {
        status: (status != MigrationStatus::None).then_some(status),
        ram: Some(RamInfo {
            transferred: progress.connection_bytes.iter().sum(),
            total,
            page_size: PAGE_SIZE,
            ..RamInfo::default()
        }),
        error_desc: incoming.core().error().map(ToString::to_string),
        socket_address: SocketAddressInfo::from_address(incoming.address())
            .map(|address| vec![address]),
        x_connections: Some(progress.connection_bytes.len() as u64),
        x_backend: Some(incoming.backend().backend.name().to_owned()),
        ..MigrationInfo::default()
    }
}
