//! A server that runs for the length of one test; and tests of its beginning and end.

use crate::disk::TestDisk;
use crate::raw::{Client, cmd};
use cowvhd_export::{
    Backend, Event, Limits, MemoryBackend, NbdAddress, ServeError, Server, ServerOptions, ShutdownHandle,
    Summary,
};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;

/// What the server told its observer.
#[derive(Default)]
pub struct Events {
    list: Mutex<Vec<Event>>,
    added: Condvar,
}

impl Events {
    /// Waits for an event that `matches`.
    pub fn wait_for(&self, matches: impl Fn(&Event) -> bool) -> Event {
        let mut list = self.list.lock().unwrap();
        loop {
            if let Some(event) = list.iter().find(|event| matches(event)) {
                return event.clone();
            }
            list = self.added.wait(list).unwrap();
        }
    }
}

pub struct Running {
    pub path: PathBuf,
    pub events: Arc<Events>,
    pub handle: ShutdownHandle,
    thread: Option<JoinHandle<Result<Summary, ServeError>>>,
    _directory: TempDir,
}

impl Running {
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.path.display())
    }

    /// Waits for the server to end after a shutdown.
    pub fn join(&mut self) -> Summary {
        self.thread.take().unwrap().join().unwrap().unwrap()
    }

    pub fn stop(mut self) -> Summary {
        self.handle.shutdown();
        self.join()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.handle.shutdown();
        if let Some(thread) = self.thread.take() {
            // A test that fails must not wait for what it holds up itself.
            if !std::thread::panicking() {
                thread.join().unwrap().unwrap();
            }
        }
    }
}

pub fn serve_with(backend: Arc<dyn Backend>, limits: Limits) -> Running {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nbd.sock");
    let events = Arc::new(Events::default());
    let told = Arc::clone(&events);
    let observer = move |event: &Event| {
        told.list.lock().unwrap().push(event.clone());
        told.added.notify_all();
    };
    let options = ServerOptions { limits, observer: Some(Arc::new(observer)), ..ServerOptions::default() };
    let server = Server::bind(&NbdAddress::Unix(path.clone()), backend, options).unwrap();
    let handle = server.shutdown_handle();
    let thread = std::thread::spawn(move || server.run());
    Running { path, events, handle, thread: Some(thread), _directory: directory }
}

pub fn serve(backend: Arc<dyn Backend>) -> Running {
    serve_with(backend, Limits::default())
}

pub fn serve_memory(size_bytes: u64) -> Running {
    serve(Arc::new(MemoryBackend::new(size_bytes)))
}

#[test]
fn the_socket_is_the_owners_alone_and_goes_away_with_the_server() {
    let server = serve_memory(MIB);
    let found = std::fs::metadata(&server.path).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    let path = server.path.clone();
    let _directory = tempfile::tempdir().unwrap();
    server.stop();
    assert!(!path.exists());
}

#[test]
fn a_stale_socket_is_replaced_on_request_and_a_live_one_never() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nbd.sock");
    let address = NbdAddress::Unix(path.clone());
    let disk = || Arc::new(MemoryBackend::new(MIB));
    let replacing = || ServerOptions { replace_stale_socket: true, ..ServerOptions::default() };

    let live = UnixListener::bind(&path).unwrap();
    let refused = Server::bind(&address, disk(), replacing()).err().unwrap();
    assert!(matches!(refused, ServeError::Bind { .. }), "{refused}");
    drop(live);
    let refused = Server::bind(&address, disk(), ServerOptions::default()).err().unwrap();
    assert!(refused.to_string().contains("nbd.sock"), "{refused}");
    drop(Server::bind(&address, disk(), replacing()).unwrap());
    assert!(!path.exists());

    std::fs::write(&path, b"precious").unwrap();
    Server::bind(&address, disk(), replacing()).err().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

/// A link is not followed, whatever it leads to: neither is a socket made at its end, nor what is there changed or removed.
#[test]
fn a_link_in_the_place_of_the_socket_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::write(at("file"), b"precious").unwrap();
    std::fs::set_permissions(at("file"), std::fs::Permissions::from_mode(0o644)).unwrap();
    // A socket that nobody listens on any more.
    drop(UnixListener::bind(at("stale")).unwrap());
    for target in ["nothing", "file", "stale"] {
        let link = at(&format!("to-{target}"));
        std::os::unix::fs::symlink(target, &link).unwrap();
        for replace_stale_socket in [false, true] {
            let options = ServerOptions { replace_stale_socket, ..ServerOptions::default() };
            let disk = Arc::new(MemoryBackend::new(MIB));
            let refused = Server::bind(&NbdAddress::Unix(link.clone()), disk, options).err().unwrap();
            assert!(refused.to_string().contains("in use"), "{refused}");
        }
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    }
    assert!(std::fs::symlink_metadata(at("nothing")).is_err());
    assert!(std::fs::symlink_metadata(at("stale")).is_ok());
    assert_eq!(std::fs::read(at("file")).unwrap(), b"precious");
    assert_eq!(std::fs::metadata(at("file")).unwrap().permissions().mode() & 0o777, 0o644);
}

