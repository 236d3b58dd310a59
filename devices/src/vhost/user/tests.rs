//! What no back end of a distribution does yet: to keep a region of requests under way, to move state of its own, and not to answer.
//! The other side is crate vhost's; what it does with the rings is of no interest here.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use tempfile::TempDir;
use vhost::vhost_user::message::*;
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};
use vm_memory::{Bytes, FileOffset, GuestAddress, MmapRegion};
use vmferry_transport::units::PAGE_SIZE;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::session::is_lost;
use super::*;
use crate::vhost::{Logs, Region};

const RING: Ring = Ring {
    size: 64,
    desc: 0x1000,
    avail: 0x2000,
    used: 0x3000,
    base: 0,
};
const VERSION_1: u64 = 1 << 32;
const REGION_BYTES: u64 = 4096;

/// What a back end has been told.
#[derive(Default)]
struct Peer {
    regions_made: u32,
    region: Option<File>,
    bases: Vec<u32>,
    features: Vec<u64>,
    log_bases: u32,
    /// What features it had when it was let begin.
    began_with: Vec<u64>,
    /// Its own state, to give or as it was given.
    state: Vec<u8>,
    refuses: bool,
    refuses_memory: bool,
    keeps_no_region: bool,
    transfer: Option<JoinHandle<Vec<u8>>>,
}

impl VhostUserBackendReqHandlerMut for Peer {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | F_LOG_ALL)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        self.features.push(features);
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        _: &[VhostUserMemoryRegion],
        _: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        if self.refuses_memory {
            return Err(Error::InvalidParam);
        }
        Ok(None)
    }

    fn set_vring_num(&mut self, _: u32, _: u32) -> Result<()> {
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        _: u32,
        _: VhostUserVringAddrFlags,
        _: u64,
        _: u64,
        _: u64,
        _: u64,
    ) -> Result<()> {
        Ok(())
    }

    fn set_vring_base(&mut self, _: u32, base: u32) -> Result<()> {
        self.bases.push(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        Ok(VhostUserVringState::new(index, 11))
    }

    fn set_vring_kick(&mut self, _: u8, _: Option<File>) -> Result<()> {
        self.began_with.extend(self.features.last());
        Ok(())
    }

    fn set_vring_call(&mut self, _: u8, _: Option<File>) -> Result<()> {
        Ok(())
    }

    fn set_vring_err(&mut self, _: u8, _: Option<File>) -> Result<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::all();
        features.set(
            VhostUserProtocolFeatures::INFLIGHT_SHMFD,
            !self.keeps_no_region,
        );
        Ok(features)
    }

    fn set_protocol_features(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(1)
    }

    fn set_vring_enable(&mut self, _: u32, _: bool) -> Result<()> {
        Ok(())
    }

    fn get_config(&mut self, _: u32, bytes: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(vec![5; bytes as usize])
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Ok(())
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidParam)
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        assert_eq!((wanted.num_queues, wanted.queue_size), (1, RING.size));
        let file = File::from(memfd_create("region", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(REGION_BYTES).unwrap();
        self.regions_made += 1;
        let region = VhostUserInflight::new(REGION_BYTES, 0, 1, RING.size);
        Ok((region, file))
    }

    fn set_inflight_fd(&mut self, region: &VhostUserInflight, file: File) -> Result<()> {
        assert_eq!({ region.mmap_size }, REGION_BYTES);
        self.region = Some(file);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(8)
    }

    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<u64>> {
        Err(Error::InvalidParam)
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        mut file: File,
    ) -> Result<Option<File>> {
        let mut state = std::mem::take(&mut self.state);
        self.transfer = Some(std::thread::spawn(move || {
            if direction == VhostTransferStateDirection::SAVE {
                file.write_all(&state).unwrap();
            } else {
                state.clear();
                file.read_to_end(&mut state).unwrap();
            }
            state
        }));
        Ok(None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        self.state = self.transfer.take().unwrap().join().unwrap();
        if self.refuses {
            return Err(Error::InvalidParam);
        }
        Ok(())
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidParam)
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        self.log_bases += 1;
        Ok(())
    }
}

/// A back end that listens, and what it was told. Each connection is served by the next incarnation of it.
struct Server {
    folder: TempDir,
    peer: Arc<std::sync::Mutex<Peer>>,
    connection: Arc<std::sync::Mutex<Option<UnixStream>>>,
}

