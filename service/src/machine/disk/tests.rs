//! Disks on real files, against other processes that want them too.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::thread;

use tempfile::TempDir;

use super::*;

const BYTES: u64 = 64 << 10;

/// A folder with images.
struct Images(TempDir);

impl Images {
    fn new(names: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        for name in names {
            let file = File::create(folder.path().join(name)).unwrap();
            file.set_len(BYTES).unwrap();
        }
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn config(&self, name: &str) -> DiskConfig {
        DiskConfig {
            path: self.path(name),
            id: format!("id-{name}"),
            read_only: false,
        }
    }

    fn read_only(&self, name: &str) -> DiskConfig {
        DiskConfig {
            read_only: true,
            ..self.config(name)
        }
    }
}

/// Another process that holds an exclusive lock of an image. It has asked for it in the way that any program would.
struct Rival {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Rival {
    fn holding(path: &Path) -> Self {
        let script = "import fcntl, struct, sys\n\
            f = open(sys.argv[1], 'r+b')\n\
            fcntl.fcntl(f, 37, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 0, 0))\n\
            print('locked', flush=True)\n\
            sys.stdin.read()\n";
        let mut rival = Self::python(script, path);
        assert_eq!(rival.line(), "locked");
        rival
    }

    fn python(script: &str, path: &Path) -> Self {
        let mut child = Command::new("python3")
            .args(["-c", script])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            input: child.stdin.take(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Lets it end, and gives what it still says.
    fn end(mut self) -> String {
        drop(self.input.take());
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        assert!(self.child.wait().unwrap().success());
        rest
    }
}

impl Drop for Rival {
    fn drop(&mut self) {
        // It has ended already, unless a test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn only_an_active_disk_is_read_and_written() {
    let images = Images::new(&["a"]);
    let disk = Disk::open(images.config("a")).unwrap();
    let inactive = |result: Result<(), DiskError>| {
        assert!(matches!(result, Err(DiskError::Inactive { .. })));
    };
    inactive(disk.read_at(&mut [0; 4], 0));
    inactive(disk.write_at(&[1; 4], 0));
    inactive(disk.flush());
    assert!(!disk.info().active);

    assert!(disk.activate().unwrap());
    assert!(!disk.activate().unwrap(), "it was active already");
    disk.write_at(b"ferry", BYTES - 5).unwrap();
    disk.flush().unwrap();
    let mut read = [0; 5];
    disk.read_at(&mut read, BYTES - 5).unwrap();
    assert_eq!(&read, b"ferry");
    assert!(disk.info().active);
    assert_eq!(disk.info().size_bytes, BYTES);

    assert!(disk.inactivate().unwrap());
    assert!(!disk.inactivate().unwrap(), "it was inactive already");
    inactive(disk.write_at(&[1; 4], 0));
    let content = std::fs::read(images.path("a")).unwrap();
    assert_eq!(&content[content.len() - 5..], b"ferry");
}

#[test]
fn requests_beyond_the_end_are_refused_whole() {
    let images = Images::new(&["a"]);
    let disk = Disk::open(images.config("a")).unwrap();
    disk.activate().unwrap();
    for (bytes, offset) in [(2, BYTES - 1), (1, BYTES), (1, u64::MAX), (0, BYTES + 1)] {
        let buffer = vec![7; bytes];
        let error = disk.write_at(&buffer, offset).unwrap_err();
        assert!(matches!(error, DiskError::Beyond { .. }), "{error}");
        let error = disk.read_at(&mut vec![0; bytes], offset).unwrap_err();
        assert!(matches!(error, DiskError::Beyond { .. }), "{error}");
    }
    disk.read_at(&mut [], BYTES).unwrap();
    assert_eq!(std::fs::metadata(images.path("a")).unwrap().len(), BYTES);
}

#[test]
fn a_disk_that_another_process_has_locked_stays_inactive_and_names_it() {
    let images = Images::new(&["a"]);
    let rival = Rival::holding(&images.path("a"));
    let disk = Disk::open(images.config("a")).unwrap();
    let error = disk.activate().unwrap_err();
    assert!(!disk.is_active());
    let text = error.to_string();
    assert!(
        text.contains("disk id-a") && text.contains("another process holds the lock"),
        "{text}"
    );
    assert!(text.contains(images.path("a").to_str().unwrap()), "{text}");
    assert!(
        text.contains(&format!("process {}", rival.child.id())),
        "{text}"
    );
    rival.end();
    assert!(disk.activate().unwrap(), "the lock is free now");
}

#[test]
fn the_lock_follows_the_file_and_not_its_name() {
    let images = Images::new(&["a"]);
    std::fs::hard_link(images.path("a"), images.path("hard")).unwrap();
    std::os::unix::fs::symlink(images.path("a"), images.path("soft")).unwrap();
    let first = Disk::open(images.config("a")).unwrap();
    first.activate().unwrap();
    for name in ["hard", "soft"] {
        let second = Disk::open(images.config(name)).unwrap();
        let error = second.activate().unwrap_err();
        assert!(matches!(error, DiskError::Locked { .. }), "{name}: {error}");
    }
    first.inactivate().unwrap();
    let second = Disk::open(images.config("hard")).unwrap();
    second.activate().unwrap();
    assert!(first.activate().is_err());
}

#[test]
fn readers_share_an_image_and_keep_writers_out() {
    let images = Images::new(&["a"]);
    let readers = [0, 1].map(|_| Disk::open(images.read_only("a")).unwrap());
    for reader in &readers {
        reader.activate().unwrap();
        reader.read_at(&mut [0; 16], 0).unwrap();
        let error = reader.write_at(&[1], 0).unwrap_err();
        assert!(matches!(error, DiskError::ReadOnly { .. }), "{error}");
        reader.flush().unwrap();
    }
    let writer = Disk::open(images.config("a")).unwrap();
    assert!(matches!(writer.activate(), Err(DiskError::Locked { .. })));
    readers[0].inactivate().unwrap();
    assert!(matches!(writer.activate(), Err(DiskError::Locked { .. })));
    readers[1].inactivate().unwrap();
    writer.activate().unwrap();
    assert!(matches!(
        readers[0].activate(),
        Err(DiskError::Locked { .. })
    ));
}

#[test]
fn a_file_that_was_replaced_or_resized_is_refused_until_it_is_back() {
    let images = Images::new(&["a", "b"]);
    let disk = Disk::open(images.config("a")).unwrap();
    std::fs::rename(images.path("a"), images.path("kept")).unwrap();
    let error = disk.activate().unwrap_err();
    assert!(error.to_string().contains("opening"), "{error}");
    std::fs::rename(images.path("b"), images.path("a")).unwrap();
    let error = disk.activate().unwrap_err();
    assert!(error.to_string().contains("replaced"), "{error}");
    std::fs::rename(images.path("kept"), images.path("a")).unwrap();

    let file = OpenOptions::new()
        .write(true)
        .open(images.path("a"))
        .unwrap();
    file.set_len(BYTES - 512).unwrap();
    let error = disk.activate().unwrap_err();
    assert!(error.to_string().contains("65536 to 65024"), "{error}");
    file.set_len(BYTES).unwrap();
    disk.activate().unwrap();
}

#[test]
fn what_is_no_image_is_refused_at_once() {
    let images = Images::new(&["a"]);
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        images.path("pipe"),
        rustix::fs::Mode::from_raw_mode(0o600),
    )
    .unwrap();
    std::fs::create_dir(images.path("folder")).unwrap();
    for (name, part) in [
        ("missing", "opening"),
        ("pipe", "regular file"),
        ("folder", "regular file"),
    ] {
        let error = Disk::open(images.read_only(name)).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains(name), "{error}");
    }
    let nameless = DiskConfig {
        id: String::new(),
        ..images.config("a")
    };
    assert!(Disk::open(nameless).is_err());
}

#[test]
fn inactivating_waits_for_running_requests_and_refuses_new_ones() {
    let images = Images::new(&["a"]);
    let disk = Disk::open(images.config("a")).unwrap();
    disk.activate().unwrap();
    let request = disk.begin().unwrap();
    let (done, is_done) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| done.send(disk.inactivate()).unwrap());
        while disk.is_active() {
            thread::yield_now();
        }
        assert!(matches!(
            disk.write_at(&[1], 0),
            Err(DiskError::Inactive { .. })
        ));
        assert!(is_done.try_recv().is_err(), "a request is still running");
        let rival = Disk::open(images.config("a")).unwrap();
        assert!(
            matches!(rival.activate(), Err(DiskError::Locked { .. })),
            "the lock was given back under a running request"
        );
        drop(request);
        assert!(is_done.recv().unwrap().unwrap());
        rival.activate().unwrap();
    });
}

