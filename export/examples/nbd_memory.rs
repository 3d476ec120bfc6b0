//! Serves a disk in memory, to measure the server alone against `nbdkit memory`:
//!
//! ```text
//! cargo run --release -p cowvhd-export --example nbd_memory -- unix:/tmp/ours.sock 1073741824
//! nbdkit -U /tmp/theirs.sock -f memory 1G
//! fio --name=r --ioengine=nbd --uri='nbd+unix:///?socket=/tmp/ours.sock' --rw=randread --bs=4k --iodepth=32 \
//!     --time_based --runtime=5
//! ```
//!
//! Options after the size: `read-only`, `log`, and `delay`, which makes every read and write take a millisecond more,
//! as `nbdkit --filter=delay memory 1G rdelay=1ms wdelay=1ms` does. Ends when its standard input does.

use cowvhd_export::{Backend, Errno, Extent, MemoryBackend, NbdAddress, Server, ServerOptions};
use std::error::Error;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

/// A disk that takes its time.
struct Delayed(MemoryBackend);

impl Backend for Delayed {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn read_only(&self) -> bool {
        self.0.read_only()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), Errno> {
        std::thread::sleep(Duration::from_millis(1));
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), Errno> {
        std::thread::sleep(Duration::from_millis(1));
        self.0.write_at(buf, offset)
    }
    fn flush(&self) -> Result<(), Errno> {
        self.0.flush()
    }
    fn write_zeroes(&self, offset: u64, length: u64, punch: bool) -> Result<(), Errno> {
        self.0.write_zeroes(offset, length, punch)
    }
    fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.0.discard(offset, length)
    }
    fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, Errno> {
        self.0.extents(offset, length)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, size, flags @ ..] = &arguments[..] else {
        return Err("usage: nbd_memory ADDRESS SIZE_BYTES [read-only] [log] [delay]".into());
    };
    let mut disk = MemoryBackend::new(size.parse()?);
    if flags.iter().any(|flag| flag == "read-only") {
        disk = disk.into_read_only();
    }
    let mut options = ServerOptions { replace_stale_socket: true, ..ServerOptions::default() };
    if flags.iter().any(|flag| flag == "log") {
        options.observer = Some(Arc::new(|event| eprintln!("{event:?}")));
    }
    let disk: Arc<dyn Backend> =
        if flags.iter().any(|flag| flag == "delay") { Arc::new(Delayed(disk)) } else { Arc::new(disk) };
    let server = Server::bind(&NbdAddress::parse(address)?, disk, options)?;
    let handle = server.shutdown_handle();
    println!("{}", server.local_address());
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        handle.shutdown();
    });
    println!("{:?}", server.run()?);
    Ok(())
}
