//! Linux guests: the kernel of the lab once more, inside vmferry, with a busybox as its only program. It writes its disk, reads it back
//! and says on its console how it is doing, while it is moved.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::command::{attempt, run};
use crate::harness::{Accel, Launch, Machine, Vm, until};
use crate::modules::{load, load_kvm};
use crate::net::Tap;

/// Blocks of 4 KiB that the guest writes, and of its disk.
const BLOCKS: u64 = 16;
const BLOCK_BYTES: u64 = 4096;

/// The guest's first process. Each block holds its number and the round that wrote it, in a line as long as the block. What is read
/// back comes from the disk: the kernel is made to forget what it knows.
const INIT: &str = r#"#!/bin/sh
mount -t devtmpfs none /dev
mount -t proc none /proc
insmod /virtio_mmio.ko
insmod /virtio_blk.ko
until [ -b /dev/vda ]; do sleep 0.1; done
echo "guest: up"
if grep -q guest.net /proc/cmdline; then
    for module in failover net_failover virtio_net; do insmod /$module.ko; done
    ip addr add 10.97.0.2/24 dev eth0
    ip link set eth0 up
    { line=0; while :; do line=$((line + 1)); echo "line $line"; sleep 0.2; done; } | nc 10.97.0.1 7000 &
fi
round=0
while :; do
    round=$((round + 1))
    block=0
    while [ $block -lt 16 ]; do
        printf '%-4095s\n' "block $block round $round" |
            dd of=/dev/vda bs=4096 seek=$block conv=notrunc,fsync 2>/dev/null || echo "guest: WRONG: block $block was not written"
        block=$((block + 1))
    done
    echo 1 >/proc/sys/vm/drop_caches
    tr -s ' ' </dev/vda >/found
    block=0
    while read -r line && [ $block -lt 16 ]; do
        [ "$line" = "block $block round $round" ] || echo "guest: WRONG: block $block has $line in round $round"
        block=$((block + 1))
    done </found
    [ $block = 16 ] || echo "guest: WRONG: only $block blocks were read"
    echo "guest: round $round"
done
"#;

/// A guest's files.
pub(crate) struct Guest {
    folder: TempDir,
    pub(crate) machine: Machine,
}

