//! The first frame of every connection: who speaks, what is to be moved, and whether the two sides fit.

use super::header::{Reader, put_text};
use super::{DeviceSchema, WireError};
use crate::limits::{
    BLOCK_PAGES_MAX, BLOCKS_MAX, DATA_CONNECTIONS_MAX, DEVICES_MAX, NAME_BYTES_MAX, TEXT_BYTES_MAX,
    VERSION_MAX, VERSION_MIN,
};
use crate::units::{MigrationId, PAGE_SIZE, PageCount, Uuid};

/// Protocol versions one side speaks, both ends included.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct VersionRange {
    /// Oldest.
    pub min: u16,
    /// Newest.
    pub max: u16,
}

impl VersionRange {
    /// What this build speaks.
    pub const OURS: Self = Self {
        min: VERSION_MIN,
        max: VERSION_MAX,
    };

    /// The newest version that both sides speak.
    pub fn common(self, other: Self) -> Option<u16> {
        let newest = self.max.min(other.max);
        (newest >= self.min.max(other.min)).then_some(newest)
    }
}

impl std::fmt::Display for VersionRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.min == self.max {
            write!(f, "{}", self.min)
        } else {
            write!(f, "{} to {}", self.min, self.max)
        }
    }
}

/// One RAM block as the hello names it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BlockInfo {
    /// Name, the same on both sides.
    pub name: String,
    /// Size.
    pub pages: PageCount,
    /// Size of the pages that back it on this side, in bytes: 4096, or a huge page size.
    pub page_bytes: u32,
}

/// First frame of the control connection, source to target.
///
/// | size | field |
/// |---|---|
/// | 2, 2 | oldest and newest protocol version |
/// | 16 | migration id |
/// | 2 | number of data connections, 1 to 255; 0 in place |
/// | 1 | wishes: bit 0 checksums over page data, bit 1 verification of RAM and vCPUs before READY, bit 2 SWITCHOVER_ACK, bit 3 a UUID follows, bit 4 in place: RAM is there already |
/// | 16 | the VM's UUID, with bit 3 only |
/// | text | name and version of the source's software |
/// | 2 | number of RAM blocks, then per block: text name, 8 size in bytes, 4 backing page size |
/// | 2 | number of devices, then per device: text name, text schema, 4 oldest, 4 newest version |
///
/// A text is a 16-bit length and that many bytes of UTF-8.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Hello {
    /// What the source speaks.
    pub versions: VersionRange,
    /// Names this attempt.
    pub migration_id: MigrationId,
    /// How many data connections will follow. None: RAM stays in place, because both processes map the same files.
    pub data_connections: u16,
    /// Page data carries a CRC32C.
    pub checksum: bool,
    /// Both sides hash RAM at the switchover, and the target reads its vCPUs back.
    pub verify: bool,
    /// Name and version of the source's software, for messages.
    pub software: String,
    /// RAM to come; positions are the block ids of RAM frames.
    pub blocks: Vec<BlockInfo>,
    /// Devices to come.
    pub devices: Vec<DeviceSchema>,
    /// The VM's UUID, to be compared with the target's if that has one.
    pub uuid: Option<Uuid>,
    /// The source waits for SWITCHOVER_ACK before it stops the guest.
    pub switchover_ack: bool,
}

impl Hello {
    /// Whether RAM does not move: the target has the source's files, from a hand-over of descriptors.
    pub fn is_in_place(&self) -> bool {
        self.data_connections == 0
    }