impl Server {
    fn start(peer: Peer) -> Self {
        let server = Self {
            folder: TempDir::new().unwrap(),
            peer: Arc::new(std::sync::Mutex::new(peer)),
            connection: Arc::default(),
        };
        let listener = UnixListener::bind(server.path()).unwrap();
        let (peer, current) = (server.peer.clone(), server.connection.clone());
        // Ends with the process: nothing waits for it.
        std::thread::spawn(move || {
            while let Ok((connection, _)) = listener.accept() {
                *current.lock().unwrap() = Some(connection.try_clone().unwrap());
                let mut handler = BackendReqHandler::from_stream(connection, peer.clone());
                while handler.handle_request().is_ok() {}
            }
        });
        server
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// The connection ends as if the back end had died.
    fn die(&self) {
        let connection = self.connection.lock().unwrap().take().unwrap();
        connection.shutdown(std::net::Shutdown::Both).unwrap();
    }
}

fn memory() -> VhostMemory {
    let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(8 * PAGE_SIZE).unwrap();
    let mapping = MmapRegion::from_file(FileOffset::new(file, 0), 8 * 4096).unwrap();
    VhostMemory::new(vec![Arc::new(
        Region::new(mapping, GuestAddress(0)).unwrap(),
    )])
    .unwrap()
}

/// Sets the index of the ring at `ring`.
fn set_index(memory: &VhostMemory, ring: u64, index: u16) {
    memory
        .memory()
        .write_obj(index, GuestAddress(ring + 2))
        .unwrap();
}

fn device(server: &Server, memory: &VhostMemory) -> UserDevice {
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let queues = vec![Queue::new(event(), event())];
    let path = server.path();
    let device = UserDevice::connect("fs/0", &path, memory.clone(), queues, Requests::Waiting);
    let mut device = device.unwrap();
    device.set_features(VERSION_1).unwrap();
    device.set_rings(&[Some(RING)]).unwrap();
    device
}

#[test]
fn the_region_of_requests_under_way_outlives_its_back_end_and_goes_to_the_next() {
    let server = Server::start(Peer::default());
    let memory = memory();
    let mut device = device(&server, &memory);
    assert!(device.keeps_inflight());
    device.start().unwrap();
    // This one answers in another way than QEMU's.
    device.start_log(&LogPages::new(&memory).unwrap()).unwrap();
    {
        let peer = server.peer.lock().unwrap();
        // It has taken three requests and answered one.
        peer.region
            .as_ref()
            .unwrap()
            .write_all_at(b"two", 0)
            .unwrap();
    }
    set_index(&memory, RING.avail, 3);
    set_index(&memory, RING.used, 1);
    server.die();
    server.peer.lock().unwrap().region = None;
    device.reconnect(Lost::Refuse).unwrap();
    let peer = server.peer.lock().unwrap();
    assert_eq!(peer.regions_made, 1);
    assert_eq!(peer.bases, [0, 1], "it goes on from what was answered");
    let mut noted = [0; 3];
    peer.region
        .as_ref()
        .unwrap()
        .read_exact_at(&mut noted, 0)
        .unwrap();
    assert_eq!(&noted, b"two");
}

#[test]
fn state_of_a_back_end_moves_with_the_device() {
    let state: Vec<u8> = (0..300_000_u32).map(|byte| byte as u8).collect();
    let source = Server::start(Peer {
        state: state.clone(),
        ..Peer::default()
    });
    let memory = memory();
    let mut from = device(&source, &memory);
    assert!(from.has_own_state());
    assert_eq!(from.config(0, 4).unwrap(), [5; 4]);
    from.start().unwrap();
    assert!(from.save().is_err(), "it still works");
    from.stop().unwrap();
    let section = from.save().unwrap();

    let target = Server::start(Peer::default());
    let mut to = device(&target, &memory);
    to.restore(&section).unwrap();
    assert_eq!(target.peer.lock().unwrap().state, state);
    set_index(&memory, RING.avail, 11);
    to.start().unwrap();
    assert_eq!(target.peer.lock().unwrap().bases, [11]);
}

#[test]
fn a_back_end_that_refuses_state_fails_the_load_and_one_that_cannot_give_it_the_save() {
    let server = Server::start(Peer {
        refuses: true,
        state: vec![1],
        ..Peer::default()
    });
    let memory = memory();
    let mut device = device(&server, &memory);
    let error = device.save().unwrap_err().to_string();
    assert!(
        error.contains("fs/0") && error.contains("saving"),
        "{error}"
    );
    server.peer.lock().unwrap().refuses = false;
    let section = device.save().unwrap();
    server.peer.lock().unwrap().refuses = true;
    let error = device.restore(&section).unwrap_err().to_string();
    assert!(
        error.contains("fs/0") && error.contains("loading"),
        "{error}"
    );
}

#[test]
fn a_back_end_that_does_not_answer_is_given_up() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("socket");
    let _listener = UnixListener::bind(&path).unwrap();
    session::PATIENCE.set(Duration::from_millis(300));
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let queues = vec![Queue::new(event(), event())];
    let error = UserDevice::connect("fs/0", &path, memory(), queues, Requests::Waiting);
    let Err(DeviceError::Kernel { source, .. }) = error else {
        panic!("{error:?}");
    };
    assert!(is_lost(&source), "{source:?}");
}

