//! What a journal says of the start of the file.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::disk::CreateOptions;
use crate::sim::SimVfs;
use crate::sync::Arc;
use crate::vfs::{Access, Vfs};
use crate::vhd::UniqueId;

const PATH: &str = "/disk.vhd";

/// An image of the first page may name another parent, and change nothing else of the disk.
#[test]
fn a_journaled_start_of_the_file_is_that_of_this_disk() {
    let vfs = SimVfs::new(1);
    let create = CreateOptions::new(1 << 20).test_geometry(16 << 10, 128 << 10);
    create.vfs(Arc::new(vfs.clone())).create(Path::new(PATH)).unwrap();
    let file = vfs.open(Path::new(PATH), Access::ReadOnly).unwrap();
    let decision = Headers::read(&*file, Path::new(PATH)).unwrap().decide(Path::new(PATH)).unwrap();
    let (footer, header) = (&decision.footer, &decision.header);
    let journaled = |footer: &Footer, header: &DynamicHeader| {
        let mut page = pair_bytes(footer, header).to_vec();
        page.resize(PAGE_BYTES as usize, 0);
        decision.journaled_pair(&page)
    };
    let moved = DynamicHeader { parent_unique_id: UniqueId::from_bytes([3; 16]), ..header.clone() };
    let dirty = DynamicHeader { cookie: HeaderCookie::Dirty, ..moved.clone() };
    assert_eq!(journaled(footer, &dirty).unwrap(), (footer.clone(), moved));

    let id = UniqueId::from_bytes([9; 16]);
    let other_id =
        format!("journaled footer: field unique id (byte 68) is {id}, expected {}", footer.unique_id);
    let other = Footer { unique_id: id, ..footer.clone() };
    assert!(journaled(&other, header).unwrap_err().to_string().starts_with(&other_id));
    let other = Footer { current_size: footer.current_size - 512, ..footer.clone() };
    let header_with = |change: fn(&mut DynamicHeader)| {
        let mut header = header.clone();
        change(&mut header);
        header
    };
    for (footer, header, words) in [
        (&other, header.clone(), "field current size (byte 0) is 1048064, expected 1048576"),
        (footer, header_with(|header| header.table_offset += 4096), "field table offset (byte 0) is"),
        (
            footer,
            header_with(|header| header.max_table_entries += 1),
            "field max table entries (byte 0) is 65",
        ),
        (footer, header_with(|header| header.block_size *= 2), "field max table entries (byte 0) is 64"),
    ] {
        let error = journaled(footer, &header).unwrap_err().to_string();
        assert!(error.starts_with("journaled header: ") && error.contains(words), "{error}");
    }
    let mut torn = pair_bytes(footer, header).to_vec();
    torn[600] ^= 1;
    assert!(decision.journaled_pair(&torn).unwrap_err().to_string().contains("checksum"));
    assert!(decision.journaled_pair(&torn[..100]).is_err());
}