#[test]
fn a_disk_that_lost_writes_never_again_says_that_they_are_stored() {
    let images = Images::new(&["a"]);
    let disk = Disk::open(images.config("a")).unwrap();
    disk.activate().unwrap();
    // What a failing fdatasync leaves behind; no file system here fails on demand.
    disk.state().lost_writes = true;
    for result in [
        disk.flush(),
        disk.inactivate().map(|_| ()),
        disk.pass_on().map(|_| ()),
    ] {
        assert!(matches!(result, Err(DiskError::LostWrites { .. })));
    }
    assert!(disk.is_active(), "the lock must not be given away");
}

#[test]
fn what_was_written_is_there_for_the_next_program_without_having_been_stored() {
    let images = Images::new(&["a"]);
    let disk = Disk::open(images.config("a")).unwrap();
    disk.activate().unwrap();
    disk.write_at(b"just written", 512).unwrap();
    assert!(disk.pass_on().unwrap());
    assert!(!disk.pass_on().unwrap(), "it is inactive already");
    assert!(matches!(disk.flush(), Err(DiskError::Inactive { .. })));
    let next = Disk::open(images.config("a")).unwrap();
    next.activate().unwrap();
    let mut found = [0; 12];
    next.read_at(&mut found, 512).unwrap();
    assert_eq!(&found, b"just written");
    next.flush().unwrap();
}

