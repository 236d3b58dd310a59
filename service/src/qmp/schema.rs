//! What commands return, as it goes over the wire. Names and units are QEMU's; members of ours begin with `x-`.
//!
//! The types read as well as write, because the command line reads them back; reading takes what is there, so that the answers of
//! QEMU (no `x-` members) and of other versions do too.

use serde::{Deserialize, Serialize};
use vmferry_transport::control::Address;

use super::command::{DirtyRateMode, TimeUnit};
use crate::machine::disk::DiskInfo;
use crate::machine::workload::WorkloadStats;
use crate::migration::status::MigrationStatus;

/// QEMU's version whose commands and shapes this follows; clients choose features by it.
pub const QEMU_VERSION: Version = Version {
    major: 11,
    minor: 1,
    micro: 0,
};

/// A version in three numbers.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Version {
    /// First.
    pub major: u32,
    /// Second.
    pub minor: u32,
    /// Third.
    pub micro: u32,
}

/// `query-version`, and part of the greeting.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct VersionInfo {
    /// The QEMU version whose control surface this resembles.
    pub qemu: Version,
    /// What really answers.
    pub package: String,
}

impl VersionInfo {
    /// Of this program.
    pub fn ours() -> Self {
        Self {
            qemu: QEMU_VERSION,
            package: concat!("vmferry ", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// One line of `query-commands`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct CommandInfo {
    /// Name.
    pub name: String,
}

/// State of the VM, by QEMU's names.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Built, not started yet.
    Prelaunch,
    /// Waits for an incoming migration, or is loading one.
    Inmigrate,
    /// The guest runs.
    Running,
    /// Stopped by the operator.
    Paused,
    /// Stopped for the switchover.
    FinishMigrate,
    /// Handed over: another process has the guest, or may have it.
    Postmigrate,
    /// The guest has ended.
    Shutdown,
    /// A vCPU cannot go on.
    InternalError,
}

impl RunState {
    /// Every state there is.
    pub const ALL: [Self; 8] = [
        Self::Prelaunch,
        Self::Inmigrate,
        Self::Running,
        Self::Paused,
        Self::FinishMigrate,
        Self::Postmigrate,
        Self::Shutdown,
        Self::InternalError,
    ];

    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prelaunch => "prelaunch",
            Self::Inmigrate => "inmigrate",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::FinishMigrate => "finish-migrate",
            Self::Postmigrate => "postmigrate",
            Self::Shutdown => "shutdown",
            Self::InternalError => "internal-error",
        }
    }
}

/// `query-status`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct StatusInfo {
    /// Whether vCPUs run.
    pub running: bool,
    /// In more detail.
    pub status: RunState,
}

/// `query-name`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct NameInfo {
    /// As given on the command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// One disk in `query-block`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockInfo {
    /// Name of the disk.
    pub device: String,
    /// Always false: disks are not removed.
    pub removable: bool,
    /// Always false; QEMU's word for a locked tray, not for our lock of the image.
    pub locked: bool,
    /// Always `unknown`, as QEMU has it.
    #[serde(rename = "type")]
    pub kind: String,
    /// The image.
    pub inserted: BlockImageInfo,
}

/// Member `inserted` of `query-block`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockImageInfo {
    /// Path of the image.
    pub file: String,
    /// Always `raw`.
    pub drv: String,
    /// The guest only reads it.
    pub ro: bool,
    /// Whether this process holds the image's lock and may use it; false at the target of a migration until its guest starts, and at the
    /// source from the switchover on.
    pub active: bool,
    /// Size in bytes.
    pub x_size: u64,
}

impl From<DiskInfo> for BlockInfo {
    fn from(disk: DiskInfo) -> Self {
        let DiskInfo {
            config,
            size_bytes,
            active,
        } = disk;
        Self {
            device: config.id,
            removable: false,
            locked: false,
            kind: "unknown".to_owned(),
            inserted: BlockImageInfo {
                file: config.path.display().to_string(),
                drv: "raw".to_owned(),
                ro: config.read_only,
                active,
                x_size: size_bytes,
            },
        }
    }
}

/// `query-uuid`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct UuidInfo {
    /// The VM's UUID; all zero if it was given none.
    #[serde(rename = "UUID")]
    pub uuid: String,
}

/// `x-add-blocker`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct BlockerInfo {
    /// To remove it with.
    pub id: u64,
}

