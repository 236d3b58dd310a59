//! What a world begins with: its guest, its target, and how an attempt is configured.

use vmferry_transport::limits::Deadlines;
use vmferry_transport::proto::{
    Source, SourceConfig, SourceTuning, Target, TargetConfig, ThrottleTuning,
};
use vmferry_transport::units::{MigrationId, PageCount, Uuid};
use vmferry_transport::wire::DeviceSchema;
use vmferry_transport::wire::hello::BlockInfo;

use super::notifiers::Audience;
use super::run_control::Guest;
use super::target_host::{AfterFailure, TargetHost};
use super::{Side, World};

impl World {
    /// The guest has run for a while; some of its memory was never touched.
    pub(super) fn boot(&mut self) {
        self.source.running = true;
        self.source.disks.active = true;
        self.source.notifiers = Audience::new(self.rng.index(5));
        let blocks = self.blocks.clone();
        for _ in 0..self.rng.below(12) {
            let mut writes = self.dirtier;
            writes.pages_per_sec = 1_000_000;
            let written = writes.write(&mut self.rng, &blocks, 1_000);
            self.dirtier.next = writes.next;
            self.guest_writes(Side::Source, written);
        }
        if self.rng.chance(120) {
            self.guest_should_run = false;
            self.source.guest = Guest::Stopped(self.pause_guest());
            // It was never started here, or was given away before and came back.
            self.source.disks.active = self.rng.chance(500);
        }
        self.target = self.new_target();
    }

    pub(super) fn new_target(&mut self) -> TargetHost {
        let config = target_config(&self.blocks, &self.devices);
        let mut target = TargetHost::new(Target::new(config), &self.blocks);
        target.eager = self.rng.chance(300);
        target.notifiers = Audience::new(self.rng.index(3));
        let after_failure = self.rng.pick(&[
            AfterFailure::ListenAgain,
            AfterFailure::ListenAgain,
            AfterFailure::Exit,
        ]);
        // Memory that is shared with a source is no place for another guest.
        target.after_failure = if self.in_place {
            AfterFailure::Exit
        } else {
            after_failure
        };
        target
    }

    pub(super) fn start_attempt(&mut self) {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.rng.bits().to_le_bytes());
        let config = SourceConfig {
            migration_id: MigrationId(id),
            data_connections: if self.in_place {
                0
            } else {
                self.data_connections
            },
            checksum: false,
            verify: self.verify,
            software: "simulated source".to_owned(),
            blocks: block_infos(&self.blocks),
            devices: self.devices.clone(),
            guest_runs: matches!(self.source.guest, Guest::Running),
            uuid: self.rng.chance(300).then_some(Uuid([7; 16])),
            switchover_ack: self.rng.chance(300),
            pause_before_switchover: self
                .pause_before_switchover
                .unwrap_or_else(|| self.rng.chance(200)),
            deadlines: Deadlines::default(),
        };
        let limit = self.rng.pick(&[300_000, 300_000, 20_000]);
        self.tuning = SourceTuning {
            auto_converge: self.rng.chance(300).then_some(THROTTLE),
            ..tuning(limit)
        };
        self.source.begin_again(Source::new(config, self.tuning));
        let now = self.moment();
        self.source.core.start(now);
    }
}

pub(super) fn device(number: u64) -> DeviceSchema {
    DeviceSchema {
        name: format!("device/{number}"),
        schema: "simulated".to_owned(),
        version_min: 1,
        version_max: 2,
    }
}

pub(super) fn block_infos(blocks: &[u64]) -> Vec<BlockInfo> {
    let infos = blocks.iter().enumerate().map(|(number, pages)| BlockInfo {
        name: format!("ram{number}"),
        pages: PageCount(*pages),
        page_bytes: 4096,
    });
    infos.collect()
}

pub(super) fn target_config(blocks: &[u64], devices: &[DeviceSchema]) -> TargetConfig {
    TargetConfig {
        blocks: block_infos(blocks),
        devices: devices.to_vec(),
        streamed: Vec::new(),
        software: "simulated target".to_owned(),
        uuid: Some(Uuid([7; 16])),
        in_place: None,
        deadlines: Deadlines::default(),
    }
}

/// Harsh, so that a short run sees it.
pub(super) const THROTTLE: ThrottleTuning = ThrottleTuning {
    trigger_percent: 1,
    initial_percent: 20,
    increment_percent: 40,
    max_percent: 99,
    tailslow: false,
};

pub(super) fn tuning(downtime_limit_us: u64) -> SourceTuning {
    SourceTuning {
        downtime_limit_us,
        switchover_bytes_per_sec: None,
        auto_converge: None,
    }
}

/// Stands in until the first attempt begins.
pub(super) fn no_config() -> SourceConfig {
    SourceConfig {
        migration_id: MigrationId::default(),
        data_connections: 1,
        checksum: false,
        verify: false,
        software: String::new(),
        blocks: Vec::new(),
        devices: Vec::new(),
        guest_runs: false,
        uuid: None,
        switchover_ack: false,
        pause_before_switchover: false,
        deadlines: Deadlines::default(),
    }
}
