//! Serves a disk in memory, to measure the server alone against `nbdkit memory`:
//!
//! ```text
//! cargo run --release -p cowvhd-export --example nbd_memory -- unix:/tmp/ours.sock 1073741824
//! nbdkit -U /tmp/theirs.sock -f memory 1G
//! fio --name=r --ioengine=nbd --uri='nbd+unix:///?socket=/tmp/ours.sock' --rw=randread --bs=4k --iodepth=32 \
//!     --time_based --runtime=5
//! ```
//!
//! Options after the size: `read-only`, `log`. Ends when its standard input does.

use cowvhd_export::{MemoryBackend, NbdAddress, Server, ServerOptions};
use std::error::Error;
use std::io::Read;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, size, flags @ ..] = &arguments[..] else {
        return Err("usage: nbd_memory ADDRESS SIZE_BYTES [read-only] [log]".into());
    };
    let mut disk = MemoryBackend::new(size.parse()?);
    if flags.iter().any(|flag| flag == "read-only") {
        disk = disk.into_read_only();
    }
    let mut options = ServerOptions { replace_stale_socket: true, ..ServerOptions::default() };
    if flags.iter().any(|flag| flag == "log") {
        options.observer = Some(Arc::new(|event| eprintln!("{event:?}")));
    }
    let server = Server::bind(&NbdAddress::parse(address)?, Arc::new(disk), options)?;
    let handle = server.shutdown_handle();
    println!("{}", server.local_address());
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        handle.shutdown();
    });
    println!("{:?}", server.run()?);
    Ok(())
}