/// `query-kvm`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct KvmInfo {
    /// KVM runs this guest.
    pub enabled: bool,
    /// /dev/kvm can be used here.
    pub present: bool,
}

/// `vfio` of `query-migrate`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct VfioInfo {
    /// Bytes of device state on their way or there; counted when a round is.
    pub transferred: u64,
}

/// `query-migrate`. Sides and states fill what they know; everything else is left out.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// Where the migration is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<MigrationStatus>,
    /// Memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<RamInfo>,
    /// VFIO devices, once they have given anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vfio: Option<VfioInfo>,
    /// Bytes still to send, of everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remaining: Option<u64>,
    /// Milliseconds since the start, or from start to end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_time: Option<u64>,
    /// Milliseconds until the first page was sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setup_time: Option<u64>,
    /// Blackout in milliseconds, once it is over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// Predicted blackout in milliseconds, before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime: Option<u64>,
    /// Share of vCPU time that is being taken away so that the migration converges, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_percentage: Option<u64>,
    /// Why it failed, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_desc: Option<String>,
    /// Why a migration would be refused now; left out if it would not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked_reasons: Option<Vec<String>>,
    /// Where this process listens for an incoming migration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_address: Option<Vec<SocketAddressInfo>>,
    /// The blackout in parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_blackout: Option<BlackoutInfo>,
    /// Longest time that the guest could not write because of the migration before the blackout, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_guest_stall_us: Option<u64>,
    /// The round being sent, the first is 1; when over, how many there were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_round: Option<u64>,
    /// Blackout in microseconds if the switchover came now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_predicted_blackout_us: Option<u64>,
    /// Bytes of guest memory that exist at the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_populated_source: Option<u64>,
    /// Bytes of guest memory that exist at the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_populated_target: Option<u64>,
    /// Data connections in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_connections: Option<u64>,
    /// What moves the pages: `io_uring` or `sockets`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_backend: Option<String>,
    /// Zero-copy sends that the kernel did by copying.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_zero_copy_fallbacks: Option<u64>,
    /// What both sides found when they compared themselves (parameter `x-verify`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_verification: Option<VerificationInfo>,
}

/// Member `ram` of `query-migrate`. Sizes in bytes, other counts in pages.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct RamInfo {
    /// Bytes sent.
    pub transferred: u64,
    /// Bytes still to send in this round.
    pub remaining: u64,
    /// Bytes of RAM.
    pub total: u64,
    /// Zero pages sent as such.
    pub duplicate: u64,
    /// Pages sent with their content.
    pub normal: u64,
    /// The same in bytes.
    pub normal_bytes: u64,
    /// Pages dirtied per second.
    pub dirty_pages_rate: u64,
    /// Megabits per second.
    pub mbps: f64,
    /// Times the dirty log was fetched.
    pub dirty_sync_count: u64,
    /// Pages that the running target asked for.
    pub postcopy_requests: u64,
    /// Bytes in a page.
    pub page_size: u64,
    /// Bytes sent over data connections.
    pub multifd_bytes: u64,
    /// Pages sent per second.
    pub pages_per_second: u64,
    /// Bytes sent before the blackout.
    pub precopy_bytes: u64,
    /// Bytes sent in the blackout.
    pub downtime_bytes: u64,
    /// Bytes sent after the target started.
    pub postcopy_bytes: u64,
    /// Rounds in which zero copy was asked for and not done.
    pub dirty_sync_missed_zero_copy: u64,
}