#[test]
fn a_child_process_does_not_keep_the_lock() {
    let images = Images::new(&["a"]);
    let disk = Disk::open(images.config("a")).unwrap();
    disk.activate().unwrap();
    // Started while the disk is active. It inherits nothing, and even a copy of the description must not matter.
    let copy = {
        let state = disk.state();
        state.file.as_ref().unwrap().try_clone().unwrap()
    };
    let child = Rival::python("import sys; sys.stdin.read()", &images.path("a"));
    disk.inactivate().unwrap();
    let other = Disk::open(images.config("a")).unwrap();
    other.activate().unwrap();
    let second_copy = {
        let state = other.state();
        state.file.as_ref().unwrap().try_clone().unwrap()
    };
    // Neither by inactivating nor by dropping.
    drop(other);
    disk.activate().unwrap();
    child.end();
    drop((copy, second_copy));
}

#[test]
fn all_disks_become_active_or_none_does() {
    let images = Images::new(&["a", "b", "c"]);
    let names = ["a", "b", "c"];
    let disks = Disks::open(&names.map(|name| images.config(name))).unwrap();
    assert!(!disks.are_active());
    let rival = Rival::holding(&images.path("c"));
    let error = disks.activate().unwrap_err();
    assert!(error.to_string().contains("id-c"), "{error}");
    assert!(disks.infos().iter().all(|info| !info.active));
    // Others may have the first two at once.
    Disk::open(images.config("a")).unwrap().activate().unwrap();

    // One that was active before is not taken away by the failure of another.
    let first = disks.get("id-a").unwrap();
    first.activate().unwrap();
    disks.activate().unwrap_err();
    let active: Vec<_> = disks.infos().iter().map(|info| info.active).collect();
    assert_eq!(active, [true, false, false]);

    rival.end();
    disks.activate().unwrap();
    assert!(disks.are_active());
    disks.inactivate().unwrap();
    assert!(disks.infos().iter().all(|info| !info.active));
    assert!(Disks::open(&[]).unwrap().are_active());
}

#[test]
fn one_image_is_not_two_disks() {
    let images = Images::new(&["a"]);
    std::os::unix::fs::symlink(images.path("a"), images.path("b")).unwrap();
    let error = Disks::open(&[images.config("a"), images.config("b")]).unwrap_err();
    assert!(error.to_string().contains("image of disk id-a"), "{error}");
    let error = Disks::open(&[images.config("a"), images.config("a")]).unwrap_err();
    assert!(error.to_string().contains("two disks"), "{error}");
    Disks::open(&[images.read_only("a"), images.read_only("b")]).unwrap();
}

#[test]
fn two_processes_are_never_both_the_owner() {
    let images = Images::new(&["a"]);
    let path = images.path("a");
    // Whoever has the lock writes its mark, waits a little, and must find it again.
    let script = "import fcntl, os, struct, sys\n\
        f = os.open(sys.argv[1], os.O_RDWR)\n\
        held = 0\n\
        print('begin', flush=True)\n\
        while held < 300:\n\
        \x20   try:\n\
        \x20       fcntl.fcntl(f, 37, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 0, 0))\n\
        \x20   except OSError:\n\
        \x20       os.sched_yield()\n\
        \x20       continue\n\
        \x20   os.pwrite(f, b'rival', 0)\n\
        \x20   os.sched_yield()\n\
        \x20   assert os.pread(f, 5, 0) == b'rival', 'both were the owner'\n\
        \x20   held += 1\n\
        \x20   fcntl.fcntl(f, 37, struct.pack('hhqqi4x', fcntl.F_UNLCK, 0, 0, 0, 0))\n\
        \x20   os.sched_yield()\n\
        print('held', flush=True)\n\
        sys.stdin.read()\n";
    let mut rival = Rival::python(script, &path);
    assert_eq!(rival.line(), "begin");
    let disk = Disk::open(images.config("a")).unwrap();
    let mut held = 0;
    while held < 300 {
        match disk.activate() {
            Ok(_) => {}
            Err(DiskError::Locked { .. }) => {
                thread::yield_now();
                continue;
            }
            Err(error) => panic!("{error}"),
        }
        disk.write_at(b"ferry", 0).unwrap();
        thread::yield_now();
        let mut mark = [0; 5];
        disk.read_at(&mut mark, 0).unwrap();
        assert_eq!(&mark, b"ferry", "both were the owner");
        disk.inactivate().unwrap();
        held += 1;
    }
    assert_eq!(rival.line(), "held");
    rival.end();
}