impl Guest {
    pub(crate) fn new() -> Self {
        load_kvm();
        let folder = TempDir::with_prefix("vmferry-linux-").unwrap();
        let guest = Self {
            folder,
            machine: Machine {
                mem: "112M",
                ..Machine::small(Accel::Kvm)
            },
        };
        let disk = File::create(guest.path("disk")).unwrap();
        disk.set_len(BLOCKS * BLOCK_BYTES).unwrap();
        fs::write(guest.path("initrd"), initial_disk()).unwrap();
        guest
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Options for a VM whose console goes to the file `console`; more words for the kernel in `words`.
    pub(crate) fn launch(&self, console: &str, words: &str) -> Launch {
        let [initrd, disk, console] = ["initrd", "disk", console].map(|name| self.path(name));
        let cmdline =
            format!("console=ttyS0 quiet nokaslr panic=-1 mitigations=off nowatchdog {words}");
        let words = [
            "--kernel",
            "/boot/vmlinuz",
            "--initrd",
            initrd.to_str().unwrap(),
            "--cmdline",
            &cmdline,
            "--disk",
            disk.to_str().unwrap(),
            "--serial",
            console.to_str().unwrap(),
        ];
        Launch::default().with(&words)
    }

    /// The last round that the guest says it has finished, on that console; 0 if none.
    pub(crate) fn round(&self, console: &str) -> u64 {
        let said = fs::read(self.path(console)).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        assert!(!said.contains("WRONG"), "{said}");
        let mut rounds = said
            .lines()
            .filter_map(|line| line.trim().strip_prefix("guest: round ")?.parse().ok());
        rounds.next_back().unwrap_or(0)
    }

    /// Waits until it says there that it has finished round `round`.
    pub(crate) fn wait_round(&self, vm: &mut Vm, console: &str, round: u64) {
        until(format_args!("round {round} on {console}"), || {
            let state = vm.runstate();
            let goes_on = ["prelaunch", "inmigrate", "running"].contains(&state.as_str());
            assert!(goes_on, "{state}: {}", vm.said());
            (self.round(console) >= round).then_some(())
        });
    }
}

impl Drop for Guest {
    /// For a case that failed: what the guest said.
    fn drop(&mut self) {
        if std::thread::panicking() {
            for console in ["source", "first", "second"] {
                let said = fs::read(self.path(console)).unwrap_or_default();
                println!("console {console}:\n{}", String::from_utf8_lossy(&said));
            }
        }
    }
}

#[test]
fn a_linux_guest_moves_while_it_writes_its_disk() {
    let guest = Guest::new();
    let mut source = guest.machine.start_source(guest.launch("source", ""));
    guest.wait_round(&mut source, "source", 2);
    // There and on, so that what the first target took over is saved again.
    let mut last = 2;
    for console in ["first", "second"] {
        let mut target = guest
            .machine
            .start_target("tcp:127.0.0.1:0", guest.launch(console, ""));
        source.set(json!({ "x-verify": true }));
        let address = target.address();
        source.migrate(&address);
        let info = source.wait_migration();
        assert_moved(&info, &source, &target);
        source.kill();
        last += 3;
        guest.wait_round(&mut target, console, last);
        last = guest.round(console);
        source = target;
    }
    source.execute("stop", json!({}));
    assert_image(&guest.path("disk"));
}

/// A bridge with an address, and a tap on it for each side.
pub(crate) struct Network {
    taps: [Tap; 2],
}

impl Network {
    pub(crate) fn new() -> Self {
        load("bridge");
        load("vhost_net");
        let ip = |words: &str| run("ip", &words.split(' ').collect::<Vec<_>>());
        ip("link add guests type bridge");
        ip("addr add 10.97.0.1/24 dev guests");
        ip("link set guests up");
        let taps = ["169.254.97.1/32", "169.254.97.2/32"].map(Tap::new);
        for tap in &taps {
            ip(&format!("link set {} master guests", tap.name()));
        }
        Self { taps }
    }

    pub(crate) fn launch(&self, side: usize, launch: Launch) -> Launch {
        self.launch_by(side, "vhost=on", launch)
    }

