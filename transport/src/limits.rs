//! Every bound on what a peer may send and every deadline, in one place, each with its reason.

/// Protocol versions that this build speaks.
pub const VERSION_MIN: u16 = 1;
/// Newest protocol version that this build speaks.
pub const VERSION_MAX: u16 = 1;

/// Longest name of a RAM block, device or schema, in bytes: QEMU's block names reach about 60.
pub const NAME_BYTES_MAX: usize = 255;
/// Longest free text (error reasons, software names), in bytes. Bounded because it is shown and logged.
pub const TEXT_BYTES_MAX: usize = 4096;
/// Most RAM blocks of a VM: memory hot-plug makes hundreds.
pub const BLOCKS_MAX: usize = 1024;
/// Most devices of a VM: one per vCPU, and KVM has vCPU counts in the thousands.
pub const DEVICES_MAX: usize = 8192;
/// Most data connections: `multifd-channels` is one byte in QMP.
pub const DATA_CONNECTIONS_MAX: u16 = 255;
/// Longest body of a hello: both lists at their limits with short names fit.
pub const HELLO_BYTES_MAX: u32 = 1 << 20;
/// Longest device section, in bytes.
pub const SECTION_BYTES_MAX: u32 = 16 << 20;
/// Device sections of one migration together, in bytes. Bounds what a target holds before it can load.
pub const SECTIONS_BYTES_MAX: u64 = 256 << 20;
/// Longest body of any other control frame.
pub const CONTROL_BYTES_MAX: u32 = 64 << 10;
/// Largest RAM block, in pages: 16 TiB. Keeps page arithmetic far from overflow.
pub const BLOCK_PAGES_MAX: u64 = 1 << 32;

const _: () = assert!(SECTION_BYTES_MAX as u64 <= SECTIONS_BYTES_MAX);
const _: () = assert!(TEXT_BYTES_MAX < CONTROL_BYTES_MAX as usize);

/// How long a connection may take to say who it is, and a target to answer a hello, in microseconds. A peer that is not vmferry
/// is often just silent.
pub const HELLO_DEADLINE_US: u64 = 10_000_000;
/// How long connecting (name resolution, TCP handshake) and the arrival of all data connections may take, in microseconds.
pub const CONNECT_DEADLINE_US: u64 = 20_000_000;
/// A link on which nothing moves for this long is dead, in microseconds.
pub const STALL_US: u64 = 30_000_000;
/// How often a side that has nothing to say shows that it lives, in microseconds.
pub const KEEPALIVE_US: u64 = 5_000_000;
/// How long the target may take from the last byte of state to READY, in microseconds. The guest is stopped meanwhile.
pub const READY_DEADLINE_US: u64 = 60_000_000;
/// How long the target may take from COMMIT to RUNNING before the source asks on a new connection, in microseconds.
pub const RUNNING_DEADLINE_US: u64 = 10_000_000;
/// Pause between two attempts to ask for the outcome, in microseconds.
pub const RESOLVE_RETRY_US: u64 = 1_000_000;
/// How long the source tries to learn the outcome before it tells the operator that it cannot, in microseconds. It goes on asking.
pub const RESOLVE_DEADLINE_US: u64 = 30_000_000;
/// How long the guest may take to let go of a device before the migration gives up, in microseconds. Guests answer within a second,
/// unless they are busy booting; a guest that never answers must not keep an operator waiting.
pub const UNPLUG_DEADLINE_US: u64 = 30_000_000;
/// How long a target remembers that it refused a migration after READY, so that a source in doubt can ask, in microseconds.
pub const LINGER_US: u64 = 60_000_000;

const _: () = assert!(KEEPALIVE_US * 3 < STALL_US);
const _: () = assert!(RESOLVE_DEADLINE_US < LINGER_US);

/// Every deadline of a migration. Both sides should have the same ones, or a side takes the other's pauses for silence.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Deadlines {
    /// [`HELLO_DEADLINE_US`].
    pub hello_us: u64,
    /// [`CONNECT_DEADLINE_US`].
    pub connect_us: u64,
    /// [`STALL_US`].
    pub stall_us: u64,
    /// [`KEEPALIVE_US`].
    pub keepalive_us: u64,
    /// [`READY_DEADLINE_US`].
    pub ready_us: u64,
    /// [`RUNNING_DEADLINE_US`].
    pub running_us: u64,
    /// [`RESOLVE_RETRY_US`].
    pub resolve_retry_us: u64,
    /// [`RESOLVE_DEADLINE_US`].
    pub resolve_us: u64,
    /// [`UNPLUG_DEADLINE_US`].
    pub unplug_us: u64,
    /// [`LINGER_US`].
    pub linger_us: u64,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self::scaled(100)
    }
}

impl Deadlines {
    /// All of them multiplied by `percent` / 100, so that they keep their proportions.
    #[must_use]
    pub const fn scaled(percent: u32) -> Self {
        const fn scale(micros: u64, percent: u32) -> u64 {
            micros.saturating_mul(percent as u64) / 100
        }
        Self {
            hello_us: scale(HELLO_DEADLINE_US, percent),
            connect_us: scale(CONNECT_DEADLINE_US, percent),
            stall_us: scale(STALL_US, percent),
            keepalive_us: scale(KEEPALIVE_US, percent),
            ready_us: scale(READY_DEADLINE_US, percent),
            running_us: scale(RUNNING_DEADLINE_US, percent),
            resolve_retry_us: scale(RESOLVE_RETRY_US, percent),
            resolve_us: scale(RESOLVE_DEADLINE_US, percent),
            unplug_us: scale(UNPLUG_DEADLINE_US, percent),
            linger_us: scale(LINGER_US, percent),
        }
    }
}