/// The blackout: from asking the first vCPU to stop until the target has said that its vCPUs run. Microseconds; the parts follow
/// each other and add up to the total.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct BlackoutInfo {
    /// All of it.
    pub total_us: u64,
    /// Stopping the vCPUs.
    pub pause_us: u64,
    /// Waiting for the operator in `pre-switchover`.
    pub pre_switchover_us: u64,
    /// Last fetch of the dirty log.
    pub dirty_fetch_us: u64,
    /// Sending the last round.
    pub last_round_us: u64,
    /// Saving and sending device state.
    pub device_state_us: u64,
    /// The new program beginning, if the process has become one.
    #[serde(skip_serializing_if = "is_zero")]
    pub exec_us: u64,
    /// Its machine being built around the memory.
    #[serde(skip_serializing_if = "is_zero")]
    pub build_us: u64,
    /// The target loading it.
    pub load_us: u64,
    /// Comparing both sides, if asked for.
    pub verify_us: u64,
    /// Commit exchange.
    pub commit_us: u64,
    /// The target starting its vCPUs.
    pub resume_us: u64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that serde asks for"
)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl BlackoutInfo {
    /// The parts with their names, in the order in which they happen.
    pub fn parts(&self) -> [(&'static str, u64); 11] {
        let Self {
            total_us: _,
            pause_us,
            pre_switchover_us,
            dirty_fetch_us,
            last_round_us,
            device_state_us,
            exec_us,
            build_us,
            load_us,
            verify_us,
            commit_us,
            resume_us,
        } = *self;
        [
            ("pause", pause_us),
            ("pre-switchover", pre_switchover_us),
            ("last dirty fetch", dirty_fetch_us),
            ("last round", last_round_us),
            ("device state", device_state_us),
            ("exec", exec_us),
            ("build", build_us),
            ("load", load_us),
            ("verify", verify_us),
            ("commit", commit_us),
            ("resume", resume_us),
        ]
    }
}

/// Member `x-verification` of `query-migrate`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct VerificationInfo {
    /// Hash of all RAM at the source after the pause, in hexadecimal.
    pub ram_hash_source: String,
    /// Hash of all RAM at the target before it ran.
    pub ram_hash_target: String,
    /// The target's vCPUs and devices, saved again before it ran, are what the source sent.
    pub vcpus_equal: bool,
}

/// An address the way QEMU's `SocketAddress` writes it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum SocketAddressInfo {
    /// TCP.
    Inet {
        /// Host.
        host: String,
        /// Port; a string in QMP.
        port: String,
    },
    /// Unix socket.
    Unix {
        /// Path.
        path: String,
    },
    /// Between VMs and their host.
    Vsock {
        /// Context id; a string in QMP.
        cid: String,
        /// Port; a string in QMP.
        port: String,
    },
    /// A descriptor that was passed in.
    Fd {
        /// Its name.
        str: String,
    },
}

impl SocketAddressInfo {
    /// The QMP form of `address`; `None` for kinds that QMP has no form for.
    pub fn from_address(address: &Address) -> Option<Self> {
        match address {
            Address::Tcp { host, port } => Some(Self::Inet {
                host: host.clone(),
                port: port.to_string(),
            }),
            Address::Unix { path } => Some(Self::Unix {
                path: path.display().to_string(),
            }),
            Address::Vsock { cid, port } => Some(Self::Vsock {
                cid: cid.to_string(),
                port: port.to_string(),
            }),
            Address::Fd { name } => Some(Self::Fd { str: name.clone() }),
            _ => None,
        }
    }

    /// As an address again.
    ///
    /// # Errors
    /// The answer names none.
    pub fn to_address(&self) -> Result<Address, vmferry_transport::control::AddressError> {
        match self {
            Self::Inet { host, port } if host.contains(':') => {
                format!("tcp:[{host}]:{port}").parse()
            }
            Self::Inet { host, port } => format!("tcp:{host}:{port}").parse(),
            Self::Unix { path } => format!("unix:{path}").parse(),
            Self::Vsock { cid, port } => format!("vsock:{cid}:{port}").parse(),
            Self::Fd { str } => format!("fd:{str}").parse(),
        }
    }
}

/// How far a measurement of the dirty rate is.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyRateStatus {
    /// There was none, or it was given up.
    #[default]
    Unstarted,
    /// Under way.
    Measuring,
    /// Over.
    Measured,
}

/// `query-dirty-rate`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct DirtyRateInfo {
    /// MiB per second, once measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_rate: Option<u64>,
    /// How far it is.
    pub status: DirtyRateStatus,
    /// When it began, in seconds of the monotonic clock.
    pub start_time: u64,
    /// How long it measures, in `calc_time_unit`.
    pub calc_time: u64,
    /// The unit.
    pub calc_time_unit: TimeUnit,
    /// Pages per GiB that were looked at; 0 if every page was.
    pub sample_pages: u64,
    /// How it was measured.
    pub mode: DirtyRateMode,
    /// Why there is no result, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_error: Option<String>,
}