    /// The same, with who moves the packets.
    fn launch_by(&self, side: usize, mover: &str, launch: Launch) -> Launch {
        let name = self.taps[side].name();
        let net = format!("tap={name},{mover},mac=52:54:00:00:97:02,id=net0");
        launch.with(&["--net", &net])
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = attempt("ip", &["link", "del", "guests"]);
    }
}

/// Takes the guest's connection and counts its lines, which come in order and without a gap; ends with the connection.
fn count_lines(listener: &TcpListener, last: &AtomicU64) {
    let (stream, _) = listener.accept().unwrap();
    for line in BufReader::new(stream).lines() {
        // The guest ends with the test, and the connection with it.
        let Ok(line) = line else { return };
        let expected = last.load(Ordering::SeqCst) + 1;
        assert_eq!(line, format!("line {expected}"));
        last.store(expected, Ordering::SeqCst);
    }
}

#[test]
fn a_tcp_connection_of_a_linux_guest_survives_its_move_from_vhost_net_to_the_vmm_and_back() {
    let guest = Guest::new();
    let network = Network::new();
    let listener = TcpListener::bind("10.97.0.1:7000").unwrap();
    let last = Arc::new(AtomicU64::new(0));
    let counting = Arc::clone(&last);
    let counter = std::thread::spawn(move || count_lines(&listener, &counting));
    let lines_from_now = |vm: &mut Vm, more: u64| {
        let wanted = last.load(Ordering::SeqCst) + more;
        until(format_args!("line {wanted} arrives"), || {
            assert!(!counter.is_finished(), "the connection has ended");
            assert_ne!(vm.runstate(), "shutdown", "{}", vm.said());
            (last.load(Ordering::SeqCst) >= wanted).then_some(())
        });
    };
    let launch =
        |side, mover, console| network.launch_by(side, mover, guest.launch(console, "guest.net"));
    let mut source = guest.machine.start_source(launch(0, "vhost=on", "source"));
    lines_from_now(&mut source, 5);
    for (side, mover, console) in [(1, "vhost=off", "first"), (0, "vhost=on", "second")] {
        let mut target = guest
            .machine
            .start_target("tcp:127.0.0.1:0", launch(side, mover, console));
        let address = target.address();
        source.migrate(&address);
        let info = source.wait_migration();
        assert_moved(&info, &source, &target);
        source.kill();
        lines_from_now(&mut target, 20);
        source = target;
    }
}

fn assert_moved(info: &Value, source: &Vm, target: &Vm) {
    let said = || {
        format!(
            "{info}\nsource: {}\ntarget: {}",
            source.said(),
            target.said()
        )
    };
    assert_eq!(info["status"], "completed", "{}", said());
    let verification = &info["x-verification"];
    assert_eq!(
        verification["ram-hash-source"],
        verification["ram-hash-target"],
        "{}",
        said()
    );
}

/// The image holds two rounds at most: that which the guest was stopped in, and the one before.
fn assert_image(path: &Path) {
    let image = File::open(path).unwrap();
    let mut rounds = Vec::new();
    for block in 0..BLOCKS {
        let mut bytes = vec![0; usize::try_from(BLOCK_BYTES).unwrap()];
        image
            .read_exact_at(&mut bytes, block * BLOCK_BYTES)
            .unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let round = text
            .trim_end()
            .strip_prefix(&format!("block {block} round "))
            .and_then(|round| round.parse::<u64>().ok());
        rounds.push(round.unwrap_or_else(|| panic!("block {block} holds {text:?}")));
    }
    assert!(rounds.is_sorted_by(|one, next| one >= next), "{rounds:?}");
    assert!(rounds[0] - rounds[rounds.len() - 1] <= 1, "{rounds:?}");
}

/// The guest's initial RAM disk: an archive as kernels read it.
fn initial_disk() -> Vec<u8> {
    let mut archive = Vec::new();
    for folder in ["bin", "dev", "proc"] {
        put(&mut archive, folder, 0o040_755, &[]);
    }
    put(&mut archive, "init", 0o100_755, INIT.as_bytes());
    let busybox = fs::read("/bin/busybox").unwrap();
    put(&mut archive, "bin/busybox", 0o100_755, &busybox);
    for program in [
        "sh", "mount", "insmod", "sleep", "dd", "tr", "grep", "ip", "nc",
    ] {
        put(
            &mut archive,
            &format!("bin/{program}"),
            0o120_777,
            b"busybox",
        );
    }
    for module in [
        "virtio_mmio",
        "virtio_blk",
        "failover",
        "net_failover",
        "virtio_net",
    ] {
        let file = module_file(Path::new("/lib/modules"), module);
        let file = file.unwrap_or_else(|| panic!("no module {module} is here"));
        put(
            &mut archive,
            &format!("{module}.ko"),
            0o100_644,
            &fs::read(file).unwrap(),
        );
    }
    put(&mut archive, "TRAILER!!!", 0, &[]);
    archive
}

/// Where the file of a module is, somewhere in `folder`.
fn module_file(folder: &Path, name: &str) -> Option<PathBuf> {
    fs::read_dir(folder).unwrap().flatten().find_map(|entry| {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            return module_file(&path, name);
        }
        let file = entry.file_name().into_string().unwrap().replace('-', "_");
        (file == format!("{name}.ko")).then_some(path)
    })
}

/// Adds an entry in the format "newc".
fn put(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let pad = |archive: &mut Vec<u8>| archive.resize(archive.len().next_multiple_of(4), 0);
    write!(archive, "070701{:08x}{mode:08x}", archive.len()).unwrap();
    // Owner, group, links, time, size, devices, length of the name, checksum.
    for field in [0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0] {
        write!(archive, "{field:08x}").unwrap();
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(content);
    pad(archive);
}
