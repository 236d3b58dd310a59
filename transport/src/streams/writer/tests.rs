//! Saves that are given up late. Whole archives are saved and loaded in `tests/e2e/streams.rs`.

use std::fs;
use std::path::PathBuf;
use std::sync::mpsc;

use super::super::outlet::SlowDisk;
use super::*;
use crate::units::{MigrationId, RoundId};

/// Far longer than anything here takes; a test that needs it hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// What is in the file before the archive, and not ours.
const BEFORE: &[u8] = b"theirs";

/// The source of a guest whose memory stays in place.
struct Source {
    writer: Arc<ArchiveWriter>,
    control: UnixStream,
    buffer: FrameBuffer,
    path: PathBuf,
}

impl Source {
    /// Saves to a file of this name, as far as the COMMIT.
    fn committed(name: &str, slow_disk: Option<SlowDisk>) -> Self {
        let path = format!("vmferry-writer-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(path);
        fs::write(&path, BEFORE).unwrap();
        let mut outlet = Outlet::file(name, &path, BEFORE.len() as u64).unwrap();
        outlet.slow_disk = slow_disk;
        let writer = ArchiveWriter::new(outlet, "test".to_owned(), &Deadlines::default());
        let control = UnixStream::from(writer.connect_control().unwrap());
        control.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut source = Self {
            writer: Arc::new(writer),
            control,
            buffer: FrameBuffer::default(),
            path,
        };
        source.say(&SourceFrame::Hello(hello()));
        source.say(&SourceFrame::StateEnd(StateEnd {
            sections: 0,
            last_round: RoundId(0),
            guest_runs: true,
            ram_hash: None,
        }));
        source.hear(|frame| matches!(frame, TargetFrame::Ready(_)));
        source.say(&SourceFrame::Commit);
        source
    }

    fn say(&mut self, frame: &SourceFrame) {
        self.control.write_all(&frame.encode()).unwrap();
    }

    /// Waits for such a frame.
    fn hear(&mut self, is_it: impl Fn(&TargetFrame) -> bool) {
        loop {
            while let Some(frame) = self.buffer.poll_frame().unwrap() {
                if is_it(&frame) {
                    return;
                }
            }
            let mut bytes = [0; 4096];
            let count = self.control.read(&mut bytes).unwrap();
            assert!(count > 0, "the writer has hung up");
            self.buffer.push(&bytes[..count]);
        }
    }

    fn is_running(frame: &TargetFrame) -> bool {
        matches!(frame, TargetFrame::Running { .. })
    }

    /// The operator takes the guest back. The end of this is when it goes on.
    fn take_back(&self) -> JoinHandle<()> {
        let _ = self.control.shutdown(Shutdown::Both);
        let writer = Arc::clone(&self.writer);
        thread::spawn(move || writer.give_up())
    }

    fn file(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }

    fn outcome(&self) -> Option<Result<(), String>> {
        self.writer.shared.lock().outcome.clone()
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn hello() -> Hello {
    Hello {
        versions: VersionRange::OURS,
        migration_id: MigrationId([1; 16]),
        data_connections: 0,
        checksum: false,
        verify: false,
        software: String::new(),
        blocks: Vec::new(),
        devices: Vec::new(),
        uuid: None,
        switchover_ack: false,
    }
}

fn slow_disk() -> (SlowDisk, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let ((begun, begins), (goes, go)) = (mpsc::channel(), mpsc::channel());
    (SlowDisk { begun, go }, begins, goes)
}

#[test]
fn an_archive_that_is_given_up_while_the_disk_takes_its_time_is_discarded_before_the_guest_goes_on()
{
    let (disk, begins, goes) = slow_disk();
    let source = Source::committed("slow", Some(disk));
    begins.recv_timeout(PATIENCE).unwrap();
    assert!(source.file().len() > BEFORE.len());
    let taken_back = source.take_back();
    while source.writer.shared.lock().decision != Decision::GivenUp {
        thread::yield_now();
    }
    assert!(
        !taken_back.is_finished(),
        "the archive may still be completed"
    );
    goes.send(()).unwrap();
    taken_back.join().unwrap();
    assert_eq!(source.file(), BEFORE);
    assert!(matches!(source.outcome(), Some(Err(_))));
}

#[test]
fn an_archive_that_is_complete_goes_if_the_guest_is_taken_back_before_the_source_knows() {
    let mut source = Source::committed("unknown", None);
    source.hear(Source::is_running);
    assert!(source.file().len() > BEFORE.len());
    // The link of a source in doubt is closed, and what it does not know may still be so.
    let _ = source.control.shutdown(Shutdown::Both);
    source.writer.leave();
    assert!(source.file().len() > BEFORE.len());
    source.take_back().join().unwrap();
    assert_eq!(source.file(), BEFORE);
    assert!(matches!(source.outcome(), Some(Err(_))));
}

#[test]
fn an_archive_that_the_source_knows_to_be_complete_stays_whatever_is_said() {
    let mut source = Source::committed("known", None);
    source.hear(Source::is_running);
    let archive = source.file();
    source.say(&SourceFrame::Finish);
    source.take_back().join().unwrap();
    assert_eq!(source.file(), archive);
    assert_eq!(source.outcome(), Some(Ok(())));
}