    /// The body of the frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(256);
        body.extend_from_slice(&self.versions.min.to_le_bytes());
        body.extend_from_slice(&self.versions.max.to_le_bytes());
        body.extend_from_slice(&self.migration_id.0);
        body.extend_from_slice(&self.data_connections.to_le_bytes());
        body.push(
            u8::from(self.checksum)
                | u8::from(self.verify) << 1
                | u8::from(self.switchover_ack) << 2
                | u8::from(self.uuid.is_some()) << 3
                | u8::from(self.is_in_place()) << 4,
        );
        if let Some(Uuid(uuid)) = self.uuid {
            body.extend_from_slice(&uuid);
        }
        put_text(&mut body, &self.software, TEXT_BYTES_MAX);
        put_count(&mut body, self.blocks.len());
        for BlockInfo {
            name,
            pages,
            page_bytes,
        } in &self.blocks
        {
            put_text(&mut body, name, NAME_BYTES_MAX);
            body.extend_from_slice(&pages.to_bytes().to_le_bytes());
            body.extend_from_slice(&page_bytes.to_le_bytes());
        }
        put_count(&mut body, self.devices.len());
        for DeviceSchema {
            name,
            schema,
            version_min,
            version_max,
        } in &self.devices
        {
            put_text(&mut body, name, NAME_BYTES_MAX);
            put_text(&mut body, schema, NAME_BYTES_MAX);
            body.extend_from_slice(&version_min.to_le_bytes());
            body.extend_from_slice(&version_max.to_le_bytes());
        }
        body
    }

    /// Reads the body of the frame. What follows the version range is read only if there is a common version: a newer hello may look
    /// different behind it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let versions = VersionRange {
            min: reader.u16()?,
            max: reader.u16()?,
        };
        if versions.min > versions.max {
            return Err(WireError::Value {
                field: "oldest version",
                value: u64::from(versions.min),
            });
        }
        if VersionRange::OURS.common(versions).is_none() {
            return Err(WireError::Version {
                ours: VersionRange::OURS,
                theirs: versions,
            });
        }
        let migration_id = MigrationId(reader.id()?);
        let data_connections = reader.u16()?;
        let wishes = reader.u8()?;
        // A count of 0 alone is more likely a mistake than an upgrade in place.
        let in_place = wishes & 16 != 0;
        if (data_connections == 0) != in_place || data_connections > DATA_CONNECTIONS_MAX {
            return Err(WireError::Value {
                field: "data connections",
                value: u64::from(data_connections),
            });
        }
        if wishes > 31 {
            return Err(WireError::Value {
                field: "wishes",
                value: u64::from(wishes),
            });
        }
        let uuid = if wishes & 8 == 0 {
            None
        } else {
            Some(Uuid(reader.id()?))
        };
        let software = reader.text("software", TEXT_BYTES_MAX)?;
        let blocks = list(&mut reader, "RAM blocks", BLOCKS_MAX, read_block)?;
        let devices = list(&mut reader, "devices", DEVICES_MAX, read_device)?;
        reader.finish()?;
        let (checksum, verify) = (wishes & 1 != 0, wishes & 2 != 0);
        Ok(Self {
            versions,
            migration_id,
            data_connections,
            checksum,
            verify,
            software,
            blocks,
            devices,
            uuid,
            switchover_ack: wishes & 4 != 0,
        })
    }
}

fn put_count(body: &mut Vec<u8>, count: usize) {
    let count = u16::try_from(count).expect("lists are bounded far below 65536");
    body.extend_from_slice(&count.to_le_bytes());
}

fn list<T>(
    reader: &mut Reader<'_>,
    field: &'static str,
    max: usize,
    read: impl Fn(&mut Reader<'_>) -> Result<T, WireError>,
) -> Result<Vec<T>, WireError> {
    let count = usize::from(reader.u16()?);
    if count > max {
        return Err(WireError::TooLong {
            field,
            len: count as u64,
            max: max as u64,
        });
    }
    // Grows as entries are read, so that a count alone allocates nothing.
    (0..count).map(|_| read(reader)).collect()
}

fn read_block(reader: &mut Reader<'_>) -> Result<BlockInfo, WireError> {
    let name = reader.text("RAM block name", NAME_BYTES_MAX)?;
    let bytes = reader.u64()?;
    if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) || bytes / PAGE_SIZE > BLOCK_PAGES_MAX {
        return Err(WireError::Value {
            field: "RAM block size",
            value: bytes,
        });
    }
    let page_bytes = reader.u32()?;
    if !page_bytes.is_power_of_two() || u64::from(page_bytes) < PAGE_SIZE {
        return Err(WireError::Value {
            field: "RAM block page size",
            value: u64::from(page_bytes),
        });
    }
    Ok(BlockInfo {
        name,
        pages: PageCount(bytes / PAGE_SIZE),
        page_bytes,
    })
}

fn read_device(reader: &mut Reader<'_>) -> Result<DeviceSchema, WireError> {
    Ok(DeviceSchema {
        name: reader.text("device name", NAME_BYTES_MAX)?,
        schema: reader.text("device schema", NAME_BYTES_MAX)?,
        version_min: reader.u32()?,
        version_max: reader.u32()?,
    })
}

/// The target's answer to a hello that fits.
///
/// | size | field |
/// |---|---|
/// | 2 | protocol version from here on |
/// | text | name and version of the target's software |
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HelloReply {
    /// The version chosen: the newest both speak.
    pub version: u16,
    /// Name and version of the target's software, for messages.
    pub software: String,
}

