//! Other people's readers of VHD files: what they say of an image, and the content they find in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use super::process::{find, finish, output, printed, run, tool};

#[derive(Clone, Copy, Debug)]
pub enum Reader {
    QemuImg,
    SevenZip,
    Libvhdi,
}

pub const READERS: [Reader; 3] = [Reader::QemuImg, Reader::SevenZip, Reader::Libvhdi];

const READ_ALL_WITH_PYVHDI: &str = "
import sys, pyvhdi
image = pyvhdi.file()
image.open(sys.argv[1])
left = image.get_media_size()
while left:
    piece = image.read_buffer(min(left, 1 << 20))
    left -= len(piece)
    sys.stdout.buffer.write(piece)
";

impl Reader {
    /// What the reader says of the image; it fails if the image is not to its liking.
    pub fn judge(self, image: &Path) -> Output {
        let mut command = match self {
            Reader::QemuImg => tool("qemu-img"),
            Reader::SevenZip => tool("7zz"),
            Reader::Libvhdi => tool("vhdiinfo"),
        };
        match self {
            Reader::QemuImg => command.args(["info", "-f", "vpc"]),
            Reader::SevenZip => command.args(["t", "-tvhd"]),
            Reader::Libvhdi => &mut command,
        };
        output(command.arg(image))
    }

    pub fn must_accept(self, image: &Path) -> String {
        let output = self.judge(image);
        assert!(output.status.success(), "{self:?} refuses {}: {}", image.display(), printed(&output));
        printed(&output)
    }

    pub fn must_refuse(self, image: &Path) {
        let output = self.judge(image);
        assert!(!output.status.success(), "{self:?} accepts {}: {}", image.display(), printed(&output));
    }

    /// The disk's whole content, as this reader sees it.
    pub fn content(self, image: &Path) -> Vec<u8> {
        let raw = image.with_extension("raw");
        match self {
            Reader::QemuImg => {
                run(tool("qemu-img").args(["convert", "-f", "vpc", "-O", "raw"]).arg(image).arg(&raw));
            }
            Reader::SevenZip => print_to(&raw, tool("7zz").args(["e", "-tvhd", "-so"]).arg(image)),
            Reader::Libvhdi => print_to(&raw, python().args(["-c", READ_ALL_WITH_PYVHDI]).arg(image)),
        }
        let content = fs::read(&raw).expect("the raw copy");
        fs::remove_file(&raw).expect("removing the raw copy");
        content
    }
}

/// Debian's own interpreter, which python3-libvhdi is for.
fn python() -> Command {
    let python = PathBuf::from("/usr/bin/python3");
    assert!(
        output(Command::new(&python).args(["-c", "import pyvhdi"])).status.success(),
        "pyvhdi is missing: run scripts/install-test-tools"
    );
    Command::new(python)
}

fn print_to(file: &Path, command: &mut Command) {
    let file = fs::File::create(file).expect("the raw copy");
    let done = finish(command.stdin(Stdio::null()).stdout(file).stderr(Stdio::piped()));
    assert!(done.status.success(), "{command:?}: {}: {}", done.status, printed(&done));
}

/// Fails at the first difference.
pub fn must_equal(what: &str, found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len(), "{what}: the size");
    if let Some(at) = found.iter().zip(expected).position(|(found, expected)| found != expected) {
        let around = at..(at + 16).min(found.len());
        panic!(
            "{what}: from byte {at} on: {:02x?} instead of {:02x?}",
            &found[around.clone()],
            &expected[around]
        );
    }
}

/// A program that is there is also used: this only finds it early.
pub fn must_be_installed() {
    for program in ["qemu-img", "qemu-io", "7zz", "vhdiinfo", "nbdcopy"] {
        find(program);
    }
    python();
}
