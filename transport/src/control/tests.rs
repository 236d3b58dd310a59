//! Streams and listeners on both runtimes.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::rc::Rc;
use std::time::Duration;

use tokio::time::timeout;

use super::runtime::{self, RuntimeKind};
use super::{Address, ConnectError, ListenError, Listener, Stream};

/// Far longer than anything here takes; a test that needs it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `test` once on each runtime and fails if it does not end.
fn on_both<F: Future<Output = ()>>(test: impl Fn() -> F) {
    for kind in [RuntimeKind::Uring, RuntimeKind::Plain] {
        runtime::run_on(kind, async {
            timeout(PATIENCE, test()).await.expect("the test hangs");
        })
        .unwrap();
    }
}

fn pair() -> (Stream, StdUnixStream) {
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    (
        Stream::from_socket(OwnedFd::from(ours), "test").unwrap(),
        theirs,
    )
}

/// A directory of its own for one test, removed at the end.
struct Dir(std::path::PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("vmferry-control-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn address(&self) -> Address {
        Address::unix(self.0.join("socket")).unwrap()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

async fn send_and_receive_over(address: Address) {
    let listener = Listener::bind(&address).await.unwrap();
    let local = listener.local_address().clone();
    let (ours, theirs) = tokio::join!(Stream::connect(&local), listener.accept());
    let (ours, theirs) = (ours.unwrap(), theirs.unwrap());

    let message = vec![7; 3 << 20];
    let writer = runtime::spawn(async move {
        let (result, buf) = ours.write_all(message).await;
        result.unwrap();
        assert_eq!(buf.len(), 3 << 20);
        ours
    });
    let (mut total, mut buf) = (0, Vec::with_capacity(64 << 10));
    while total < 3 << 20 {
        let result;
        (result, buf) = theirs.read(buf).await;
        let count = result.unwrap();
        assert!(count > 0 && count == buf.len());
        assert!(buf.iter().all(|&byte| byte == 7));
        total += count;
    }
    drop(writer.await.unwrap());
    let (end, _) = theirs.read(buf).await;
    assert_eq!(end.unwrap(), 0);
}

#[test]
fn bytes_arrive_over_ipv4_ipv6_names_and_unix() {
    on_both(|| async {
        let dir = Dir::new("transfer");
        for text in ["tcp:127.0.0.1:0", "tcp:[::1]:0", "tcp:localhost:0"] {
            send_and_receive_over(text.parse().unwrap()).await;
        }
        send_and_receive_over(dir.address()).await;
    });
}

#[test]
fn the_runtime_that_was_asked_for_runs() {
    assert_eq!(runtime::kind(), None);
    for kind in [RuntimeKind::Uring, RuntimeKind::Plain] {
        let seen = runtime::run_on(kind, async { runtime::kind() }).unwrap();
        // io_uring may be refused on this host; then both run on epoll.
        assert!(
            seen == Some(kind)
                || (seen == Some(RuntimeKind::Plain) && runtime::choose() == RuntimeKind::Plain)
        );
    }
    assert_eq!(runtime::kind(), None);
}

#[test]
fn shutdown_wakes_a_waiting_read() {
    on_both(|| async {
        let (stream, peer) = pair();
        let stream = Rc::new(stream);
        let reader = runtime::spawn({
            let stream = Rc::clone(&stream);
            async move { stream.read(Vec::with_capacity(16)).await.0 }
        });
        tokio::task::yield_now().await;
        stream.shutdown();
        assert_eq!(reader.await.unwrap().unwrap(), 0);
        drop(peer);
    });
}

#[test]
fn shutdown_wakes_a_write_that_the_peer_does_not_take() {
    on_both(|| async {
        let (stream, peer) = pair();
        let stream = Rc::new(stream);
        let writer = runtime::spawn({
            let stream = Rc::clone(&stream);
            async move { stream.write_all(vec![0; 16 << 20]).await.0 }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        stream.shutdown();
        assert!(writer.await.unwrap().is_err());
        drop(peer);
    });
}

#[test]
fn a_read_after_an_abandoned_one_is_refused_and_the_drop_still_closes() {
    on_both(|| async {
        let (stream, mut peer) = pair();
        let abandoned = timeout(
            Duration::from_millis(5),
            stream.read(Vec::with_capacity(16)),
        )
        .await;
        assert!(abandoned.is_err());
        let (second, _) = stream.read(Vec::with_capacity(16)).await;
        assert_eq!(second.unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
        drop(stream);
        // The kernel may still hold the first read; the peer sees the end all the same.
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(peer.read(&mut [0; 8]).unwrap(), 0);
    });
}

#[test]
fn an_abandoned_read_keeps_the_socket_from_leaving() {
    on_both(|| async {
        let (stream, _peer) = pair();
        let _ = timeout(
            Duration::from_millis(5),
            stream.read(Vec::with_capacity(16)),
        )
        .await;
        assert!(stream.into_socket().is_err());
    });
}

#[test]
fn a_read_needs_capacity() {
    on_both(|| async {
        let (stream, _peer) = pair();
        assert!(stream.read(Vec::new()).await.0.is_err());
    });
}

#[test]
fn a_socket_leaves_in_blocking_mode_close_on_exec_and_open() {
    on_both(|| async {
        let (stream, mut peer) = pair();
        assert!(stream.write_all(b"hello".to_vec()).await.0.is_ok());
        let socket = stream.into_socket().unwrap();
        let flags = rustix::fs::fcntl_getfl(&socket).unwrap();
        assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
        let flags = rustix::io::fcntl_getfd(&socket).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        let worker = std::thread::spawn(move || {
            let mut socket = StdUnixStream::from(socket);
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut got = [0; 4];
            socket.read_exact(&mut got).unwrap();
            socket.write_all(&got).unwrap();
        });
        peer.write_all(b"data").unwrap();
        let mut all = [0; 9];
        peer.read_exact(&mut all).unwrap();
        assert_eq!(&all, b"hellodata");
        worker.join().unwrap();
    });
}

#[test]
fn tasks_left_behind_with_reads_in_flight_do_not_hold_up_the_end() {
    for kind in [RuntimeKind::Uring, RuntimeKind::Plain] {
        let peer = runtime::run_on(kind, async {
            let (stream, peer) = pair();
            runtime::spawn(async move { stream.read(Vec::with_capacity(16)).await.0 });
            tokio::time::sleep(Duration::from_millis(5)).await;
            peer
        })
        .unwrap();
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!((&peer).read(&mut [0; 8]).unwrap(), 0);
    }
}

#[test]
fn connect_errors_name_the_address() {
    on_both(|| async {
        let dir = Dir::new("refused");
        let nobody: Address = "tcp:127.0.0.1:1".parse().unwrap();
        for (address, text) in [
            (nobody, "tcp:127.0.0.1:1"),
            (dir.address(), "refused"),
            ("tcp:127.0.0.1:0".parse().unwrap(), "tcp:127.0.0.1:0"),
        ] {
            let error = Stream::connect(&address).await.unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
        let unknown: Address = "tcp:no-such-host.invalid:1".parse().unwrap();
        let error = Stream::connect(&unknown).await.unwrap_err();
        assert!(matches!(error, ConnectError::Resolve { .. }), "{error}");
        assert!(error.to_string().contains("no-such-host.invalid"));
    });
}

#[test]
fn a_unix_socket_is_private_and_removed_at_the_end() {
    on_both(|| async {
        let dir = Dir::new("mode");
        let path = dir.0.join("socket");
        let listener = Listener::bind(&dir.address()).await.unwrap();
        let mode = std::fs::symlink_metadata(&path)
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists());
    });
}

#[test]
fn a_path_taken_over_by_somebody_else_is_not_removed() {
    on_both(|| async {
        let dir = Dir::new("taken");
        let path = dir.0.join("socket");
        let listener = Listener::bind(&dir.address()).await.unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, b"other").unwrap();
        drop(listener);
        assert!(path.exists());
    });
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_respected() {
    on_both(|| async {
        let dir = Dir::new("stale");
        let path = dir.0.join("socket");
        let live = StdUnixListener::bind(&path).unwrap();
        let error = Listener::bind(&dir.address()).await.unwrap_err();
        assert!(matches!(error, ListenError::InUse { .. }), "{error}");
        assert!(path.exists());
        // Dropping a std listener leaves the file: now it is stale.
        drop(live);
        let ours = Listener::bind(&dir.address()).await.unwrap();
        assert!(Stream::connect(&dir.address()).await.is_ok());
        drop(ours);
        std::fs::write(&path, b"precious").unwrap();
        let error = Listener::bind(&dir.address()).await.unwrap_err();
        assert!(matches!(error, ListenError::NotASocket { .. }), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    });
}

#[test]
fn a_tcp_port_in_use_is_an_error_that_names_it() {
    on_both(|| async {
        let first = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap())
            .await
            .unwrap();
        let error = Listener::bind(first.local_address()).await.unwrap_err();
        assert!(
            error
                .to_string()
                .contains(&first.local_address().to_string()),
            "{error}"
        );
    });
}

#[test]
fn an_abandoned_accept_loses_no_connection() {
    on_both(|| async {
        let dir = Dir::new("accept");
        let listener = Listener::bind(&dir.address()).await.unwrap();
        assert!(
            timeout(Duration::from_millis(5), listener.accept())
                .await
                .is_err()
        );
        let client = Stream::connect(&dir.address()).await.unwrap();
        let server = listener.accept().await.unwrap();
        assert!(
            server.peer().contains(&std::process::id().to_string()),
            "{}",
            server.peer()
        );
        assert!(client.write_all(b"x".to_vec()).await.0.is_ok());
        assert_eq!(server.read(Vec::with_capacity(8)).await.0.unwrap(), 1);
    });
}

#[test]
fn many_connections_wait_in_the_backlog() {
    on_both(|| async {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap())
            .await
            .unwrap();
        let mut clients = Vec::new();
        for _ in 0..260 {
            clients.push(Stream::connect(listener.local_address()).await.unwrap());
        }
        for _ in 0..260 {
            listener.accept().await.unwrap();
        }
    });
}

#[test]
fn a_listening_socket_that_was_passed_in_is_listened_on() {
    on_both(|| async {
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        let name: Address = "fd:passed".parse().unwrap();
        let listener = Listener::from_socket(OwnedFd::from(tcp), &name).unwrap();
        let local: Address = format!("tcp:127.0.0.1:{port}").parse().unwrap();
        assert_eq!(*listener.local_address(), local);
        let (ours, theirs) = tokio::join!(Stream::connect(&local), listener.accept());
        ours.unwrap();
        theirs.unwrap();

        let folder = Dir::new("passed");
        let Address::Unix { path } = folder.address() else {
            unreachable!("it is one")
        };
        let unix = StdUnixListener::bind(&path).unwrap();
        let listener = Listener::from_socket(OwnedFd::from(unix), &name).unwrap();
        let address = folder.address();
        let (ours, theirs) = tokio::join!(Stream::connect(&address), listener.accept());
        ours.unwrap();
        theirs.unwrap();
        drop(listener);
        assert!(path.exists());

        let (connected, _other) = StdUnixStream::pair().unwrap();
        let error = Listener::from_socket(OwnedFd::from(connected), &name).unwrap_err();
        assert!(error.to_string().contains("fd:passed"), "{error}");
    });
}

/// Bytes go over vsock where the host has its loopback; where it has not, the errors name the address.
#[test]
fn vsock_is_used_like_any_socket_and_its_absence_is_named() {
    const ANY: u32 = u32::MAX;
    on_both(|| async {
        let any: Address = format!("vsock:{ANY}:{ANY}").parse().unwrap();
        let error = Stream::connect(&any).await.unwrap_err().to_string();
        assert!(error.contains("for listening only"), "{error}");
        let listener = match Listener::bind(&any).await {
            Ok(listener) => listener,
            Err(error) => {
                assert!(error.to_string().contains(&any.to_string()), "{error}");
                return;
            }
        };
        let Address::Vsock { cid, port } = *listener.local_address() else {
            panic!("{:?}", listener.local_address());
        };
        assert!(cid == ANY && port != ANY, "the kernel has chosen a port");
        let loopback = Address::Vsock { cid: 1, port };
        match Stream::connect(&loopback).await {
            Ok(ours) => {
                let theirs = listener.accept().await.unwrap();
                ours.write_all(b"vsock".to_vec()).await.0.unwrap();
                let (read, bytes) = theirs.read(Vec::with_capacity(5)).await;
                assert_eq!((read.unwrap(), bytes), (5, b"vsock".to_vec()));
                assert!(theirs.peer().starts_with("vsock:1:"), "{}", theirs.peer());
            }
            Err(error) => assert!(error.to_string().contains(&loopback.to_string())),
        }
    });
}