/// Whether it was told to mark what it writes, when it was let begin for the last time.
fn logs(server: &Server) -> bool {
    server.peer.lock().unwrap().began_with.last().unwrap() & F_LOG_ALL != 0
}

#[test]
fn a_log_that_begins_or_ends_between_the_two_steps_of_a_start_is_told_before_anything_is_written() {
    let server = Server::start(Peer::default());
    let memory = memory();
    let mut device = device(&server, &memory);
    let pages = LogPages::new(&memory).unwrap();

    device.prepare().unwrap();
    device.start_log(&pages).unwrap();
    device.go().unwrap();
    assert!(logs(&server), "its first write is marked");
    assert_eq!(server.peer.lock().unwrap().log_bases, 1);
    device.stop().unwrap();

    set_index(&memory, RING.avail, 11);
    device.prepare().unwrap();
    device.stop_log().unwrap();
    device.go().unwrap();
    assert!(!logs(&server), "nobody has that bitmap any more");
    assert_eq!(Arc::strong_count(&pages), 1);
    device.stop().unwrap();

    // Before both of them, and with none.
    device.start_log(&pages).unwrap();
    device.start().unwrap();
    assert!(logs(&server));
    device.stop().unwrap();
    device.stop_log().unwrap();
    device.start().unwrap();
    assert!(!logs(&server));
}

#[test]
fn a_log_that_begins_when_a_prepared_back_end_has_died_is_refused_and_the_next_one_goes_without() {
    let server = Server::start(Peer::default());
    let memory = memory();
    let mut device = device(&server, &memory);
    let pages = LogPages::new(&memory).unwrap();
    device.prepare().unwrap();
    server.die();
    assert!(device.start_log(&pages).is_err());
    assert_eq!(Arc::strong_count(&pages), 1);
    device.reconnect(Lost::Refuse).unwrap();
    device.go().unwrap();
    assert!(!logs(&server));
    device.start_log(&pages).unwrap();
    let peer = server.peer.lock().unwrap();
    assert_ne!(peer.features.last().unwrap() & F_LOG_ALL, 0);
}

/// Whose requests are in doubt when it dies.
fn without_region() -> Server {
    Server::start(Peer {
        keeps_no_region: true,
        ..Peer::default()
    })
}

fn is_stuck(answer: std::result::Result<(), DeviceError>) -> bool {
    matches!(answer, Err(DeviceError::Stuck { .. }))
}

#[test]
fn requests_are_not_in_doubt_when_a_back_end_dies_before_it_was_let_begin() {
    let server = without_region();
    let memory = memory();
    // It dies when it is prepared, and once more before it is prepared anew.
    for deaths in 1..3 {
        let mut device = device(&server, &memory);
        set_index(&memory, RING.avail, 0);
        device.prepare().unwrap();
        server.die();
        for _ in 1..deaths {
            device.reconnect(Lost::Refuse).unwrap();
            server.die();
        }
        // The guest runs.
        set_index(&memory, RING.avail, 3);
        let begun = server.peer.lock().unwrap().began_with.len();
        assert!(device.go().is_err());
        assert_eq!(server.peer.lock().unwrap().began_with.len(), begun);
        device.reconnect(Lost::Refuse).unwrap();
        {
            let peer = server.peer.lock().unwrap();
            assert_eq!(peer.began_with.len(), begun + 1);
            assert_eq!(peer.bases.last(), Some(&0));
        }
        server.die();
        assert!(is_stuck(device.reconnect(Lost::Refuse)), "now they are");
    }
}

#[test]
fn requests_are_not_in_doubt_that_were_made_after_the_last_one_that_began_had_died() {
    let server = without_region();
    let memory = memory();
    let mut device = device(&server, &memory);
    device.start().unwrap();
    set_index(&memory, RING.avail, 2);
    set_index(&memory, RING.used, 2);
    server.die();
    server.peer.lock().unwrap().refuses_memory = true;
    assert!(device.reconnect(Lost::Refuse).is_err());
    set_index(&memory, RING.avail, 3);
    assert!(!is_stuck(device.reconnect(Lost::Refuse)));
    server.peer.lock().unwrap().refuses_memory = false;
    device.reconnect(Lost::Refuse).unwrap();
    assert_eq!(server.peer.lock().unwrap().bases.last(), Some(&2));
}