/// `x-query-workload`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct WorkloadInfo {
    /// Complete passes over the working set: the smallest count of any vCPU.
    pub passes: u64,
    /// Pages found with wrong content. Anything but 0 is corruption.
    pub errors: u64,
    /// Guest-physical address of the first wrong page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_error_gpa: Option<u64>,
    /// Longest time between two writes of one vCPU, in microseconds.
    pub longest_gap_us: u64,
    /// Pages written since start.
    pub pages_written: u64,
    /// Pages of the fill written so far.
    pub filled_pages: u64,
    /// Pages of the fill.
    pub fill_pages: u64,
    /// Blocks of 4 KiB written to its disk.
    pub disk_blocks_written: u64,
    /// Blocks read back from its disk and compared with what was written there last.
    pub disk_blocks_checked: u64,
    /// Blocks that were wrong, and requests that failed. They count in `errors` too.
    pub disk_errors: u64,
}

impl From<WorkloadStats> for WorkloadInfo {
    fn from(stats: WorkloadStats) -> Self {
        let WorkloadStats {
            passes,
            errors,
            first_error_gpa,
            longest_gap_us,
            pages_written,
            filled_pages,
            fill_pages,
            disk_blocks_written,
            disk_blocks_checked,
            disk_errors,
        } = stats;
        Self {
            passes,
            errors,
            first_error_gpa,
            longest_gap_us,
            pages_written,
            filled_pages,
            fill_pages,
            disk_blocks_written,
            disk_blocks_checked,
            disk_errors,
        }
    }
}

/// `x-ram-hash`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct RamHashInfo {
    /// Hash of all RAM, in hexadecimal.
    pub hash: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn nothing_known_is_an_empty_object() {
        assert_eq!(
            serde_json::to_value(MigrationInfo::default()).unwrap(),
            json!({})
        );
    }

    #[test]
    fn member_names_are_qemus_and_ours_begin_with_x() {
        let info = MigrationInfo {
            status: Some(MigrationStatus::Active),
            ram: Some(RamInfo {
                normal_bytes: 4096,
                ..Default::default()
            }),
            error_desc: Some("no".into()),
            x_blackout: Some(BlackoutInfo {
                last_round_us: 7,
                ..Default::default()
            }),
            x_verification: Some(VerificationInfo {
                vcpus_equal: true,
                ..Default::default()
            }),
            ..Default::default()
        };
        let json = serde_json::to_value(&info).unwrap();
        assert_eq!(json["status"], "active");
        assert_eq!(json["ram"]["normal-bytes"], 4096);
        assert_eq!(json["ram"]["dirty-sync-missed-zero-copy"], 0);
        assert_eq!(json["error-desc"], "no");
        assert_eq!(json["x-blackout"]["last-round-us"], 7);
        assert_eq!(json["x-verification"]["vcpus-equal"], true);
        assert_eq!(serde_json::from_value::<MigrationInfo>(json).unwrap(), info);
    }

    #[test]
    fn an_answer_of_another_vmm_is_read_as_far_as_it_goes() {
        let json =
            json!({"status": "active", "ram": {"total": 5, "mbps": 1.5, "new": {}}, "vfio": {}});
        let info: MigrationInfo = serde_json::from_value(json).unwrap();
        assert_eq!(info.ram.unwrap().total, 5);
    }

    #[test]
    fn addresses_survive_the_qmp_form() {
        for text in [
            "tcp:127.0.0.1:5",
            "tcp:[::1]:5",
            "unix:/x",
            "vsock:3:5",
            "fd:name",
        ] {
            let address: Address = text.parse().unwrap();
            let info = SocketAddressInfo::from_address(&address).unwrap();
            let json = serde_json::to_value(&info).unwrap();
            let back: SocketAddressInfo = serde_json::from_value(json).unwrap();
            assert_eq!(back.to_address().unwrap(), address);
        }
        let json = serde_json::to_value(
            SocketAddressInfo::from_address(&"tcp:[::1]:5".parse().unwrap()).unwrap(),
        );
        assert_eq!(
            json.unwrap(),
            json!({"type": "inet", "host": "::1", "port": "5"})
        );
    }

    #[test]
    fn the_parts_of_a_blackout_add_up_to_every_field() {
        let info = BlackoutInfo {
            total_us: 2047,
            pause_us: 1,
            pre_switchover_us: 256,
            dirty_fetch_us: 2,
            last_round_us: 4,
            device_state_us: 8,
            exec_us: 512,
            build_us: 1024,
            load_us: 16,
            verify_us: 32,
            commit_us: 64,
            resume_us: 128,
        };
        assert_eq!(
            info.parts().iter().map(|(_, us)| us).sum::<u64>(),
            info.total_us
        );
    }
}
