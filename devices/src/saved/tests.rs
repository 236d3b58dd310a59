//! Every schema keeps its bytes, and what older builds have saved is loaded.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::*;
use crate::kvm::saved::{ClockV1, IrqchipV1, TscV1, VcpuV2};
use crate::vhost::user::VhostUserV1;
use crate::vhost::{RingV1, VhostV1};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/state")
}

fn vhost() -> VhostV1 {
    let ring = RingV1 {
        size: 256,
        desc: 0x1000,
        avail: 0x2000,
        used: 0x3000,
        base: 17,
    };
    VhostV1 {
        features: 0x1_0000_0003,
        rings: vec![Some(ring), None],
    }
}

#[test]
fn state_of_kvm_keeps_its_bytes() {
    let vcpu = VcpuV2 {
        cpuid: vec![1; 40],
        visible_cpuid: Some(vec![2; 40]),
        regs: vec![3; 144],
        sregs: vec![4; 312],
        xcrs: vec![5; 392],
        xsave: vec![6; 4096],
        lapic: Some(vec![7; 1024]),
        msrs: vec![(0x10, 8), (0xc000_0080, u64::MAX)],
        tsc: TscV1 {
            khz: 2_000_000,
            value: 9,
            realtime_ns: 10,
            offset: Some(11),
        },
        events: vec![12; 64],
        debug_regs: vec![13; 128],
        mp_state: 1,
    };
    // The fixture of version 1 asks for the wall clock too.
    fixtures::check(&folder(), &[vcpu.clone(), vcpu]).unwrap();
    let clock = ClockV1 {
        clock_ns: 1,
        realtime_ns: 2,
        host_tsc: Some(3),
    };
    fixtures::check(&folder(), &[clock]).unwrap();
    let irqchip = IrqchipV1 {
        pic_master: vec![1; 520],
        pic_slave: vec![2; 520],
        ioapic: vec![3; 520],
        pit: Some(vec![4; 112]),
    };
    fixtures::check(&folder(), &[irqchip]).unwrap();
}

#[test]
fn state_of_vhost_keeps_its_bytes() {
    fixtures::check(&folder(), &[vhost()]).unwrap();
    let user = VhostUserV1 {
        vhost: vhost(),
        back_end: Some(vec![1, 2, 3]),
    };
    fixtures::check(&folder(), &[user]).unwrap();
}

/// A thermometer, through four versions. It began with degrees only.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct ThermoV1 {
    degrees: u64,
}

/// Got a name.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct ThermoV2 {
    degrees: u64,
    #[serde(default)]
    name: Option<String>,
}

/// Counts in thousandths since.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct ThermoV3 {
    millidegrees: u64,
    #[serde(default)]
    name: Option<String>,
}

/// Got a limit.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct ThermoV4 {
    millidegrees: u64,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    limit: Option<u64>,
}

impl SavedState for ThermoV1 {
    const SCHEMA: &'static str = "thermo";
    const VERSION: u32 = 1;
}

impl SavedState for ThermoV2 {
    const SCHEMA: &'static str = "thermo";
    const VERSION: u32 = 2;
}

impl SavedState for ThermoV3 {
    const SCHEMA: &'static str = "thermo";
    const VERSION: u32 = 3;

    fn upgrade(_: u32, bytes: &[u8]) -> Result<Self, String> {
        // Of version 1 or 2.
        let ThermoV2 { degrees, name } = read(bytes)?;
        let millidegrees = degrees.checked_mul(1000).ok_or("too hot")?;
        Ok(Self { millidegrees, name })
    }
}

impl SavedState for ThermoV4 {
    const SCHEMA: &'static str = "thermo";
    const VERSION: u32 = 4;

    fn upgrade(version: u32, bytes: &[u8]) -> Result<Self, String> {
        let ThermoV3 { millidegrees, name } = match version {
            2 => ThermoV3::upgrade(2, bytes)?,
            _ => read(bytes)?,
        };
        Ok(Self {
            millidegrees,
            name,
            limit: None,
        })
    }
}

