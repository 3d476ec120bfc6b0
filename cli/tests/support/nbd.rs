//! Real NBD clients, and the model of what they wrote.

use std::path::Path;

use super::process::{run, tool};
use super::random::Random;
use super::server::Serving;

/// A disk's expected content.
pub struct Model {
    pub bytes: Vec<u8>,
}

/// A piece of one session's work.
pub struct Write {
    offset: usize,
    bytes: Option<Vec<u8>>,
    length: usize,
}

impl Write {
    fn sectors_end(&self) -> usize {
        (self.offset + self.length).div_ceil(512)
    }
}

impl Model {
    pub fn new(size: usize) -> Self {
        Model { bytes: vec![0; size] }
    }

    /// Seeded writes at scattered places, of any size and alignment; some of them zeros, and the disk's first and last
    /// byte always among them.
    pub fn random_writes(&self, random: &mut Random, count: usize) -> Vec<Write> {
        let size = self.bytes.len() as u64;
        let mut writes = Vec::new();
        for index in 0..count {
            let longest = [600, 5_000, 70_000, 3 << 20][random.between(0, 4) as usize];
            let length = random.between(1, longest.min(size)) as usize;
            let last = size - length as u64;
            let offset = match index {
                0 => 0,
                1 => last,
                // Half of them aligned, as file systems write.
                _ if random.between(0, 2) == 0 => random.between(0, last + 1) & !0xfff,
                _ => random.between(0, last + 1),
            };
            let bytes = (index < 2 || random.between(0, 8) > 0).then(|| random.bytes(length));
            writes.push(Write { offset: offset as usize, bytes, length });
        }
        writes
    }

    /// The same with no two in one sector: each sector then has only two contents, before and after.
    pub fn random_writes_apart(&self, random: &mut Random, count: usize) -> Vec<Write> {
        let mut apart: Vec<Write> = Vec::new();
        for write in self.random_writes(random, count) {
            if apart.iter().all(|other| {
                write.sectors_end() <= other.offset / 512 || other.sectors_end() <= write.offset / 512
            }) {
                apart.push(write);
            }
        }
        apart
    }

    pub fn apply(&mut self, writes: &[Write]) {
        for write in writes {
            let target = &mut self.bytes[write.offset..write.offset + write.length];
            match &write.bytes {
                Some(bytes) => target.copy_from_slice(bytes),
                None => target.fill(0),
            }
        }
    }
}

/// Carries out writes with qemu-io, one after the other, and a flush at the end where asked for.
pub fn write(serving: &Serving, writes: &[Write], flush: bool) {
    let dir = tempfile::tempdir().expect("a directory");
    // Without this option qemu-io flushes when it closes the disk; the server cannot know that nobody asked.
    let mut qemu_io = tool("qemu-io");
    qemu_io.args(["-f", "raw", "-t", if flush { "writeback" } else { "unsafe" }]);
    for (index, write) in writes.iter().enumerate() {
        let Write { offset, bytes, length } = write;
        let command = match bytes {
            Some(bytes) => {
                let file = dir.path().join(index.to_string());
                std::fs::write(&file, bytes).expect("a pattern");
                format!("write -s {} {offset} {length}", file.display())
            }
            None => format!("write -z {offset} {length}"),
        };
        qemu_io.args(["-c", &command]);
    }
    if flush {
        qemu_io.args(["-c", "flush"]);
    }
    let said = run(qemu_io.arg(serving.uri()));
    let done = said.lines().filter(|line| line.starts_with("wrote ")).count();
    assert_eq!(done, writes.len(), "qemu-io: {said}");
}

/// Copies a raw file onto the disk with nbdcopy, which flushes at the end.
pub fn copy_in(serving: &Serving, raw: &Path) {
    run(tool("nbdcopy").arg("--flush").arg(raw).arg(serving.uri()));
}

/// The disk's content over NBD.
pub fn copy_out(serving: &Serving) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let raw = dir.path().join("raw");
    run(tool("nbdcopy").arg(serving.uri()).arg(&raw));
    std::fs::read(&raw).expect("the raw copy")
}
