//! `tests/QEMU_TESTS.md` against QEMU's list of migration tests: every path has a row, and every row of ours names tests that exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::root;

/// All paths below `/migration` of QEMU 11.1, except for COLO's; `/dirty_limit` stands beside them. A group is written out.
const QEMU: &[&str] = &[
    "/precopy/unix/{suspend/live,suspend/notlive,plain,xbzrle,tls/psk}",
    "/precopy/unix/tls/x509/{default-host,override-host}",
    "/precopy/tcp/{plain,plain/switchover-ack,no-tls}",
    "/precopy/tcp/tls/{psk/match,psk/mismatch,no-hostname}",
    "/precopy/tcp/tls/x509/{default-host,override-host,mismatch-host,friendly-client,hostile-client,allow-anon-client,reject-anon-client}",
    "/precopy/fd/tcp",
    "/precopy/rdma/{plain,plain/ipv6}",
    "/{auto_converge,dirty_limit,dirty_ring,vcpu_dirty_limit}",
    "/cancel/src/after/{none,setup,cancelling,cancelled,active,completed,failed,pre-switchover}",
    "/multifd/tcp/{uri/plain/none,channels/plain/none}",
    "/multifd/tcp/plain/{cancel,zero-page/legacy,zero-page/none,zlib,zstd,qatzip,qpl,uadk}",
    "/multifd/tcp/tls/psk/{match,mismatch}",
    "/multifd/tcp/tls/x509/{default-host,override-host,allow-anon-client,mismatch-host,reject-anon-client}",
    "/multifd+postcopy/tcp/plain/{cancel,zstd}",
    "/multifd+postcopy/{plain,preempt/plain,tcp/tls/psk/match,recovery/tls/psk,preempt/recovery/tls/psk}",
    "/postcopy/{plain,suspend,preempt/plain,recovery/plain,preempt/recovery/plain}",
    "/postcopy/recovery/double-failures/{handshake,reconnect}",
    "/postcopy/{tls/psk,recovery/tls/psk,preempt/tls/psk,preempt/recovery/tls/psk}",
    "/precopy/{file,file/offset,file/offset/fdset,file/offset/bad,file/connect-outgoing-fd-leak}",
    "/precopy/file/{mapped-ram,mapped-ram/live}",
    "/multifd/file/mapped-ram",
    "/multifd/file/mapped-ram/{live,dio,fdset,fdset/dio,ignore-shared}",
    "/mode/{reboot,transfer,transfer/defer,exec}",
    "/{analyze-script,bad_dest,ignore-shared}",
    "/{validate_uuid,validate_uuid_error,validate_uuid_src_not_set,validate_uuid_dst_not_set}",
    "/validate_uri/channels/{both_set,none_set}",
    "/validate_caps/mapped_ram_postcopy",
    "/colo/{plain,multifd}/primary_failover",
    "/colo/{plain,multifd}/secondary_failover",
    "/colo/{plain,multifd}/primary_failover_checkpoint",
    "/colo/{plain,multifd}/secondary_failover_checkpoint",
];

/// Paths that must have a test of ours by now: plain pre-copy, cancel, files, validation, a target that is not there, the
/// modes of an upgrade in place.
fn is_of_this_part(path: &str) -> bool {
    let later = [
        "xbzrle",
        "tls",
        "rdma",
        "mapped-ram",
        "zero-page/legacy",
        "zlib",
        "zstd",
        "qatzip",
        "qpl",
        "uadk",
    ];
    let wanted = [
        "/precopy/",
        "/cancel/",
        "/multifd/tcp/",
        "/validate_",
        "/bad_dest",
        "/auto_converge",
        "/mode/",
    ];
    wanted.iter().any(|start| path.starts_with(start))
        && !later.iter().any(|word| path.contains(word))
        || path == "/validate_caps/mapped_ram_postcopy"
}

/// What a pattern with at most one group stands for.
fn written_out(pattern: &str) -> Vec<String> {
    let Some((start, rest)) = pattern.split_once('{') else {
        return vec![pattern.to_owned()];
    };
    let (group, end) = rest.split_once('}').unwrap();
    group
        .split(',')
        .map(|part| format!("{start}{part}{end}"))
        .collect()
}

/// A row of the table: path, what is said of it, tests.
struct Row {
    path: String,
    said: String,
    tests: Vec<String>,
}

fn rows() -> Vec<Row> {
    let table = fs::read_to_string(root().join("tests/QEMU_TESTS.md")).unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| `/"));
    rows.map(|line| {
        let cells: Vec<_> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [path, said] = cells[..] else {
            panic!("not two columns: {line}")
        };
        let quoted = said.split('`').skip(1).step_by(2);
        Row {
            path: path.trim_matches([' ', '`']).to_owned(),
            said: said.to_owned(),
            tests: quoted.map(str::to_owned).collect(),
        }
    })
    .collect()
}

#[test]
fn the_table_has_every_path_of_qemus_list_once() {
    let listed: BTreeSet<String> = QEMU
        .iter()
        .flat_map(|pattern| written_out(pattern))
        .collect();
    let mut seen = BTreeSet::new();
    for row in rows() {
        assert!(listed.contains(&row.path), "QEMU has no {}", row.path);
        assert!(!row.said.is_empty(), "nothing is said of {}", row.path);
        assert!(seen.insert(row.path.clone()), "{} is there twice", row.path);
    }
    let missing: Vec<_> = listed.difference(&seen).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn every_path_that_this_program_is_to_cover_by_now_has_a_test() {
    let without: Vec<_> = rows()
        .into_iter()
        .filter(|row| is_of_this_part(&row.path) && row.tests.is_empty())
        .map(|row| row.path)
        .collect();
    assert!(without.is_empty(), "{without:?}");
}

#[test]
fn every_test_that_the_table_names_exists() {
    let mut sources = String::new();
    read_sources(&root().join("tests"), &mut sources);
    read_sources(&root().join("service/src"), &mut sources);
    for row in rows() {
        for test in row.tests {
            let declared = [format!("fn {test}("), format!("def {test}(")];
            let exists = declared.iter().any(|text| sources.contains(text));
            assert!(exists, "{}: there is no test {test}", row.path);
        }
    }
}

fn read_sources(folder: &Path, into: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let is_source = path
            .extension()
            .is_some_and(|end| end == "rs" || end == "py");
        if path.is_dir() {
            read_sources(&path, into);
        } else if is_source {
            into.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}