impl HelloReply {
    /// The body of the frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = self.version.to_le_bytes().to_vec();
        put_text(&mut body, &self.software, TEXT_BYTES_MAX);
        body
    }

    /// Reads the body of the frame.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let reply = Self {
            version: reader.u16()?,
            software: reader.text("software", TEXT_BYTES_MAX)?,
        };
        reader.finish()?;
        Ok(reply)
    }
}

/// First frame of a data connection, source to target. There is no answer on it.
///
/// | size | field |
/// |---|---|
/// | 2 | protocol version, as the hello's reply said |
/// | 16 | migration id |
/// | 2, 2 | index of this connection, and how many there are |
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DataHello {
    /// The version of the control connection.
    pub version: u16,
    /// The attempt this connection belongs to.
    pub migration_id: MigrationId,
    /// Which connection, from 0.
    pub index: u16,
    /// How many there are.
    pub count: u16,
}

impl DataHello {
    /// The body of the frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = self.version.to_le_bytes().to_vec();
        body.extend_from_slice(&self.migration_id.0);
        body.extend_from_slice(&self.index.to_le_bytes());
        body.extend_from_slice(&self.count.to_le_bytes());
        body
    }

    /// Reads the body of the frame.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let version = reader.u16()?;
        let hello = Self {
            version,
            migration_id: MigrationId(reader.id()?),
            index: reader.u16()?,
            count: reader.u16()?,
        };
        reader.finish()?;
        if hello.index >= hello.count {
            return Err(WireError::Value {
                field: "data connection index",
                value: u64::from(hello.index),
            });
        }
        Ok(hello)
    }
}

/// Compares what the source offers with what the target has. Pure: no side effect on either.
///
/// # Errors
/// A text that names the first difference with both sides' values, made to be read by the operator of the source.
pub fn compare(
    hello: &Hello,
    blocks: &[BlockInfo],
    devices: &[DeviceSchema],
    uuid: Option<Uuid>,
) -> Result<(), String> {
    if let (Some(theirs), Some(ours)) = (hello.uuid, uuid)
        && theirs != ours
    {
        return Err(format!(
            "this is another VM: the UUID is {theirs} at the source and {ours} at the target"
        ));
    }
    compare_blocks(&hello.blocks, blocks)?;
    compare_devices(&hello.devices, devices)
}

fn compare_blocks(source: &[BlockInfo], target: &[BlockInfo]) -> Result<(), String> {
    for block in source {
        let Some(ours) = target.iter().find(|ours| ours.name == block.name) else {
            return Err(format!(
                "RAM block {:?} of the source does not exist at the target",
                block.name
            ));
        };
        if ours.pages != block.pages {
            return Err(format!(
                "RAM block {:?} has {} bytes at the source and {} bytes at the target; start the target with the same --mem",
                block.name,
                block.pages.to_bytes(),
                ours.pages.to_bytes()
            ));
        }
        if ours.page_bytes != block.page_bytes {
            return Err(format!(
                "RAM block {:?} is backed by pages of {} bytes at the source and of {} bytes at the target",
                block.name, block.page_bytes, ours.page_bytes
            ));
        }
    }
    if let Some(missing) = target
        .iter()
        .find(|ours| !source.iter().any(|block| block.name == ours.name))
    {
        return Err(format!(
            "RAM block {:?} of the target does not exist at the source",
            missing.name
        ));
    }
    // Block ids are positions: the same order on both sides, which also rules out doubled names.
    if source.len() != target.len() || source.iter().zip(target).any(|(a, b)| a.name != b.name) {
        return Err("the RAM blocks of source and target are not in the same order".to_owned());
    }
    Ok(())
}