/// A server that accepts nobody, as one that is stopped, is there all the same: its socket is not taken away, nor is it waited for.
#[test]
fn a_socket_whose_queue_is_full_is_live() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nbd.sock");
    let place = SocketAddrUnix::new(&path).unwrap();
    let socket =
        |flags| rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let stopped = socket(SocketFlags::CLOEXEC);
    rustix::net::bind(&stopped, &place).unwrap();
    rustix::net::listen(&stopped, 0).unwrap();
    let mut waiting = Vec::new();
    loop {
        let client = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        let connected = rustix::net::connect(&client, &place);
        waiting.push(client);
        if connected.is_err() {
            break;
        }
    }
    let options = ServerOptions { replace_stale_socket: true, ..ServerOptions::default() };
    let disk = Arc::new(MemoryBackend::new(MIB));
    let refused = Server::bind(&NbdAddress::Unix(path.clone()), disk, options).err().unwrap();
    assert!(refused.to_string().contains("in use"), "{refused}");
    assert!(path.exists());
}

#[test]
fn tcp_is_served_on_loopback_and_elsewhere_only_when_allowed() {
    let disk: Arc<dyn Backend> = Arc::new(MemoryBackend::new(MIB));
    let any = NbdAddress::parse("tcp:0.0.0.0:0").unwrap();
    let refused = Server::bind(&any, Arc::clone(&disk), ServerOptions::default()).err().unwrap();
    assert!(matches!(refused, ServeError::RemoteNotAllowed { .. }), "{refused}");
    let allowed = ServerOptions { allow_remote: true, ..ServerOptions::default() };
    Server::bind(&any, Arc::clone(&disk), allowed).unwrap();

    let loopback = NbdAddress::parse("tcp:127.0.0.1:0").unwrap();
    let server = Server::bind(&loopback, disk, ServerOptions::default()).unwrap();
    let NbdAddress::Tcp(address) = server.local_address().clone() else {
        panic!("{}", server.local_address())
    };
    assert_ne!(address.port(), 0);
    let handle = server.shutdown_handle();
    let thread = std::thread::spawn(move || server.run());
    let mut client = Client::over(std::net::TcpStream::connect(address).unwrap()).go();
    client.write(4096, &[7; 4096]);
    assert_eq!(client.read(4096, 4096), [7; 4096]);
    handle.shutdown();
    assert_eq!(thread.join().unwrap().unwrap().connections, 1);
    assert!(client.is_closed());
}

#[test]
fn shutdown_answers_what_is_in_flight_and_reads_no_more() {
    let disk = Arc::new(TestDisk::new(MIB));
    let mut server = serve(disk.clone());
    let mut client = Client::connect(&server.path).go();
    let mut idle = Client::connect(&server.path).go();
    let mut greeting = Client::connect(&server.path);
    disk.hold(4096);
    client.send(0, cmd::WRITE, 9, 4096, 512, &[3; 512]);
    disk.wait_held(4096, 1);
    server.handle.shutdown();
    assert!(idle.is_closed());
    assert!(greeting.is_closed());
    disk.release(4096);
    assert_eq!(client.simple_reply(), (0, 9));
    assert!(client.is_closed());
    let summary = server.join();
    assert_eq!((summary.connections, summary.cut, summary.unfinished), (3, 0, 0));
}

#[test]
fn shutdown_does_not_wait_for_ever_for_a_backend_that_hangs() {
    let disk = Arc::new(TestDisk::new(MIB));
    let limits = Limits { drain_timeout: std::time::Duration::from_millis(50), ..Limits::default() };
    let mut server = serve_with(disk.clone(), limits);
    let mut client = Client::connect(&server.path).go();
    disk.hold(0);
    client.send(0, cmd::READ, 1, 0, 512, &[]);
    disk.wait_held(0, 1);
    server.handle.shutdown();
    let summary = server.join();
    assert_eq!((summary.cut, summary.unfinished), (1, 1));
    assert!(client.is_closed());
    disk.release_all();
}

#[test]
fn a_backend_of_half_a_sector_is_not_served() {
    struct Odd;
    impl Backend for Odd {
        fn size_bytes(&self) -> u64 {
            1000
        }
        fn read_only(&self) -> bool {
            true
        }
        fn read_at(&self, _: &mut [u8], _: u64) -> Result<(), cowvhd_export::Errno> {
            Ok(())
        }
        fn write_at(&self, _: &[u8], _: u64) -> Result<(), cowvhd_export::Errno> {
            Ok(())
        }
        fn flush(&self) -> Result<(), cowvhd_export::Errno> {
            Ok(())
        }
        fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), cowvhd_export::Errno> {
            Ok(())
        }
        fn discard(&self, _: u64, _: u64) -> Result<(), cowvhd_export::Errno> {
            Ok(())
        }
        fn extents(&self, _: u64, _: u64) -> Result<Vec<cowvhd_export::Extent>, cowvhd_export::Errno> {
            Ok(Vec::new())
        }
    }
    let address = NbdAddress::parse("tcp:127.0.0.1:0").unwrap();
    let refused = Server::bind(&address, Arc::new(Odd), ServerOptions::default()).err().unwrap();
    assert!(matches!(refused, ServeError::Size { size_bytes: 1000 }), "{refused}");
}
