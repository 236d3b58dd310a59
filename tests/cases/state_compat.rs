//! Every schema of saved state has committed bytes for each version that is loaded. What they mean is checked beside the types
//! (`vmferry_devices::saved::fixtures`); here, that no schema and no file was forgotten.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use vmferry_devices::saved::oldest;

use crate::root;

/// Name and version of every schema in the sources of the crates, those of tests left out.
fn schemas() -> BTreeMap<String, u32> {
    let mut schemas = BTreeMap::new();
    for folder in ["devices/src", "service/src"] {
        collect(&root().join(folder), &mut schemas);
    }
    schemas
}

fn collect(folder: &Path, schemas: &mut BTreeMap<String, u32>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, schemas);
        } else if path.extension().is_some_and(|ext| ext == "rs") && !path.ends_with("tests.rs") {
            let text = fs::read_to_string(&path).unwrap();
            let mut lines = text.lines().map(str::trim);
            while let Some(line) = lines.next() {
                let Some(schema) = line.strip_prefix("const SCHEMA: &'static str = \"") else {
                    continue;
                };
                let schema = schema.trim_end_matches("\";");
                let version = lines.next().unwrap();
                let version = version.strip_prefix("const VERSION: u32 = ");
                let version = version.expect("VERSION follows SCHEMA");
                let version = version.trim_end_matches(';').parse().unwrap();
                schemas.insert(schema.to_owned(), version);
            }
        }
    }
}

#[test]
fn every_schema_has_a_fixture_for_each_version_that_is_loaded() {
    let schemas = schemas();
    assert!(schemas.len() >= 10, "{schemas:?}");
    let folder = root().join("tests/fixtures/state");
    for (schema, version) in &schemas {
        for version in oldest(*version)..=*version {
            let file = folder.join(schema).join(format!("v{version}.cbor"));
            assert!(file.exists(), "{} is missing", file.display());
        }
    }
    for entry in fs::read_dir(&folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let version = schemas.get(&name);
        let version = version.unwrap_or_else(|| panic!("{name} is no schema any more"));
        for file in fs::read_dir(folder.join(&name)).unwrap() {
            let file = file.unwrap().file_name().into_string().unwrap();
            let known = (1..=*version).any(|version| file == format!("v{version}.cbor"));
            assert!(known, "{name}/{file}: no version of {name} has it");
        }
    }
}