fn saved(state: &impl SavedState) -> Section {
    encode("thermo/0", state).unwrap()
}

#[test]
fn state_of_the_last_two_versions_is_loaded_and_older_or_newer_is_not() {
    let name = Some("hall".to_owned());
    let (v1, v2) = (
        ThermoV1 { degrees: 3 },
        ThermoV2 {
            degrees: 4,
            name: name.clone(),
        },
    );
    // A field that came later is absent; one whose meaning has changed is converted, over both steps.
    let absent = ThermoV2 {
        degrees: 3,
        name: None,
    };
    assert_eq!(decode::<ThermoV2>(&saved(&v1)).unwrap(), absent);
    let converted = ThermoV3 {
        millidegrees: 3000,
        name: None,
    };
    assert_eq!(decode::<ThermoV3>(&saved(&v1)).unwrap(), converted);
    let converted = ThermoV4 {
        millidegrees: 4000,
        name,
        limit: None,
    };
    assert_eq!(decode::<ThermoV4>(&saved(&v2)).unwrap(), converted);
    assert_eq!(decode::<ThermoV4>(&saved(&converted)).unwrap(), converted);
    let error = decode::<ThermoV4>(&saved(&v1)).unwrap_err().to_string();
    assert!(error.contains("versions 2 to 4"), "{error}");
    let error = decode::<ThermoV1>(&saved(&v2)).unwrap_err().to_string();
    assert!(error.contains("thermo version 1"), "{error}");
    let hot = ThermoV2 {
        degrees: u64::MAX,
        name: None,
    };
    let error = decode::<ThermoV3>(&saved(&hot)).unwrap_err().to_string();
    assert!(error.contains("too hot"), "{error}");
}

#[test]
fn the_hello_names_the_versions_that_are_loaded() {
    let range = |schema: DeviceSchema| (schema.version_min, schema.version_max);
    assert_eq!(range(schema_of::<ThermoV1>("t")), (1, 1));
    assert_eq!(range(schema_of::<ThermoV2>("t")), (1, 2));
    assert_eq!(range(schema_of::<ThermoV3>("t")), (1, 3));
    assert_eq!(range(schema_of::<ThermoV4>("t")), (2, 4));
}

/// Writes the fixtures of a schema as builds of these versions would have.
fn write(folder: &Path, sections: &[Section]) {
    let folder = folder.join("thermo");
    std::fs::create_dir_all(&folder).unwrap();
    for section in sections {
        let path = folder.join(format!("v{}.cbor", section.version));
        std::fs::write(path, &section.bytes).unwrap();
    }
}

#[test]
fn a_schema_that_changes_without_a_new_version_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let value = ThermoV2 {
        degrees: 1,
        name: None,
    };
    let check =
        |values: &[ThermoV2]| fixtures::check_or_write(folder.path(), values, false).unwrap_err();
    let older = ThermoV2 {
        degrees: 2,
        ..value.clone()
    };
    let both = [older.clone(), value.clone()];
    // A new version without its fixture, or without a value for the version before it.
    write(folder.path(), &[saved(&ThermoV1 { degrees: 2 })]);
    assert!(check(&both).contains("v2.cbor"));
    assert!(check(&both[1..]).contains("versions 1 to 2"));
    // Another field in the same version.
    #[derive(Serialize)]
    struct Changed {
        degrees: u64,
        colour: u64,
    }
    let mut changed = Vec::new();
    let with_colour = Changed {
        degrees: 1,
        colour: 3,
    };
    ciborium::into_writer(&with_colour, &mut changed).unwrap();
    let section = Section {
        bytes: changed.into(),
        ..saved(&value)
    };
    write(folder.path(), &[section]);
    assert!(check(&both).contains("other bytes than before"));
    // An older version that is loaded as something else.
    write(folder.path(), &[saved(&value)]);
    fixtures::check(folder.path(), &both).unwrap();
    write(folder.path(), &[saved(&ThermoV1 { degrees: 7 })]);
    assert!(check(&both).contains("is loaded as"));
}