fn compare_devices(source: &[DeviceSchema], target: &[DeviceSchema]) -> Result<(), String> {
    for device in source {
        let Some(ours) = target.iter().find(|ours| ours.name == device.name) else {
            return Err(format!(
                "device {:?} of the source does not exist at the target",
                device.name
            ));
        };
        if ours.schema != device.schema {
            return Err(format!(
                "device {:?} is a {:?} at the source and a {:?} at the target",
                device.name, device.schema, ours.schema
            ));
        }
        if !(ours.version_min..=ours.version_max).contains(&device.version_max) {
            return Err(format!(
                "device {:?} saves {:?} version {} at the source, the target loads versions {} to {}",
                device.name, device.schema, device.version_max, ours.version_min, ours.version_max
            ));
        }
    }
    match target
        .iter()
        .find(|ours| !source.iter().any(|device| device.name == ours.name))
    {
        Some(missing) => Err(format!(
            "device {:?} of the target does not exist at the source",
            missing.name
        )),
        None if source.len() != target.len() => Err("the source names a device twice".to_owned()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            versions: VersionRange::OURS,
            migration_id: MigrationId([7; 16]),
            data_connections: 2,
            checksum: false,
            verify: true,
            software: "test 1".into(),
            blocks: vec![block("ram0", 16), block("ram1", 4)],
            devices: vec![device("vcpu/0", 1), device("serial/0", 2)],
            uuid: Some(Uuid([5; 16])),
            switchover_ack: false,
        }
    }

    fn block(name: &str, pages: u64) -> BlockInfo {
        BlockInfo {
            name: name.into(),
            pages: PageCount(pages),
            page_bytes: 4096,
        }
    }

    fn device(name: &str, version: u32) -> DeviceSchema {
        DeviceSchema {
            name: name.into(),
            schema: "s".into(),
            version_min: 1,
            version_max: version,
        }
    }

    #[test]
    fn a_hello_survives_the_wire() {
        assert_eq!(Hello::decode(&hello().encode()).unwrap(), hello());
    }

    #[test]
    fn every_truncation_of_a_hello_is_an_error() {
        let body = hello().encode();
        for len in 0..body.len() {
            assert!(Hello::decode(&body[..len]).is_err(), "cut at {len}");
        }
        let mut longer = body;
        longer.push(0);
        assert_eq!(Hello::decode(&longer), Err(WireError::LeftOver { len: 1 }));
    }

    #[test]
    fn a_newer_protocol_is_refused_with_both_ranges() {
        let mut theirs = hello();
        theirs.versions = VersionRange {
            min: VERSION_MAX + 1,
            max: VERSION_MAX + 3,
        };
        let error = Hello::decode(&theirs.encode()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no common protocol version: this side speaks 1, the peer 2 to 4"
        );
    }

    #[test]
    fn versions_choose_the_newest_common_one() {
        let range = |min, max| VersionRange { min, max };
        assert_eq!(range(1, 5).common(range(3, 9)), Some(5));
        assert_eq!(range(1, 2).common(range(3, 4)), None);
        assert_eq!(range(4, 4).common(range(1, 4)), Some(4));
    }

    #[test]
    fn each_difference_is_named_with_both_values() {
        type Change = fn(&mut Vec<BlockInfo>, &mut Vec<DeviceSchema>);
        let cases: [(&str, Change, &str); 9] = [
            (
                "less memory",
                |b, _| b[0].pages.0 = 8,
                "65536 bytes at the source and 32768 bytes at the target",
            ),
            (
                "other page size",
                |b, _| b[1].page_bytes = 2 << 20,
                "4096 bytes at the source and of 2097152",
            ),
            (
                "block missing",
                |b, _| drop(b.pop()),
                "\"ram1\" of the source does not exist at the target",
            ),
            (
                "block more",
                |b, _| b.push(block("x", 1)),
                "\"x\" of the target does not exist at the source",
            ),
            ("order", |b, _| b.swap(0, 1), "not in the same order"),
            (
                "device missing",
                |_, d| drop(d.pop()),
                "\"serial/0\" of the source does not exist at the target",
            ),
            (
                "device more",
                |_, d| d.push(device("x", 1)),
                "\"x\" of the target does not exist at the source",
            ),
            (
                "schema",
                |_, d| d[0].schema = "t".into(),
                "is a \"s\" at the source and a \"t\" at the target",
            ),
            (
                "too new",
                |_, d| d[1].version_max = 1,
                "saves \"s\" version 2 at the source, the target loads versions 1 to 1",
            ),
        ];
        for (case, change, expected) in cases {
            let Hello {
                mut blocks,
                mut devices,
                ..
            } = hello();
            change(&mut blocks, &mut devices);
            let text = compare(&hello(), &blocks, &devices, None).unwrap_err();
            assert!(text.contains(expected), "{case}: {text}");
        }
        let hello = hello();
        let with = |uuid| compare(&hello, &hello.blocks, &hello.devices, uuid);
        assert_eq!(with(None), Ok(()));
        assert_eq!(with(hello.uuid), Ok(()));
        let text = with(Some(Uuid([6; 16]))).unwrap_err();
        assert!(
            text.contains("05050505-0505-0505-0505-050505050505 at the source"),
            "{text}"
        );
        assert!(
            text.contains("06060606-0606-0606-0606-060606060606 at the target"),
            "{text}"
        );
    }
}
